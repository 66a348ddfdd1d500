"""Labelled text, for probes, judges and steering vectors."""

import os
from collections import Counter

from plumbing.config import check
from plumbing.files import hub_file, read_rows
from plumbing.text import clean

SOURCES = {  # the paper's attributes: files of the hub, and what their labels 0, 1, ... mean
    "sentiment": (("SetFit/sst2", "SetFit/amazon_polarity"), ("negative", "positive")),
    "toxicity": (("SetFit/toxic_conversations",), ("nontoxic", "toxic")),
    "topic": (("SetFit/ag_news",), ("world", "sports", "business", "sci-tech")),
}


def read_labelled(source):
    """A file, or the name of one of the SOURCES -> distinct texts and their labels, two lists of strings."""
    paths, names = [source], None
    if source in SOURCES and not os.path.exists(source):
        repos, names = SOURCES[source]
        paths = [hub_file(repo, "train.jsonl", repo_type="dataset") for repo in repos]
    else:
        known = source.lower().endswith((".jsonl", ".jsonl.gz"))
        check(known, f"{source} is not .jsonl or {', '.join(SOURCES)}")
    labels = {}  # of each text once: its first
    for row in (row for path in paths for row in read_rows(path, "text", "label") if row["text"].strip()):
        label = names[row["label"]] if names else row["label"]
        whole = isinstance(label, float) and label.is_integer()  # pandas may write 1 as 1.0
        label = str(int(label) if whole else label).strip()
        labels.setdefault(clean(row["text"]), label)
    counts = Counter(labels.values())
    found = ", ".join(counts) or "none"
    check(len(counts) > 1, f"{source}: two labels or more are needed; found: {found}")
    for label, count in counts.items():
        check(count >= 10, f"{source}: only {count} texts with the label {label!r}; at least 10 are needed")
        allowed = label not in ("", "none", "nan") and not set(label) & set(",:=")
        check(allowed, f"{source}: {label!r} cannot be a label: rename it, without , : or =")
    return list(labels), list(labels.values())
