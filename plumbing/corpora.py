"""Text that others wrote, in files and on the hub: documents, always in the same order."""

import itertools
import os
from pathlib import Path

from plumbing.errors import reported_as
from plumbing.files import hub_file, read_rows


def text_files(path):
    """The files of a dataset that is a path, in order; of a folder, those that are not hidden."""
    files = [path]
    if os.path.isdir(path):
        found = [file for file in Path(path).rglob("*") if file.is_file()]
        # .git and its like, and the ._ files that macOS leaves on other people's disks
        files = [str(file) for file in found if not hidden(file.relative_to(path))]
    return sorted(file for file in files if file.lower().endswith((".txt", ".jsonl", ".jsonl.gz")))


def hidden(path):
    return any(part.startswith(".") for part in path.parts)


def file_documents(path):
    """The texts of one file: the field "text" of JSON lines; plain text is divided at blank lines."""
    if path.lower().endswith((".jsonl", ".jsonl.gz")):
        for row in read_rows(path, "text"):
            yield row["text"]
        return
    with reported_as(f"cannot read {path} as text in UTF-8"), open(path, encoding="utf-8-sig") as f:
        for blank, lines in itertools.groupby(f, str.isspace):
            if not blank:
                yield "".join(lines)


def c4_documents():
    """C4's English part, from the 1,024 files of the hub's copy."""
    for number in range(1024):
        name = f"en/c4-train.{number:05d}-of-01024.json.gz"
        path = hub_file("allenai/c4", name, repo_type="dataset")
        for row in read_rows(path, "text"):
            yield row["text"]
