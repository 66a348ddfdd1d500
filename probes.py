"""Stage 3: train a probe, a logistic regression on embeddings, for each attribute that should steer.

    python probes.py --data mine.jsonl                          JSON lines with text and label
    python probes.py --data sentiment --out_dir out/c4          the paper's attributes,
    python probes.py --data toxicity,topic --out_dir out/c4     from the hub
    python probes.py --data other.jsonl --judge judge.npz       not a probe, but a judge for eval.py

Writes OUT_DIR/probes/NAME.npz; then `python sample.py --guide LABEL` steers towards any of its labels, and no
other weight changes. Accuracy, F1 and AUC are measured on a tenth of the rows, held out. A judge works on the
words of a text (TF-IDF). Its rows must not be rows of the probes that it will judge.
"""

from plumbing.config import check, check_positive, run

import os
from collections import Counter
from functools import partial

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from plumbing.files import (
    check_writable,
    hub_file,
    is_shipped,
    load_weights,
    newest_model,
    read_rows,
    write_file,
)
from plumbing.judges import fit_judge
from plumbing.text import Encoder, clean

data = ""  # JSON-lines files (text, label), or sentiment, toxicity, topic; several with commas
name = ""  # name of the probe; default the file's name
judge = ""  # fit a judge instead, and write it to this .npz file
out_dir = ""  # the model's folder; default the newest in out/, else pretrained/reviews
encoder = ""  # a sentence-transformers name or folder; default the model's
inverse_penalty = 1000.0  # scikit-learn's C; with a few thousand rows 1 overfits less
max_iter = 10_000  # iterations of lbfgs
weight = 15.0  # guidance weight of its classes if none is given: higher is surer and less fluent
balanced = False  # weight classes equally, whatever their sizes; always so for the hub's toxicity
device = "auto"  # auto, cpu, cuda, cuda:1, mps
seed = 1337  # fixes everything

SOURCES = {  # the paper's attributes: files of the hub, and what their labels 0, 1, ... mean
    "sentiment": (("SetFit/sst2", "SetFit/amazon_polarity"), ("negative", "positive")),
    "toxicity": (("SetFit/toxic_conversations",), ("nontoxic", "toxic")),
    "topic": (("SetFit/ag_news",), ("world", "sports", "business", "sci-tech")),
}


def main(settings):
    check(data, "say --data: JSON lines with text and label, or " + ", ".join(SOURCES))
    check_positive(settings, "weight", "inverse_penalty", "max_iter")
    sources = data.split(",")
    check(len(sources) == 1 or not (name or judge), "--name and --judge are for a single source of data")
    check(not judge or judge.endswith(".npz"), f"--judge {judge}: must end in .npz")
    own = os.path.basename(os.path.dirname(os.path.abspath(judge))) != "probes"
    check(not judge or own, f"--judge {judge}: folders called probes hold probes: choose another")
    check_writable(judge or ".npz")
    folder = out_dir or newest_model()
    names = [name or os.path.basename(source).split(".")[0] for source in sources]
    paths = [] if judge else [probe_path(folder, probe) for probe in names]
    check(len(set(paths)) == len(paths), f"two probes named {', '.join(names)}: say --name, one at a time")
    labelled = [read_labelled(source) for source in sources]  # all of them, so that mistakes come up at once
    if judge:
        return train_judge(*labelled[0])
    encoder_name = choose_encoder(folder)
    print(f"for the model {folder}")
    encode = Encoder(encoder_name, device)
    os.makedirs(f"{folder}/probes", exist_ok=True)
    print(f"{'probe':16}{'classes':36}{'rows':>8}{'accuracy':>10}{'F1':>8}{'AUC':>8}")
    for source, probe, path, (texts, labels) in zip(sources, names, paths, labelled):
        chunks = [texts[i : i + 1024] for i in range(0, len(texts), 1024)]
        e = np.concatenate([encode(chunk) for chunk in tqdm(chunks, f"embed {source}", leave=False)])
        arrays = train_probe(e, texts, labels, probe, balanced or source == "toxicity")
        if truncated := sum(encode.count_truncated(chunk) for chunk in chunks):
            print(f"  {truncated} of its texts are longer than the encoder reads: their ends do not count")
        write_file(path, partial(np.savez, **arrays, encoder=encoder_name, weight=weight))


def probe_path(folder, probe):
    """Where the probe goes. Raises InputError if --guide could not name it, or if it came with the model."""
    path = f"{folder}/probes/{probe}.npz"
    check(probe and probe[0] != "." and not set(probe) & set(",:=/\\"), f"--name {probe!r}: not a name")
    shipped = is_shipped(folder) and os.path.exists(path)
    check(not shipped, f"{path} belongs to a shipped model: give your probe another --name")
    return path


