"""Stage 3: train a probe, a logistic regression on embeddings, for each attribute that should steer.

    python probes.py --data mine.jsonl                          JSON lines with text and label
    python probes.py --data sentiment --out_dir out/c4          the paper's attributes, from
    python probes.py --data toxicity,topic --out_dir out/c4     the hub
    python probes.py --data other.jsonl --judge judge.npz       no probe, but a judge for eval.py

Writes OUT_DIR/probes/NAME.npz; then `python sample.py --guide LABEL` steers towards any of its labels.
Nothing else is trained again. The accuracy, F1 and AUC are of a tenth of the rows, which the probe did not
see. A judge reads the texts themselves, by TF-IDF; its text must be unknown to the probe that it judges.
"""

import os
from collections import Counter
from functools import partial

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from configurator import check, run
from model import load_encoder
from storage import hub_file, load_weights, newest_model, read_rows, write_file

data = ""  # JSON-lines files (text, label), or sentiment, toxicity, topic; several with commas
name = ""  # of the probe; default the file's name
judge = ""  # the .npz file of a judge to fit instead
out_dir = ""  # the model's folder; default the newest in out/, else pretrained/reviews
encoder = ""  # default the model's; a sentence-transformers name or folder
inverse_penalty = 1000.0  # scikit-learn's C; with a few thousand rows 1 overfits less
max_iter = 10_000  # of lbfgs
weight = 15.0  # of a guide towards its classes that gives none: higher is surer and less fluent
balanced = False  # weigh the classes alike, however many rows they have; the hub's toxicity always is
device = "auto"  # auto, cpu, cuda, cuda:1, mps
seed = 1337  # fixes everything

SOURCES = {  # the paper's attributes: files of the hub, and what their labels 0, 1, ... mean
    "sentiment": (("SetFit/sst2", "SetFit/amazon_polarity"), ("negative", "positive")),
    "toxicity": (("SetFit/toxic_conversations",), ("nontoxic", "toxic")),
    "topic": (("SetFit/ag_news",), ("world", "sports", "business", "sci-tech")),
}


def main(settings):
    check(data, "say --data: JSON lines with text and label, or " + ", ".join(SOURCES))
    check(weight > 0 and inverse_penalty > 0, "--weight and --inverse_penalty must be above 0")
    sources = data.split(",")
    check(len(sources) == 1 or not (name or judge), "--name and --judge are for a single source of data")
    check(not judge or judge.endswith(".npz"), f"--judge {judge}: must end in .npz")
    labelled = [read_labelled(source) for source in sources]  # what is wrong with them is said now
    if judge:
        return train_judge(*labelled[0], "balanced" if balanced else None)
    folder = out_dir or newest_model()
    encoder_name = encoder or load_weights(folder, "decoder")[0]["data"]["encoder"]
    print(f"for the model {folder}")
    encode = load_encoder(encoder_name, device)
    os.makedirs(f"{folder}/probes", exist_ok=True)
    print(f"{'probe':16}{'classes':36}{'rows':>8}{'accuracy':>10}{'F1':>8}{'AUC':>8}")
    for source, (texts, labels) in zip(sources, labelled):
        chunks = [texts[i : i + 1024] for i in range(0, len(texts), 1024)]
        x = np.concatenate([encode(chunk) for chunk in tqdm(chunks, f"embed {source}", leave=False)])
        probe = name or os.path.basename(source).split(".")[0]
        fields = train_probe(x, labels, probe, "balanced" if balanced or source == "toxicity" else None)
        fields |= {"encoder": encoder_name, "weight": weight}
        write_file(f"{folder}/probes/{probe}.npz", partial(np.savez, **fields))


def split(rows, labels):
    """-> nine tenths of the rows, a tenth held out, and the labels of both."""
    return train_test_split(rows, labels, test_size=0.1, random_state=seed, stratify=labels)


def train_probe(x, labels, probe, class_weight):
    """Fits embeddings x (N, E) to labels, prints a row of the table -> the arrays of the probe."""
    x_train, x_test, y_train, y_test = split(x, labels)
    fit = LogisticRegression(C=inverse_penalty, max_iter=max_iter, class_weight=class_weight)
    p = fit.fit(x_train, y_train).predict_proba(x_test)
    guess, classes, binary = fit.classes_[p.argmax(1)], fit.classes_.tolist(), len(fit.classes_) == 2
    accuracy, f1 = accuracy_score(y_test, guess), f1_score(y_test, guess, average="macro")
    auc = roc_auc_score(y_test, p[:, 1] if binary else p, multi_class="ovr")
    print(f"{probe:16}{', '.join(classes):36}{len(labels):8}{accuracy:10.3f}{f1:8.3f}{auc:8.3f}")
    coef, intercept = fit.coef_.astype(np.float32), fit.intercept_.astype(np.float32)
    if binary:  # scikit-learn keeps one row, the logit of the second; softmax([0, logit]) is the same probe
        coef, intercept = np.vstack((np.zeros_like(coef), coef)), np.append(np.float32(0), intercept)
    arrays = {"classes": np.array(classes), "coef": coef, "intercept": intercept}
    return arrays | {"accuracy": accuracy, "f1": f1, "auc": auc, "rows": len(labels)}


def train_judge(texts, labels, class_weight):
    """Fits words and pairs of words to nine tenths of the rows, and writes plain arrays."""
    known, unseen, y_known, y_unseen = split(texts, labels)
    features = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=3, max_features=50_000)
    fit = LogisticRegression(C=10, max_iter=max_iter, class_weight=class_weight)
    fit.fit(features.fit_transform(known), y_known)
    arrays = {
        "classes": fit.classes_,
        "words": np.frombuffer("\n".join(features.get_feature_names_out()).encode(), dtype=np.uint8),
        "idf": features.idf_.astype(np.float16),
        "coef": fit.coef_.astype(np.float16),
        "intercept": fit.intercept_,
        "accuracy": fit.score(features.transform(unseen), y_unseen),
        "rows": len(labels),
    }
    write_file(judge, partial(np.savez_compressed, **arrays))
    print(f"{judge}: {', '.join(fit.classes_)}; accuracy {arrays['accuracy']:.3f} on {len(unseen)} rows")


def read_labelled(source):
    """A file, or the name of one of the SOURCES -> texts and labels, two lists of strings."""
    paths, names = [source], None
    if source in SOURCES and not os.path.exists(source):
        repos, names = SOURCES[source]
        paths = [hub_file(repo, "train.jsonl", repo_type="dataset") for repo in repos]
    else:
        known = source.endswith((".jsonl", ".jsonl.gz"))
        check(known, f"--data: {source} is not .jsonl or {', '.join(SOURCES)}")
    rows = [row for path in paths for row in read_rows(path, "text", "label") if row["text"].strip()]
    texts = [row["text"].encode("utf-8", "replace").decode() for row in rows]
    labels = [names[row["label"]] if names else str(row["label"]).strip() for row in rows]
    counts = Counter(labels)
    check(
        len(counts) > 1, f"{source}: a probe needs two labels or more; found: {', '.join(counts) or 'none'}"
    )
    for label, count in counts.items():
        check(count >= 10, f"{source}: only {count} rows with the label {label!r}; at least 10 are needed")
        allowed = label != "none" and not set(label) & set(",:=")
        check(allowed, f"{source}: {label!r} cannot be a label: nor can what has , : or = in it")
    return texts, labels


if __name__ == "__main__":
    run(main, globals())
