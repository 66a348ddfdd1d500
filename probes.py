"""Stage 3: train a probe, a logistic regression on embeddings, for each attribute that should steer.

    python probes.py --data mine.jsonl                          JSON lines with text and label
    python probes.py --data sentiment --out_dir out/c4          the paper's attributes,
    python probes.py --data toxicity,topic --out_dir out/c4     from the hub
    python probes.py --data other.jsonl --judge judge.npz       not a probe, but a judge for eval.py

Writes OUT_DIR/probes/NAME.npz; then `python sample.py --guide LABEL` steers towards any of its labels, and no
other weight changes. Accuracy, F1 and AUC are measured on a tenth of the rows, held out.

How hard to steer is found from what the model writes, so both trainings come first: see `find_weights`.

A judge works on the words of a text (TF-IDF). Its rows must not be rows of the probes that it will judge.
"""

import os
from collections import Counter
from functools import partial

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from model import DGLM, Probe
from plumbing.config import check, check_positive, run
from plumbing.files import check_writable, is_shipped, newest_model, write_file
from plumbing.judges import fit_judge
from plumbing.labelled import SOURCES, read_labelled

data = ""  # JSON-lines files (text, label), or sentiment, toxicity, topic; several with commas
name = ""  # name of the probe; default the file's name
judge = ""  # fit a judge instead, and write it to this .npz file
out_dir = ""  # the model's folder; default the newest in out/, else pretrained/reviews
inverse_penalty = 0.0  # scikit-learn's C; the paper's is 1000; 0: 300 / rows, smoother, which steers better
max_iter = 10_000  # iterations of lbfgs
weight = 0.0  # guidance weight of its classes: higher is surer, less fluent; 0: found for each
balanced = False  # weight classes equally, whatever their sizes; always so for the hub's toxicity
device = "auto"  # auto, cpu, cuda, cuda:1, mps
seed = 1337  # fixes everything

WEIGHTS = (20, 40, 80, 160)  # to try; above, texts become alike


def main(settings):
    check(data, "say --data: JSON lines with text and label, or " + ", ".join(SOURCES))
    check_positive(settings, "max_iter")
    for key in ("weight", "inverse_penalty"):
        check(0 <= settings[key] < np.inf, f"{key}={settings[key]}: must be 0, or above 0")
    sources = data.split(",")
    check(len(sources) == 1 or not (name or judge), "--name and --judge are for a single source of data")
    if judge:
        check(judge.endswith(".npz"), f"--judge {judge}: must end in .npz")
        check_writable(judge)
        return train_judge(*read_labelled(data))
    folder = out_dir or newest_model()
    names = [name or os.path.basename(source).split(".")[0] for source in sources]
    paths = [f"{folder}/probes/{probe}.npz" for probe in names]
    for probe, path in zip(names, paths):
        check(probe and probe[0] != "." and not set(probe) & set(",:=/\\"), f"--name {probe!r}: not a name")
        shipped = is_shipped(folder) and os.path.exists(path)
        check(not shipped, f"{path} belongs to a shipped model: give your probe another --name")
    check(len(set(paths)) == len(paths), f"two probes named {', '.join(names)}: say --name, one at a time")
    labelled = [read_labelled(source) for source in sources]  # all of them, so that mistakes come up at once
    check(os.path.isdir(folder), f"--out_dir {folder}: there is no such folder; probes go into a model's")
    model = DGLM(folder, device, with_probes=False)
    print(f"for the model {folder}")
    os.makedirs(f"{folder}/probes", exist_ok=True)
    for source, probe, path, (texts, labels) in zip(sources, names, paths, labelled):
        counts = Counter(labels)
        print(f"\n{probe}: " + ", ".join(f"{counts[label]} {label}" for label in sorted(counts)))
        arrays = train_probe(model, texts, labels, balanced or source == "toxicity")
        write_file(path, partial(np.savez, **arrays, encoder=model.data["encoder"]))


def divide(rows, labels, share):
    """Splits rows at random; the second part has `share` of each class -> rows, rows, labels, labels."""
    return train_test_split(rows, np.array(labels), test_size=share, random_state=seed, stratify=labels)


def fit(e, labels, balance, surer=1):
    """Fits a logistic regression to unit embeddings e (N, E) -> a Probe. surer: times the inverse penalty."""
    penalty = (inverse_penalty or 300 / len(e)) * surer
    class_weight = "balanced" if balance else None
    found = LogisticRegression(C=penalty, max_iter=max_iter, class_weight=class_weight).fit(e, labels)
    coef, intercept = torch.tensor(found.coef_).float(), torch.tensor(found.intercept_).float()
    if len(coef) == 1:  # scikit-learn keeps the logit of the second class; softmax([0, logit]) is the same
        coef, intercept = (torch.cat((torch.zeros_like(w), w)) for w in (coef, intercept))
    return Probe("probe", found.classes_.tolist(), coef, intercept, encoder="", weight=[])


