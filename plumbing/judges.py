"""Judges of fluency and of attributes, for eval.py.

A judge fitted by probes.py --judge travels as plain arrays. Others are classifiers of the hub, and a lexicon.
"""

import importlib.util
import os
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import pipeline

from plumbing.bpe import gguf_path
from plumbing.config import check, reported_as
from plumbing.decoders import load_tokenizer, load_whole
from plumbing.devices import autocast
from plumbing.files import write_file

OPPOSITE = {"negative": "positive", "positive": "negative", "toxic": "nontoxic", "nontoxic": "toxic"}
FEATURES = {"ngram_range": (1, 2), "sublinear_tf": True}  # TF-IDF of words and pairs of words


def fit_judge(path, texts, labels, held_out, held_out_labels, **options):
    """Fits a logistic regression on the words of the texts, writes it -> its held-out accuracy.

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
    with reported_as(f"cannot read {path} as a judge of probes.py"), np.load(path, allow_pickle=False) as f:
        words = f["words"].tobytes().decode().split("\n")
        features, fit = TfidfVectorizer(**FEATURES, vocabulary=words), LogisticRegression()
        features.idf_, fit.classes_ = f["idf"].astype(float), f["classes"]
        fit.coef_, fit.intercept_ = f["coef"].astype(float), f["intercept"]
    return fit.classes_.tolist(), lambda texts: fit.predict_proba(features.transform(texts))


def load_judge(name, device, batch_size):
    """-> its classes, and a function of texts to their probabilities (N, classes)."""
    if name.endswith(".npz"):
        return read_judge(name)
    if name == "vader":
        check(importlib.util.find_spec("vaderSentiment"), "the judge vader: pip install vaderSentiment")
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        polarity = SentimentIntensityAnalyzer().polarity_scores  # "compound" is from -1 to 1
        return ["positive"], lambda texts: np.array([[polarity(t)["compound"] / 2 + 0.5] for t in texts])
    with reported_as(f"--judges: cannot load {name}"):
        classify = pipeline("text-classification", model=name, device=device, top_k=None, truncation=True)
    labels = list(classify.model.config.id2label.values())

    def score(texts):
        found = [{s["label"]: s["score"] for s in row} for row in classify(texts, batch_size=batch_size)]
        return np.array([[row[label] for label in labels] for row in found])

    return [label.lower() for label in labels], score


def scores(judges, label, texts):
    """{judge: p(label) of each text (N,)}, 0 if empty, by all judges that know the label or its opposite."""
    out, empty = {}, [not text.strip() for text in texts]
    for name, (classes, score) in judges.items():
        known = label if label in classes else OPPOSITE.get(label)
        if known in classes:
            p = score(texts)[:, classes.index(known)]
            out[os.path.basename(name)] = np.where(empty, 0.0, p if known == label else 1 - p)
    return out


class LanguageModel:
    """A causal language model, the judge of fluency. Raises InputError if it cannot be loaded."""

    def __init__(self, name, device):
        self.tokenizer = tokenizer = load_tokenizer(name)
        # something must precede the first token: what ends a document, as bos may open a turn of a chat
        end = tokenizer.get_vocab().get("<|endoftext|>")
        starts = (end, tokenizer.bos_token_id, tokenizer.eos_token_id)
        self.first = next(token for token in starts if token is not None)
        self.model, self.device = load_whole(name, gguf_path(name) or name).to(device).eval(), device

    @torch.no_grad()
    def read(self, prefixes, texts, batch_size):
        """-> nats of each text given its prefix (N,), its tokens (N,), features of both (N, width)."""
        plain = {"add_special_tokens": False, "split_special_tokens": True}  # whatever the texts contain
        ids = [self.tokenizer(list(x), **plain)["input_ids"] for x in (prefixes, texts)]
        rows, out = [(torch.tensor([self.first, *p, *t]), 1 + len(p)) for p, t in zip(*ids)], []
        for at in range(0, len(rows), batch_size):
            part = rows[at : at + batch_size]
            tokens = [row for row, _ in part]
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], True).to(self.device)
            tokens = torch.nn.utils.rnn.pad_sequence(tokens, True).to(self.device)
            with autocast(self.device):
                seen = self.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
            logits = seen.logits[:, :-1].float().transpose(1, 2)
            nats = F.cross_entropy(logits, tokens[:, 1:], reduction="none")  # (B, T - 1)
            for i, (row, begin) in enumerate(part):
                feature = seen.hidden_states[-1][i, len(row) - 1].float().cpu().numpy()
                out.append((nats[i, begin - 1 : len(row) - 1].sum().item(), len(row) - begin, feature))
        return tuple(np.array(column) for column in zip(*out))
