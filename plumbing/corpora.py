"""Text that others wrote, in files and on the hub: documents, always in the same order."""

import itertools
import os
import tarfile
from pathlib import Path

from plumbing.config import reported_as
from plumbing.files import hub_file, read_rows


def text_files(path):
    """The files of a dataset that is a path, in order."""
    found = map(str, filter(Path.is_file, Path(path).rglob("*"))) if os.path.isdir(path) else [path]
    return sorted(path for path in found if path.lower().endswith((".txt", ".jsonl", ".jsonl.gz")))


def file_documents(path):
    """The texts of one file: the field "text" of JSON lines; plain text is divided at blank lines."""
    if path.lower().endswith((".jsonl", ".jsonl.gz")):
        yield from (row["text"] for row in read_rows(path, "text"))
    else:
        with reported_as(f"cannot read {path} as text in UTF-8"), open(path, encoding="utf-8-sig") as f:
            yield from ("".join(lines) for blank, lines in itertools.groupby(f, str.isspace) if not blank)


def openwebtext_documents():
    """The 21 archives of the hub's copy, each holding many .xz archives of text files."""
    for number in range(21):
        # the last revision whose archives are complete; later ones need a library to read
        revision = "b3166bc19fbae165867d7f4965dc52279d1e9f40"
        name = f"urlsf_subset{number:02d}.tar"
        path = hub_file("Skylion007/openwebtext", name, repo_type="dataset", revision=revision)
        with tarfile.open(path) as outer:
            for member in (m for m in outer if m.name.endswith(".xz")):
                with tarfile.open(fileobj=outer.extractfile(member), mode="r|xz") as inner:
                    for text in (t for t in inner if t.isfile()):
                        yield inner.extractfile(text).read().decode("utf-8", "replace")


def c4_documents():
    for number in range(1024):
        name = f"en/c4-train.{number:05d}-of-01024.json.gz"
        path = hub_file("allenai/c4", name, repo_type="dataset")
        yield from (row["text"] for row in read_rows(path, "text"))
