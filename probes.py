"""Stage 3: train a probe, a logistic regression on embeddings, for each attribute that should steer.

    python probes.py --data mine.jsonl                          JSON lines with text and label
    python probes.py --data sentiment --out_dir out/c4          the paper's attributes, from
    python probes.py --data toxicity,topic --out_dir out/c4     the hub

Writes OUT_DIR/probes/NAME.npz; then `python sample.py --guide LABEL` steers towards any of its labels.
Nothing else is trained again. The accuracy, F1 and AUC are of a tenth of the rows, which the probe did not
see.
"""

import io
import os
import sys
from collections import Counter

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from configurator import (
    CHECKPOINT_FORMAT,
    check,
    hub_file,
    newest_model,
    pick_device,
    read_json_lines,
    read_own_json,
    run,
    write_file,
)
from model import load_encoder

data = ""  # JSON-lines files (text, label), or sentiment, toxicity, topic; several with commas
name = ""  # of the probe; default the file's name
out_dir = ""  # the model's folder; default the newest in out/
encoder = ""  # default the model's; a sentence-transformers name or folder
inverse_penalty = 1000.0  # scikit-learn's C
max_iter = 10_000  # of lbfgs
weight = 15.0  # of a guide towards its classes that gives none: higher is surer and less fluent
balanced = False  # weigh the classes alike, however many rows they have; toxicity always is
device = "auto"  # auto, cpu, cuda, cuda:1, mps
seed = 1337  # fixes everything

SOURCES = {  # the paper's attributes: files of the hub, and what their labels 0, 1, ... mean
    "sentiment": (("SetFit/sst2", "SetFit/amazon_polarity"), ("negative", "positive")),
    "toxicity": (("SetFit/toxic_conversations",), ("nontoxic", "toxic")),
    "topic": (("SetFit/ag_news",), ("world", "sports", "business", "sci-tech")),
}


def read_labelled(source):
    """A file, or the name of one of the SOURCES -> texts and labels, two lists of strings. Raises
    InputError.
    """
    if source in SOURCES and not os.path.exists(source):
        repos, names = SOURCES[source]
        paths = [hub_file(repo, "train.jsonl", repo_type="dataset") for repo in repos]
    else:
        check(
            source.endswith((".jsonl", ".jsonl.gz")),
            f"--data {source}: not .jsonl, .jsonl.gz, {', '.join(SOURCES)}",
        )
        paths, names = [source], None
    texts, labels = [], []
    for path in paths:
        for number, row in enumerate(read_json_lines(path), 1):
            text, label = row.get("text"), row.get("label")
            check(isinstance(text, str), f'{path}, row {number}: no field "text" with a string')
            check(
                isinstance(label, str | int),
                f'{path}, row {number}: no field "label" with a string or a number',
            )
            if names:
                check(
                    label in range(len(names)),
                    f"{path}, row {number}: the label {label!r} is not 0 to {len(names) - 1}",
                )
                label = names[label]
            if text.strip():
                texts.append(text.encode("utf-8", "replace").decode())
                labels.append(str(label).strip())
    check(texts, f"{source} holds no labelled text")
    counts = Counter(labels)
    check(len(counts) > 1, f"{source}: the only label is {labels[0]!r}; a probe needs two or more")
    for label, count in counts.items():
        check(
            label and not set(label) & set(",:=") and label != "none",
            f"{source}: {label!r} cannot be a label: none is not, nor what has , : or = in it",
        )
        check(count >= 10, f"{source}: only {count} rows with the label {label!r}; at least 10 are needed")
    return texts, labels


def main(settings):
    check(data, "say --data: JSON lines with text and label, or " + ", ".join(SOURCES))
    for key in ("inverse_penalty", "max_iter", "weight"):
        check(0 < settings[key] < float("inf"), f"{key}={settings[key]}: must be above 0")
    sources = data.split(",")
    check(len(sources) == 1 or not name, "--name is for a single source of data")
    check(os.path.basename(name) == name, f"--name {name}: must be a name, not a path")
    names = [name or os.path.basename(source).split(".")[0] for source in sources]
    check(len(set(names)) == len(names), f"--data {data}: two would make one probe, as they have one name")
    folder = out_dir or newest_model()
    check(os.path.isdir(folder), f"there is no folder {folder}: give --out_dir, the folder of a model")
    model = f"{folder}/decoder.json"
    own = read_own_json(model, CHECKPOINT_FORMAT)["data"]["encoder"] if os.path.exists(model) else ""
    encoder_name = encoder or own
    check(encoder_name, f"{folder} holds no model: say --encoder")
    labelled = [(source, *read_labelled(source)) for source in sources]
    print(f"for the model {folder}", file=sys.stderr)
    encode = load_encoder(encoder_name, pick_device(device))
    os.makedirs(f"{folder}/probes", exist_ok=True)
    print(f"{'probe':16}{'classes':36}{'rows':>8}{'accuracy':>10}{'F1':>8}{'AUC':>8}")
    for label, (source, texts, labels) in zip(names, labelled):
        chunks = [texts[i : i + 1024] for i in range(0, len(texts), 1024)]
        x = np.concatenate([encode(chunk) for chunk in tqdm(chunks, desc=f"embed {source}", leave=False)])
        train_probe(
            x, labels, label, f"{folder}/probes/{label}.npz", encoder_name, balanced or source == "toxicity"
        )


def train_probe(x, labels, label, path, encoder_name, balance):
    """Fits embeddings x (N, E) to labels, prints a row of the table, writes the probe."""
    x_train, x_test, y_train, y_test = train_test_split(
        x, labels, test_size=0.1, random_state=seed, stratify=labels
    )
    weights = "balanced" if balance else None
    fit = LogisticRegression(C=inverse_penalty, max_iter=max_iter, class_weight=weights).fit(x_train, y_train)
    p = fit.predict_proba(x_test)
    guess, classes = fit.classes_[p.argmax(1)], list(fit.classes_)
    binary = len(classes) == 2
    accuracy, f1 = accuracy_score(y_test, guess), f1_score(y_test, guess, average="macro")
    one_score = p[:, 1] if binary else p
    auc = roc_auc_score(y_test, one_score, multi_class="ovr")
    print(f"{label:16}{', '.join(classes):36}{len(labels):8}{accuracy:10.3f}{f1:8.3f}{auc:8.3f}")
    # two classes: scikit-learn keeps one row, the logit of the second; softmax([0, logit]) is the same probe
    coef = np.vstack((np.zeros_like(fit.coef_), fit.coef_)) if binary else fit.coef_
    intercept = np.append(np.zeros_like(fit.intercept_), fit.intercept_) if binary else fit.intercept_
    out = io.BytesIO()
    np.savez(
        out,
        classes=np.array(classes),
        coef=coef.astype(np.float32),
        intercept=intercept.astype(np.float32),
        encoder=np.array(encoder_name),
        weight=weight,
        accuracy=accuracy,
        f1=f1,
        auc=auc,
        rows=len(labels),
    )
    write_file(path, out.getvalue())


if __name__ == "__main__":
    run(main, globals())
