"""Stage 3: train a probe, a logistic regression on embeddings, for each attribute that should steer.

    python probes.py --data mine.jsonl                          JSON lines with text and label
    python probes.py --data sentiment --out_dir out/c4          the paper's attributes,
    python probes.py --data toxicity,topic --out_dir out/c4     from the hub

Writes OUT_DIR/probes/NAME.npz; then `python sample.py --guide LABEL` steers towards any of its labels, and no
other weight changes. Accuracy, F1 and AUC are measured on a tenth of the rows, held out.

How hard to steer is found from what the model writes, so both trainings come first: see `find_weights`.
"""

import os
import sys
from collections import Counter

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from model import DGLM, Probe
from plumbing.config import run
from plumbing.errors import check
from plumbing.files import is_shipped, pick_model
from plumbing.labelled import SOURCES, read_labelled

data = ""  # JSON-lines files (text, label), or sentiment, toxicity, topic; several with commas
name = ""  # name of the probe; default the file's name
out_dir = ""  # the model's folder; default pretrained/english
inverse_penalty = 0.0  # scikit-learn's C; 0: 300 / rows, which steers better; the paper: 1000 [at least 0]
max_iter = 10_000  # iterations of lbfgs [at least 1]
weight = 0.0  # guidance weight of its classes: higher is surer, less fluent; 0: found for each [at least 0]
balanced = False  # weight classes equally, whatever their sizes; always so for the hub's toxicity
device = "auto"  # auto, cpu, cuda, cuda:1, mps
seed = 1337  # fixes everything

WEIGHTS = (20, 40, 80, 160)  # to try; above, texts become alike
SHIPPED = ("sentiment", "topic", "toxicity", "emotion")  # the probes of the shipped models


def main(settings):
    check(data, "say --data: JSON lines with text and label, or " + ", ".join(SOURCES))
    sources = data.split(",")
    check(len(sources) == 1 or not name, "--name is for a single source of data")
    folder, which = pick_model(out_dir)
    names = [name or os.path.basename(source).split(".")[0] for source in sources]
    for probe in names:
        fits = probe and probe[0] != "." and not set(probe) & set(",:=/\\")
        check(fits, f"--name {probe!r}: not a name")
        shipped = is_shipped(folder) and probe in SHIPPED
        check(not shipped, f"{folder} is a shipped model with a probe {probe}: give yours another --name")
    check(len(set(names)) == len(names), f"two probes named {', '.join(names)}: say --name, one at a time")
    labelled = [read_labelled(source) for source in sources]  # all of them, so that mistakes come up at once
    check(os.path.isdir(folder), f"--out_dir {folder}: there is no such folder; probes go into a model's")

    model = DGLM(folder, device, with_probes=False)
    print(which, file=sys.stderr)
    os.makedirs(f"{folder}/probes", exist_ok=True)
    for source, probe_name, (texts, labels) in zip(sources, names, labelled):
        counts = Counter(labels)
        print(f"\n{probe_name}: " + ", ".join(f"{counts[label]} {label}" for label in sorted(counts)))
        probe, figures = train_probe(model, texts, labels, balance=balanced or source == "toxicity")
        probe.save(f"{folder}/probes/{probe_name}.npz", **figures)


def train_probe(model, texts, labels, balance):
    """Fits a probe to nine tenths of the rows -> the probe, and how good it is on the rest, printed too."""
    chunks = [texts[start : start + 1024] for start in range(0, len(texts), 1024)]
    e = torch.cat([model.encode(chunk).cpu() for chunk in tqdm(chunks, "embed", leave=False)]).numpy()
    truncated = sum(model.encoder.count_truncated(chunk) for chunk in chunks)
    if truncated:
        print(f"  {truncated} of its texts are longer than the encoder reads: their ends do not count")

    e_known, e_unseen, y_known, y_unseen = divide(e, labels, 0.1)
    probe = fit(e_known, y_known, balance)
    p = probe.log_prob(torch.tensor(e_unseen)).exp().numpy()
    guess = np.array(probe.classes)[p.argmax(1)]
    figures = {
        "accuracy": accuracy_score(y_unseen, guess),
        "f1": f1_score(y_unseen, guess, average="macro"),
        "auc": roc_auc_score(y_unseen, p[:, 1] if p.shape[1] == 2 else p, multi_class="ovr"),
        "rows": len(labels),
    }
    shown = "accuracy {accuracy:.3f}, F1 {f1:.3f}, AUC {auc:.3f}".format(**figures)
    print(f"  on {len(guess)} rows held out: {shown}")
    if len(guess) < 10 * p.shape[1]:
        print("  so few rows say little about the probe, and with more it would steer better")
    if figures["auc"] < 0.75:
        print("  the encoder hardly tells these classes apart: expect little control")

    probe.encoder = model.info["encoder"]
    if weight:
        probe.guidance_weights = [weight for _ in probe.classes]
    else:
        probe.guidance_weights = find_weights(model, e, texts, labels, balance)
    return probe, figures


