"""The results of eval.py, on disk and as tables."""

import json
import os

import numpy as np
from scipy.stats import t as student_t
from tqdm import tqdm

from plumbing.config import check, reported_as
from plumbing.files import write_file


class Results:
    """A .jsonl file: one line that says what made it, then one for every row of the table and seed."""

    def __init__(self, path, made_with, seeds):
        self.path, self.made_with, self.seeds, self.lines = path, made_with, seeds, []
        if os.path.exists(self.path):
            with reported_as(f"{self.path} is damaged, remove it"), open(self.path, encoding="utf-8") as f:
                before, *self.lines = map(json.loads, f)
            changed = ", ".join(k for k, v in made_with.items() if before.get(k) != v)
            check(not changed, f"{self.path} was made with other {changed}: give another --results")

    def missing(self, rows):
        """Yields the (row, seed) that have no line yet."""
        done = {(line["row"], line["seed"]) for line in self.lines}
        for row, seed in tqdm([(row, seed) for row in rows for seed in self.seeds], self.path):
            if (row, seed) not in done:
                yield row, seed

    def add(self, row, seed, figures, texts):
        figures = {name: float(value) for name, value in figures.items()}
        self.lines.append({"row": row, "seed": seed, "figures": figures, "texts": texts})
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in (self.made_with, *self.lines)))

    def table(self):
        """{row: {figure: (mean, half of its 95 % interval)}}, over seeds (Student's t)."""
        out = {}
        for row in dict.fromkeys(line["row"] for line in self.lines):
            each, out[row] = [line["figures"] for line in self.lines if line["row"] == row], {}
            for name in dict.fromkeys(name for figures in each for name in figures):
                x = np.array([figures[name] for figures in each if name in figures])
                wide = student_t.ppf(0.975, len(x) - 1) / len(x) ** 0.5 if len(x) > 1 else 0.0
                out[row][name] = x.mean(), wide * x.std(ddof=min(1, len(x) - 1))
        return out


def show(table):
    """Prints a table as Markdown."""
    names = list(dict.fromkeys(name for figures in table.values() for name in figures))
    print("\n| | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for row, figures in table.items():
        cells = ("{:.4g} ± {:.2g}".format(*figures[name]) if name in figures else "" for name in names)
        cells = (cell.removesuffix(" ± 0") for cell in cells)  # one seed tells nothing about the error
        print(f"| {row} | " + " | ".join(cells) + " |")
