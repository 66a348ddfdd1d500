"""Files are whole or absent, and named where damaged. Run: python -m pytest tests/test_files.py"""

import os
import resource
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import Probe
from plumbing.config import InputError
from plumbing.data import Data
from plumbing.files import (
    load_checkpoint,
    load_weights,
    newest_model,
    read_rows,
    save_weights,
    sha256,
    write_file,
)
from plumbing.text import read_ranks


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_file(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # as a full disk would
    try:
        with pytest.raises(InputError, match="cannot write"):
            write_file(path, "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


@given(st.binary(max_size=200))
def test_no_bytes_make_the_json_lines_reader_crash(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_bytes(content)
    try:
        assert all(isinstance(row["text"], str) for row in read_rows(str(path), "text"))
    except InputError as e:
        assert "rows.jsonl" in str(e)


# ---- a damaged file is named, wherever the damage is ----


def weights(folder):
    save_weights(folder, "decoder", {"a": torch.arange(12.0).view(3, 4)}, {"history": [1, 2]})
    return "decoder.safetensors", lambda: load_weights(folder, "decoder")


def checkpoint(folder):
    content = {"made_with": {"data": "x"}, "step": 3, "model": {"a": torch.arange(12.0)}}
    torch.save(content, f"{folder}/decoder.pt")
    return "decoder.pt", lambda: load_checkpoint(f"{folder}/decoder.pt", {"data": "x"}, "cpu")


def tokenizer(folder):
    path = f"{folder}/tokenizer.tiktoken"
    write_file(path, "YQ== 0\nYg== 1\nYWI= 2\n")
    return "tokenizer.tiktoken", partial(read_ranks, path, sha256(path))


def probe(folder):
    arrays = {"classes": ["a", "b"], "coef": np.ones((2, 3)), "intercept": np.ones(2)}
    np.savez(f"{folder}/topic.npz", **arrays, encoder="e", weight=2.0)
    return "topic.npz", lambda: Probe.load(f"{folder}/topic.npz")


@pytest.mark.parametrize("kind", [weights, checkpoint, tokenizer, probe])
def test_no_damage_goes_unnoticed(kind, tmp_path):
    """One bit flipped or the tail cut off, anywhere: the file is named, or reads as it was written."""
    name, read = kind(str(tmp_path))
    whole, content = str(read()), (tmp_path / name).read_bytes()

    @settings(max_examples=200)
    @given(at=st.integers(0, len(content) - 1), bit=st.integers(0, 7), cut=st.booleans())
    def damage(at, bit, cut):
        rest = b"" if cut else bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
        (tmp_path / name).write_bytes(content[:at] + rest)
        try:
            assert str(read()) == whole
        except InputError as e:
            assert name in str(e)

    damage()


def test_the_default_model_is_the_newest_that_has_both_stages_else_the_one_in_the_box(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert newest_model().endswith("pretrained/reviews")
    for age, name in enumerate(("b/decoder", "b/diffusion", "a/decoder", "a/diffusion", "c/decoder")):
        os.makedirs(os.path.dirname(f"out/{name}"), exist_ok=True)
        write_file(f"out/{name}.safetensors", "")
        os.utime(f"out/{name}.safetensors", (age, age))
    assert newest_model() == "out/a"


def test_rows_come_in_the_order_asked_for(project, monkeypatch):
    """For the validation loss `shuffled`, each row gets the embedding of another. In the order of the
    file, it might get its own.
    """
    monkeypatch.chdir(project)
    data = Data("toy")
    (turned,) = data.rows("val", np.array([5, 2, 9]), ("cont_emb",), "cpu")
    (one,) = data.rows("val", np.array([2]), ("cont_emb",), "cpu")
    assert torch.equal(turned[1:2], one)
