"""Judges of attributes and of fluency, for eval.py. A judge of attributes can be fitted to your own text:

    python -m plumbing.judges --data other.jsonl --out judge.npz

It looks at the words of a text (TF-IDF) and is saved as plain arrays. Do not fit it to texts that a probe was
trained on: a judge must be independent of what it judges. The other judges of attributes are classifiers from
the hub and a lexicon, and the judge of fluency is a language model.
"""

import importlib.util
import os
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch.nn.utils.rnn import pad_sequence

from plumbing.config import run
from plumbing.convert import load_tokenizer, load_transformers
from plumbing.devices import autocast
from plumbing.errors import check, reported_as
from plumbing.files import check_writable, is_shipped, write_file
from plumbing.gguf_files import gguf_path
from plumbing.labelled import SOURCES, read_labelled

data = ""  # a JSON-lines file (text, label), or sentiment, toxicity or topic from the hub
out = ""  # the .npz file to write
balanced = False  # weight classes equally, whatever their sizes
max_iter = 10_000  # iterations of lbfgs [at least 1]
seed = 1337  # decides which tenth of the rows is held out, to measure the accuracy

OPPOSITE = {"negative": "positive", "positive": "negative", "toxic": "nontoxic", "nontoxic": "toxic"}
FEATURES = {"ngram_range": (1, 2), "sublinear_tf": True}  # TF-IDF of words and pairs of words


# ---------- Attributes --------------------------------------------------------------------------------------


def main(settings):
    check(data, "say --data: JSON lines with text and label, or " + ", ".join(SOURCES))
    check(out.endswith(".npz"), f"--out {out!r}: must be a file that ends in .npz")
    shipped = is_shipped(out) and os.path.exists(out)
    check(not shipped, f"{out} belongs to a shipped model: give your judge another --out")
    check_writable(out, inputs=[data])
    texts, labels = read_labelled(data)
    known, unseen, y_known, y_unseen = train_test_split(
        texts, np.array(labels), test_size=0.1, random_state=seed, stratify=labels
    )
    class_weight = "balanced" if balanced else None
    accuracy = fit_judge(out, known, y_known, unseen, y_unseen, max_iter=max_iter, class_weight=class_weight)
    print(f"{out}: {', '.join(sorted(set(labels)))}; accuracy {accuracy:.3f} on {len(unseen)} rows")


def fit_judge(path, texts, labels, held_out, held_out_labels, **options):
    """Fits a logistic regression to the words of the texts and writes it -> its accuracy on held-out texts.

    options: of scikit-learn's LogisticRegression.
    """
    features = TfidfVectorizer(**FEATURES, min_df=3, max_features=50_000)
    fit = LogisticRegression(C=10, **options).fit(features.fit_transform(texts), labels)
    accuracy = fit.score(features.transform(held_out), held_out_labels)
    arrays = {
        "classes": fit.classes_,
        "words": np.frombuffer("\n".join(features.get_feature_names_out()).encode(), dtype=np.uint8),
        "idf": features.idf_.astype(np.float16),
        "coef": fit.coef_.astype(np.float16),
        "intercept": fit.intercept_,
        "accuracy": accuracy,
        "rows": len(texts) + len(held_out),
    }
    write_file(path, partial(np.savez_compressed, **arrays))
    return accuracy


def read_judge(path):
    """-> its classes, and a function of texts to their probabilities (N, classes). Raises InputError."""
    fit = LogisticRegression()
    with reported_as(f"cannot read {path} as a judge"), np.load(path, allow_pickle=False) as f:
        words = f["words"].tobytes().decode().split("\n")
        features = TfidfVectorizer(**FEATURES, vocabulary=words)
        features.idf_ = f["idf"].astype(float)
        fit.classes_ = f["classes"]
        fit.coef_ = f["coef"].astype(float)
        fit.intercept_ = f["intercept"]
    return fit.classes_.tolist(), lambda texts: fit.predict_proba(features.transform(texts))


