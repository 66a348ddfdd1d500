"""Labelled text, for probes, judges and steering vectors."""

import os
from collections import Counter

from plumbing.errors import check
from plumbing.files import hub_file, read_rows
from plumbing.text import clean

SOURCES = {  # the paper's attributes: files of the hub, and what their labels 0, 1, ... mean
    "sentiment": (("SetFit/sst2", "SetFit/amazon_polarity"), ("negative", "positive")),
    "toxicity": (("SetFit/toxic_conversations",), ("nontoxic", "toxic")),
    "topic": (("SetFit/ag_news",), ("world", "sports", "business", "sci-tech")),
}


def read_labelled(source):
    """A file, or the name of one of the SOURCES -> distinct texts and their labels, two lists of strings.

    A text that occurs more than once keeps its first label. Raises InputError.
    """
    if source in SOURCES and not os.path.exists(source):
        repos, names = SOURCES[source]
        paths = [hub_file(repo, "train.jsonl", repo_type="dataset") for repo in repos]
    else:
        supported = source.lower().endswith((".jsonl", ".jsonl.gz"))
        check(supported, f"{source} is not .jsonl or {', '.join(SOURCES)}")
        names = None
        paths = [source]

    label_of = {}  # text: its label
    num_contradictions = 0
    for path in paths:
        for row in read_rows(path, "text", "label"):
            text = clean(row["text"])
            label = label_name(row["label"], names)
            if text.strip() and label_of.setdefault(text, label) != label:
                num_contradictions += 1
    if num_contradictions:
        rows = "row has" if num_contradictions == 1 else "rows have"
        print(f"{source}: {num_contradictions} {rows} the text of an earlier row and another label: dropped")

    counts = Counter(label_of.values())
    found = ", ".join(counts) or "none"
    check(len(counts) > 1, f"{source}: two labels or more are needed; found: {found}")
    for label, count in counts.items():
        check(count >= 10, f"{source}: only {count} texts with the label {label!r}; at least 10 are needed")
        allowed = label not in ("", "none", "nan") and not set(label) & set(",:=")
        check(allowed, f"{source}: {label!r} cannot be a label: rename it, without , : or =")
    return list(label_of), list(label_of.values())


def label_name(label, names):
    """A label as it stands in a file -> its name. names: what the labels 0, 1, ... mean, or None."""
    if names:
        return names[label]
    if isinstance(label, float) and label.is_integer():  # pandas may write 1 as 1.0
        label = int(label)
    return str(label).strip()