def choose_encoder(folder):
    """The model's encoder, or the one asked for. Raises InputError if they differ."""
    if encoder and not os.path.exists(f"{folder}/decoder.safetensors"):
        return encoder
    ours = load_weights(folder, "decoder")[0]["data"]["encoder"]
    same = os.path.basename(encoder or ours) == os.path.basename(ours)
    check(same, f"--encoder {encoder}: the model in {folder} has the encoder {ours}, and needs probes of it")
    return encoder or ours


def first_labels(texts, labels):
    """-> {text: its first label} of the distinct texts."""
    return dict(zip(reversed(texts), reversed(labels)))


def hold_out(texts, labels):
    """-> which rows are held out (N,): those of a tenth of the distinct texts."""
    first = first_labels(texts, labels)
    _, unseen = train_test_split(list(first), test_size=0.1, random_state=seed, stratify=list(first.values()))
    unseen = set(unseen)
    return np.array([text in unseen for text in texts])


def train_probe(e, texts, labels, probe, balanced):
    """Fits embeddings e (N, E) of texts to labels, prints a row of the table -> the arrays of the probe."""
    held_out, labels = hold_out(texts, labels), np.array(labels)
    e_train, e_test, y_train, y_test = e[~held_out], e[held_out], labels[~held_out], labels[held_out]
    class_weight = "balanced" if balanced else None
    fit = LogisticRegression(C=inverse_penalty, max_iter=max_iter, class_weight=class_weight)
    p = fit.fit(e_train, y_train).predict_proba(e_test)
    guess, classes, binary = fit.classes_[p.argmax(1)], fit.classes_.tolist(), len(fit.classes_) == 2
    accuracy, f1 = accuracy_score(y_test, guess), f1_score(y_test, guess, average="macro")
    auc = roc_auc_score(y_test, p[:, 1] if binary else p, multi_class="ovr")
    print(f"{probe:16}{', '.join(classes):36}{len(labels):8}{accuracy:10.3f}{f1:8.3f}{auc:8.3f}")
    coef, intercept = fit.coef_.astype(np.float32), fit.intercept_.astype(np.float32)
    if binary:  # scikit-learn keeps one row, the logit of the second; softmax([0, logit]) is the same probe
        coef, intercept = np.vstack((np.zeros_like(coef), coef)), np.append(np.float32(0), intercept)
    arrays = {"classes": np.array(classes), "coef": coef, "intercept": intercept}
    return arrays | {"accuracy": accuracy, "f1": f1, "auc": auc, "rows": len(labels)}


def train_judge(texts, labels):
    """Fits a judge to nine tenths of the rows, and prints how often it is right on the rest."""
    held_out, texts, labels = hold_out(texts, labels), np.array(texts, dtype=object), np.array(labels)
    known, unseen, y_known, y_unseen = texts[~held_out], texts[held_out], labels[~held_out], labels[held_out]
    options = {"max_iter": max_iter, "class_weight": "balanced" if balanced else None}
    accuracy = fit_judge(judge, known, y_known, unseen, y_unseen, **options)
    print(f"{judge}: {', '.join(sorted(set(labels)))}; accuracy {accuracy:.3f} on {len(unseen)} rows")


def read_labelled(source):
    """A file, or the name of one of the SOURCES -> texts and labels, two lists of strings."""
    paths, names = [source], None
    if source in SOURCES and not os.path.exists(source):
        repos, names = SOURCES[source]
        paths = [hub_file(repo, "train.jsonl", repo_type="dataset") for repo in repos]
    else:
        known = source.lower().endswith((".jsonl", ".jsonl.gz"))
        check(known, f"--data: {source} is not .jsonl or {', '.join(SOURCES)}")
    rows = [row for path in paths for row in read_rows(path, "text", "label") if row["text"].strip()]
    texts = [clean(row["text"]) for row in rows]
    labels = [names[row["label"]] if names else label_name(row["label"]) for row in rows]
    counts = Counter(first_labels(texts, labels).values())
    found = ", ".join(counts) or "none"
    check(len(counts) > 1, f"{source}: a probe needs two labels or more; found: {found}")
    for label, count in counts.items():
        check(count >= 10, f"{source}: only {count} texts with the label {label!r}; at least 10 are needed")
        allowed = label not in ("", "none", "nan") and not set(label) & set(",:=")
        check(allowed, f"{source}: {label!r} cannot be a label: rename it, without , : or =")
    return texts, labels


def label_name(label):
    """1 and 1.0, as pandas writes whole numbers beside missing ones, are both `1`."""
    whole = isinstance(label, float) and label.is_integer()
    return str(int(label) if whole else label).strip()


if __name__ == "__main__":
    run(main, globals())
