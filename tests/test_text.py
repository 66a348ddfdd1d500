"""From text to tokens and windows, whatever the text. Run: python -m pytest tests/test_text.py"""

import base64
import itertools
import os
import shutil

import numpy as np
import pytest
from conftest import copy_scripts
from hypothesis import given
from hypothesis import strategies as st

import prepare
from plumbing.corpora import text_files
from plumbing.text import Tokenizer
from plumbing.toy import grade_text, toy_documents, toy_ranks

HOSTILE = st.text() | st.lists(
    st.sampled_from(["<|endoftext|>", "\0", "\ud800", "emoji 🎬", "映画", " ", "\n", "word"])
).map(" ".join)
RANKS = toy_ranks()
BPE = Tokenizer(RANKS)
BOUNDARIES = prepare.Boundaries.of(RANKS, BPE)


@pytest.fixture(autouse=True)
def a_file(monkeypatch):
    monkeypatch.setattr(prepare, "dataset", "mine.txt")


@given(HOSTILE)
def test_windows_hold_all_of_any_text_and_what_follows_each(text):
    """<|endoftext|> in a text is thirteen letters; the token follows the last window alone."""
    text = text.encode("utf-8", "replace").decode()
    found = [(window[:-1], window[-1], split) for window, split in prepare.windows(BPE, BOUNDARIES, text, 0)]
    assert all(0 <= split < len(window) for window, _, split in found)
    assert BPE.eot_token not in [token for window, *_ in found for token in window]
    ends = [next_token == BPE.eot_token for _, next_token, _ in found]
    assert not any(ends[:-1]) and all(ends[-1:])
    said = BPE.decode([token for window, *_ in found for token in window])
    assert "".join(said.split()) == "".join(text.split())


def test_an_unfinished_text_gives_one_window_that_ends_where_a_reader_would_cut_it(monkeypatch):
    """And no <|endoftext|>."""
    monkeypatch.setattr(prepare, "block_size", 30)
    finished = " ".join(text for text, *_ in itertools.islice(toy_documents(0), 3))
    for size in range(20, 32):
        text = BPE.decode(BPE.encode_ordinary(finished)[:size])
        ((window, _),) = prepare.windows(BPE, BOUNDARIES, text, 0, complete=False)
        assert BPE.eot_token not in window
        assert BPE.decode(window[:-1].tolist())[-1] in ".!?" or BPE.decode(window[-1:].tolist())[0] == " "


@given(size=st.integers(6, 80), number=st.integers(0, 20))
def test_windows_keep_all_words_and_begin_as_a_prefix_does(size, number):
    """At most `size` tokens, without a space in front, and together the whole document; each is followed by
    the token that the document goes on with.
    """
    text = " ".join(document for document, *_ in itertools.islice(toy_documents(number), 5))
    tokens = [*BPE.encode_ordinary(text), BPE.eot_token]
    cut = list(prepare.cut(np.array(tokens), size, BOUNDARIES))
    windows = [window[:-1] for window in cut]
    following = [window[-1] for window in cut]
    texts = [BPE.decode(window) for window in windows]
    assert max(map(len, windows)) <= size
    assert not any(t.startswith(" ") for t in texts)
    assert "".join(texts).replace(" ", "") == text.replace(" ", "")
    for window, after, then in zip(texts[1:], following, windows[1:]):
        said = BPE.decode([after])
        assert window.startswith(said.strip()) and (said.startswith(" ") or then[0] == after)
    assert following[-1] == BPE.eot_token


def test_a_byte_without_a_token_is_dropped():
    assert Tokenizer({b"a": 0, b"b": 1}).encode_ordinary("aéb") == [0, 1]


def test_a_window_may_be_split_several_times(monkeypatch):
    monkeypatch.setattr(prepare, "splits", 3)
    rows = prepare.windows(BPE, BOUNDARIES, next(toy_documents(0))[0] * 3, 0)
    groups = [rows[i : i + 3] for i in range(0, len(rows), 3)]
    assert all((a[0] == b[0]).all() and (b[0] == c[0]).all() for a, b, c in groups)
    assert any(len({split for _, split in group}) == 3 for group in groups)


def test_c4_drops_documents_with_too_many_tokens_a_character(monkeypatch):
    monkeypatch.setattr(prepare, "dataset", "c4")
    assert not prepare.windows(BPE, BOUNDARIES, "0x1f" * 200, 0)
    assert prepare.windows(BPE, BOUNDARIES, "Everyone complained about the goalkeeper." * 3, 0)


@given(st.integers(0, 50))
def test_the_grammar_knows_its_own_texts(seed):
    """Every sentence is one that it could have written, and the grades are what the text was made of."""
    for text, sentiment, topic in itertools.islice(toy_documents(seed), 5):
        assert grade_text(text) == (sentiment, topic, text.count("."), text.count("."))


def test_several_paths_take_turns(tmp_path, monkeypatch):
    """One text of each as long as it has any, whether it is a file or a folder of files."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("b")
    for path, texts in {"a.txt": ["a0", "a1"], "b/0.txt": ["b0", "b1", "b2"], "b/1.txt": ["b3"]}.items():
        (tmp_path / path).write_text("\n\n".join(texts))
    monkeypatch.setattr(prepare, "dataset", "a.txt,b")
    texts, hashes = prepare.documents()
    assert [text.strip() for text in texts] == ["a0", "b0", "a1", "b1", "b2", "b3"]
    assert len(set(hashes)) == 3


def test_hidden_files_in_a_folder_are_left_out(tmp_path):
    """Those of macOS, of editors and of git; one that is named itself is read."""
    for path in ("a.txt", "sub/b.jsonl", "._a.txt", ".hidden.txt", ".git/c.txt", "sub/._b.jsonl"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("text")
    assert text_files(str(tmp_path)) == [f"{tmp_path}/a.txt", f"{tmp_path}/sub/b.jsonl"]
    assert text_files(f"{tmp_path}/.hidden.txt") == [f"{tmp_path}/.hidden.txt"]


def test_prepare_counts_the_texts_that_are_longer_than_the_encoder_reads(tmp_path, call):
    """MiniLM reads 256 of its tokens."""
    scripts = copy_scripts(tmp_path)
    ranks = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in RANKS.items())
    (scripts / "toy.tiktoken").write_text("".join(ranks))
    texts = [f"{'chef ' * 150}{number}." for number in range(60)] + ["I loved the " + "bread " * 520]
    (scripts / "mine.txt").write_text("\n\n".join(texts))
    command = (
        "prepare.py --dataset=mine.txt --encoder=all-MiniLM-L6-v2 --tokenizer=toy.tiktoken --val_every=9"
    )
    _, lines, _ = call(scripts, f"{command} --block_size=600")
    assert lines[0] == "1 texts are longer than the encoder reads: their ends do not count"
    shutil.rmtree(scripts / "data")
    assert len(call(scripts, f"{command} --block_size=88")[1]) == 1
