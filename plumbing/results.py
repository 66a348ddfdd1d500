"""The results of eval.py, on disk and as tables."""

import json
import os

import numpy as np
from scipy.stats import t as student_t
from tqdm import tqdm

from plumbing.errors import check, reported_as
from plumbing.files import write_file


class Results:
    """A .jsonl file: one line that says what made it, then one for every row of the table and seed."""

    def __init__(self, path, made_with, seeds):
        self.path = path
        self.made_with = made_with
        self.seeds = seeds
        self.lines = []
        if os.path.exists(path):
            with reported_as(f"{path} is damaged, remove it"), open(path, encoding="utf-8") as f:
                before, *self.lines = map(json.loads, f)
            changed = ", ".join(key for key, value in made_with.items() if before.get(key) != value)
            check(not changed, f"{path} was made with other {changed}: give another --results")

    def missing(self, rows):
        """Yields the (row, seed) that have no line yet."""
        done = {(line["row"], line["seed"]) for line in self.lines}
        wanted = [(row, seed) for row in rows for seed in self.seeds]
        for row, seed in tqdm(wanted, self.path):
            if (row, seed) not in done:
                yield row, seed

    def add(self, row, seed, figures, texts):
        figures = {name: float(value) for name, value in figures.items()}
        self.lines.append({"row": row, "seed": seed, "figures": figures, "texts": texts})
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in (self.made_with, *self.lines)))

    def table(self):
        """{row: {figure: (mean, half of its 95 % interval)}}, over seeds (Student's t)."""
        samples = {}  # {row: {figure: its value for each seed}}
        for line in self.lines:
            row = samples.setdefault(line["row"], {})
            for name, value in line["figures"].items():
                row.setdefault(name, []).append(value)
        return {row: {name: interval(x) for name, x in figures.items()} for row, figures in samples.items()}


def interval(values):
    """-> the mean, half of its 95 % interval; 0 for a single value, which tells nothing about the error."""
    x = np.array(values)
    if len(x) == 1:
        return x.mean(), 0.0
    return x.mean(), student_t.ppf(0.975, len(x) - 1) / len(x) ** 0.5 * x.std(ddof=1)


def show(table):
    """Prints a table as Markdown."""
    names = list(dict.fromkeys(name for figures in table.values() for name in figures))
    print("\n| | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    for row, figures in table.items():
        cells = []
        for name in names:
            cell = "{:.4g} ± {:.2g}".format(*figures[name]) if name in figures else ""
            cells.append(cell.removesuffix(" ± 0"))
        print(f"| {row} | " + " | ".join(cells) + " |")
