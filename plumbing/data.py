"""What prepare.py wrote, read as memory maps."""

import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from plumbing.errors import check, reported_as
from plumbing.text import Tokenizer, read_ranks

DATA_FORMAT = 4  # of data/NAME
COLUMNS = ("tokens", "length", "split", "prefix_emb", "cont_emb")


def data_name(dataset):
    """`some/folder/reviews.jsonl.gz` or `reviews` -> reviews, the folder's name in data/.

    Several paths give one name: `reviews.jsonl.gz,news.jsonl.gz` -> reviews+news.
    """
    names = [os.path.basename(os.path.abspath(path)).split(".")[0] for path in dataset.split(",")]
    check(all(names), f"--dataset {dataset}: a file or folder needs a name, before any dot")
    return "+".join(names)


class Data:
    """A folder written by prepare.py, data/NAME/{train,val} and meta.json, read as memory maps.

    A row of tokens is a window, `length` tokens long, followed by the next token of its document.
    """

    def __init__(self, dataset):
        self.folder = f"data/{data_name(dataset)}"
        check(os.path.exists(f"{self.folder}/meta.json"), f"{self.folder} is not prepared: run prepare.py")
        again = f"remove {self.folder} and prepare it again"
        with reported_as(f"{self.folder}/meta.json is damaged, {again}"):
            meta = json.loads(Path(f"{self.folder}/meta.json").read_text())
            version = meta["format"]
        check(version == DATA_FORMAT, f"{self.folder} was made by another version: {again}")
        self.info = meta["data"]  # what a model trained on this data must be used with
        self.size = meta["N"]  # rows of each subset
        self.mean = torch.tensor(self.info["mean"])
        self.std = torch.tensor(self.info["std"])
        self.arrays = {}
        for subset, num_rows in self.size.items():
            for name in COLUMNS:
                path = f"{self.folder}/{subset}/{name}.npy"
                with reported_as(f"{path} is missing or damaged, {again}"):
                    array = np.load(path, mmap_mode="r")  # fails if the file is shorter than its header says
                right = len(array) == num_rows
                check(right, f"{path} is damaged: {len(array)} rows, not {num_rows}: {again}")
                self.arrays[subset, name] = array
        ranks = read_ranks(f"{self.folder}/tokenizer.tiktoken", self.info["tokenizer"])
        self.tokenizer = Tokenizer(ranks, self.info["pattern"])

    def rows(self, subset, index, columns, device):
        """Rows `index` of some columns: tokens cut to the longest, embeddings standardised, in fp32."""
        rows = []
        for name in columns:
            array = self.arrays[subset, name][index]
            if name == "tokens":
                longest = self.arrays[subset, "length"][index].max()
                array = array[:, : longest + 1]
            if name.endswith("emb"):
                x = torch.from_numpy(array.astype(np.float32))
                x = (x - self.mean) / self.std
            else:
                x = torch.from_numpy(array.astype(np.int64))
            if device.startswith("cuda"):
                x = x.pin_memory()  # lets the copy run while the GPU computes
            rows.append(x.to(device, non_blocking=True))
        return rows

    def batch(self, number, batch_size, seed, part, columns, device):
        """The slice `part` of training batch `number`: epochs without replacement, each in its own order."""
        num_rows = self.size["train"]
        drawn = np.arange(number * batch_size, (number + 1) * batch_size)  # counted from the first batch on
        epochs = drawn // num_rows
        index = []
        for epoch in range(epochs[0], epochs[-1] + 1):
            places = drawn[epochs == epoch] % num_rows
            index.append(epoch_order(num_rows, epoch, seed)[places])
        index = np.concatenate(index)[part]
        return self.rows("train", np.sort(index), columns, device)  # in the order of the file


@lru_cache(maxsize=2)
def epoch_order(num_rows, epoch, seed):
    return np.random.default_rng((seed, epoch)).permutation(num_rows)