def train_probe(model, texts, labels, balance):
    """Fits a probe to nine tenths of the rows, and prints how good it is on the rest -> its arrays."""
    chunks = [texts[i : i + 1024] for i in range(0, len(texts), 1024)]
    e = torch.cat([model.encode(chunk).cpu() for chunk in tqdm(chunks, "embed", leave=False)]).numpy()
    if truncated := sum(map(model.encoder.count_truncated, chunks)):
        print(f"  {truncated} of its texts are longer than the encoder reads: their ends do not count")
    e_known, e_unseen, y_known, y_unseen = divide(e, labels, 0.1)
    probe = fit(e_known, y_known, balance)
    p = probe.log_prob(torch.tensor(e_unseen)).exp().numpy()
    guess = np.array(probe.classes)[p.argmax(1)]
    accuracy, f1 = accuracy_score(y_unseen, guess), f1_score(y_unseen, guess, average="macro")
    auc = roc_auc_score(y_unseen, p[:, 1] if p.shape[1] == 2 else p, multi_class="ovr")
    print(f"  on {len(guess)} rows held out: accuracy {accuracy:.3f}, F1 {f1:.3f}, AUC {auc:.3f}")
    if len(guess) < 10 * p.shape[1]:
        print("  so few rows say little about the probe, and with more it would steer better")
    if auc < 0.75:
        print("  the encoder hardly tells these classes apart: expect little control")
    weights = [weight] * p.shape[1] if weight else find_weights(model, e, texts, labels, balance)
    arrays = {"classes": probe.classes, "coef": probe.coef.numpy(), "intercept": probe.intercept.numpy()}
    return arrays | {"weight": weights, "accuracy": accuracy, "f1": f1, "auc": auc, "rows": len(labels)}


def find_weights(model, e, texts, labels, balance):
    """-> for each class the one of WEIGHTS whose texts have the highest p(class).

    Half of the rows fits a probe that guides, the other half one that judges. For each weight the model
    writes 48 texts in the default way: 12 prefixes, beginnings of the rows, are continued 4 times.
    """
    e_guiding, e_judging, y_guiding, y_judging = divide(e, labels, 0.5)
    surer = 1.8 if inverse_penalty else 1  # as strong a penalty on half of the rows as on nine tenths
    guiding, judging = fit(e_guiding, y_guiding, balance, surer), fit(e_judging, y_judging, True, surer=10)
    guiding.coef, guiding.intercept = guiding.coef.to(model.device), guiding.intercept.to(model.device)
    model.probes, found = [guiding], []
    begins = [" ".join(texts[i * len(texts) // 12].split()[:3]) for i in range(12)]
    prefixes = model.tokenizer.texts(model.tokenizer.encode_ordinary(begin)[:8] for begin in begins)
    print(f"  {'class':16}{'weight':>8}{'p(class)':>10}   cosine of proposals for the same prefix")
    for at, label in enumerate(guiding.classes):
        p_at = {}
        for w in tqdm((0, *WEIGHTS), label, leave=False):
            pairs = model.generate(prefixes, f"{label}:{w}", 4, model.proposal_tokens, seed)
            written, proposals = zip(*pairs)
            p_at[w] = judging.log_prob(model.encode(list(written)).cpu())[:, at].exp().mean().item()
            groups = torch.stack(proposals).view(12, 4, -1)
            cosine = ((groups @ groups.mT).sum((1, 2)).mean().item() - 4) / 12  # of 12 pairs in a group
            tqdm.write(f"  {label:16}{w:8}{p_at[w]:10.2f}{cosine:9.2f}")
            if w and p_at[w] > 0.95:
                break
        best = max(list(p_at)[1:], key=p_at.get)
        found.append(float(best))
        print(f"  {label}: weight {best}")
        if p_at[best] < 0.5:
            print(f"  even the best guide seldom makes a text {label}")
    return found


def train_judge(texts, labels):
    """Fits a judge to nine tenths of the rows, and prints how often it is right on the rest."""
    known, unseen, y_known, y_unseen = divide(texts, labels, 0.1)
    options = {"max_iter": max_iter, "class_weight": "balanced" if balanced else None}
    accuracy = fit_judge(judge, known, y_known, unseen, y_unseen, **options)
    print(f"{judge}: {', '.join(sorted(set(labels)))}; accuracy {accuracy:.3f} on {len(unseen)} rows")


if __name__ == "__main__":
    run(main, globals())