def divide(rows, labels, share):
    """Splits rows at random; the second part has `share` of each class -> rows, rows, labels, labels."""
    return train_test_split(rows, np.array(labels), test_size=share, random_state=seed, stratify=labels)


def fit(e, labels, balance, surer=1):
    """Fits a logistic regression to unit embeddings e (N, E) -> a Probe. surer: times its inverse penalty."""
    C = (inverse_penalty or 300 / len(e)) * surer
    class_weight = "balanced" if balance else None
    found = LogisticRegression(C=C, max_iter=max_iter, class_weight=class_weight).fit(e, labels)
    coef = torch.tensor(found.coef_).float()
    intercept = torch.tensor(found.intercept_).float()
    if len(coef) == 1:  # scikit-learn keeps the logit of the second class; softmax([0, logit]) is the same
        coef = torch.cat((torch.zeros_like(coef), coef))
        intercept = torch.cat((torch.zeros_like(intercept), intercept))
    return Probe("probe", found.classes_.tolist(), coef, intercept, encoder="", guidance_weights=[])


def find_weights(model, e, texts, labels, balance):
    """-> for each class the one of WEIGHTS whose texts have the highest p(class).

    Half of the rows fits a probe that guides, the other half one that judges. For each weight the model
    writes 48 texts in the default way: 12 prefixes, beginnings of the rows, are continued 4 times.
    """
    e_guiding, e_judging, y_guiding, y_judging = divide(e, labels, 0.5)
    surer = 1.8 if inverse_penalty else 1  # as strong a penalty on half of the rows as on nine tenths
    guiding = fit(e_guiding, y_guiding, balance, surer)
    guiding.coef = guiding.coef.to(model.device)
    guiding.intercept = guiding.intercept.to(model.device)
    judging = fit(e_judging, y_judging, balance=True, surer=10)
    model.probes = [guiding]

    begins = [" ".join(texts[i * len(texts) // 12].split()[:3]) for i in range(12)]
    prefixes = model.tokenizer.texts(model.tokenizer.encode_ordinary(begin)[:8] for begin in begins)
    print(f"  {'class':16}{'weight':>8}{'p(class)':>10}   cosine of proposals for the same prefix")
    best_weights = []
    for index, label in enumerate(guiding.classes):
        p_at = {}
        for w in tqdm((0, *WEIGHTS), label, leave=False):
            texts_and_proposals = model.generate(prefixes, f"{label}:{w}", 4, model.proposal_tokens, seed)
            written, proposals = zip(*texts_and_proposals)
            p = judging.log_prob(model.encode(list(written)).cpu())[:, index].exp()
            p_at[w] = p.mean().item()
            groups = torch.stack(proposals).view(12, 4, -1)
            cosines = groups @ groups.mT  # (12, 4, 4)
            cosine = cosines[:, ~torch.eye(4, dtype=torch.bool)].mean().item()  # of different texts
            tqdm.write(f"  {label:16}{w:8}{p_at[w]:10.2f}{cosine:9.2f}")
            if w and p_at[w] > 0.95:
                break
        best = max((w for w in p_at if w), key=p_at.get)
        best_weights.append(float(best))
        print(f"  {label}: weight {best}")
        if p_at[best] < 0.5:
            print(f"  even the best guide seldom makes a text {label}")
    return best_weights


if __name__ == "__main__":
    run(main, globals())