def load_judge(name, device, batch_size):
    """-> its classes, and a function of texts to their probabilities (N, classes). Raises InputError."""
    if name.endswith(".npz"):
        return read_judge(name)
    if name == "vader":
        check(importlib.util.find_spec("vaderSentiment"), "the judge vader: pip install vaderSentiment")
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        polarity = SentimentIntensityAnalyzer().polarity_scores  # "compound" is from -1 to 1
        return ["positive"], lambda texts: np.array([[polarity(t)["compound"] / 2 + 0.5] for t in texts])

    from transformers import pipeline

    with reported_as(f"--judges: cannot load {name}"):
        classify = pipeline("text-classification", model=name, device=device, top_k=None, truncation=True)
    limit = getattr(classify.model.config, "max_position_embeddings", None)
    if limit and classify.tokenizer.model_max_length > limit:  # a tokenizer that does not know the limit
        classify.tokenizer.model_max_length = limit - 2  # RoBERTa numbers its positions from 2
    labels = list(classify.model.config.id2label.values())

    def score(texts):
        answers = classify(texts, batch_size=batch_size)  # for each text, the labels in falling order
        p = [{answer["label"]: answer["score"] for answer in row} for row in answers]
        return np.array([[row[label] for label in labels] for row in p])

    return [label.lower() for label in labels], score


def scores(judges, label, texts):
    """{judge: p(label) of each text (N,)}, from all judges that have the label or its opposite among their
    classes. The probability of an empty text is 0.
    """
    empty = [not text.strip() for text in texts]
    found = {}
    for name, (classes, score) in judges.items():
        if label in classes:
            p = score(texts)[:, classes.index(label)]
        elif OPPOSITE.get(label) in classes:
            p = 1 - score(texts)[:, classes.index(OPPOSITE[label])]
        else:
            continue
        found[os.path.basename(name)] = np.where(empty, 0.0, p)
    return found


# ---------- Fluency -----------------------------------------------------------------------------------------


class LanguageModel:
    """A causal language model, the judge of fluency. Raises InputError if it cannot be loaded."""

    def __init__(self, name, device):
        self.tokenizer = load_tokenizer(name)
        self.model = load_transformers(name, gguf_path(name) or name).to(device).eval()
        self.device = device
        # the most tokens that it reads at once; some models have no limit
        self.window = getattr(self.model.config, "max_position_embeddings", None) or 1_000_000
        # something must precede the first token: what ends a document, as bos may open a turn of a chat
        end = self.tokenizer.get_vocab().get("<|endoftext|>")
        starts = (end, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        self.first = next(token for token in starts if token is not None)

    def tokenize(self, texts):
        """Texts -> lists of tokens. Special tokens in a text are read as the characters that they are."""
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return self.tokenizer(list(texts), **options)["input_ids"]

    @torch.no_grad()
    def read(self, prefixes, texts, batch_size):
        """-> nats of each text given its prefix (N,), its tokens (N,), features of both (N, width).

        If prefix and text are longer than the model's window, the model reads the end of the prefix.
        """
        rows = []
        begins = []  # where in its row each text begins
        for prefix, text in zip(self.tokenize(prefixes), self.tokenize(texts)):
            text = text[: self.window - 1]
            room = self.window - 1 - len(text)
            prefix = prefix[max(0, len(prefix) - room) :]
            rows.append(torch.tensor([self.first, *prefix, *text]))
            begins.append(1 + len(prefix))

        nats = []
        num_tokens = []
        features = []
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            tokens = pad_sequence(batch, batch_first=True).to(self.device)
            mask = pad_sequence([torch.ones_like(row) for row in batch], batch_first=True).to(self.device)
            with autocast(self.device):
                seen = self.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
            logits = seen.logits[:, :-1].float().transpose(1, 2)
            losses = F.cross_entropy(logits, tokens[:, 1:], reduction="none")  # (B, T - 1)
            for i, row in enumerate(batch):
                begin = begins[start + i]
                nats.append(losses[i, begin - 1 : len(row) - 1].sum().item())
                num_tokens.append(len(row) - begin)
                features.append(seen.hidden_states[-1][i, len(row) - 1].float().cpu().numpy())
        return np.array(nats), np.array(num_tokens), np.array(features)


if __name__ == "__main__":
    run(main, globals())
