"""From text to tokens and windows, whatever the text. Run: python -m pytest tests/test_text.py"""

import itertools
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configurator import COLUMNS, InputError
from model import make_tokenizer, tokenise
from prepare import Arrays, cut, token_flags, toy_documents, toy_ranks, windows

HOSTILE = st.text() | st.lists(
    st.sampled_from(["<|endoftext|>", "\0", "\ud800", "emoji 🎬", "映画", " ", "\n", "word"])
).map(" ".join)


@given(HOSTILE)
def test_user_text_never_becomes_a_special_token(text):
    """Whatever it holds, <|endoftext|> too, it is plain text, and reading it back gives it again."""
    bpe = make_tokenizer(toy_ranks())
    text = text.encode("utf-8", "replace").decode()  # as every reader of text here does
    tokens = tokenise(bpe, text)
    assert bpe.eot_token not in tokens and bpe.decode(tokens) == text


def test_a_million_blanks_are_a_thousand():
    """More in a row is more than tiktoken can take."""
    bpe = make_tokenizer(toy_ranks())
    assert bpe.decode(tokenise(bpe, "a" + " " * 10**6 + "b")) == "a" + " " * 1000 + "b"


def test_half_a_shard_is_dropped_and_a_damaged_row_is_found(tmp_path):
    arrays, rows = Arrays(str(tmp_path / "toy/train"), 4), np.arange(3)
    arrays.cut_to(0, dict.fromkeys(COLUMNS, 0))
    arrays.append({name: np.ones((3, *arrays.kinds[name][1])) for name in COLUMNS})
    crc = dict(arrays.crc)
    arrays.append({"length": rows})  # then comes the kill
    arrays.cut_to(3, crc)
    path = tmp_path / "toy/train/length.npy"
    assert np.load(path).tolist() == [1, 1, 1]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="length.npy is damaged"):
        arrays.cut_to(3, crc)


@given(HOSTILE)
def test_windows_of_any_text_end_with_at_most_one_special_token(text):
    bpe, flags = make_tokenizer(toy_ranks()), token_flags(toy_ranks())
    text = text.encode("utf-8", "replace").decode().strip()
    with patch("prepare.dataset", "mine.txt"):  # of c4 it would all be dropped
        found = windows(bpe, flags, text, 0)
    assert bool(found) == bool(text)
    for window, split in found:
        assert 0 <= split < len(window) and bpe.eot_token not in window[:-1]


@given(size=st.integers(6, 80), number=st.integers(0, 20))
def test_windows_keep_all_words_and_begin_as_a_prefix_does(size, number):
    """At most `size` tokens, without a space in front, and together the whole document."""
    ranks = toy_ranks()
    bpe, flags = make_tokenizer(ranks), token_flags(ranks)
    text = " ".join(document for document, *_ in itertools.islice(toy_documents(number), 5))
    windows = list(cut(np.array(bpe.encode_ordinary(text)), size, flags))
    texts = [bpe.decode(window) for window in windows]
    assert max(map(len, windows)) <= size
    assert not any(t.startswith(" ") for t in texts)
    assert "".join(texts).replace(" ", "") == text.replace(" ", "")
