"""From text to tokens and windows, whatever the text. Run: python -m pytest tests/test_text.py"""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import prepare
from model import make_tokenizer

HOSTILE = st.text() | st.lists(
    st.sampled_from(["<|endoftext|>", "\0", "\ud800", "emoji 🎬", "映画", " ", "\n", "word"])
).map(" ".join)
RANKS = prepare.toy_ranks()
BPE, FLAGS = make_tokenizer(RANKS), prepare.token_flags(RANKS)


@pytest.fixture(autouse=True)
def a_file(monkeypatch):
    monkeypatch.setattr(prepare, "dataset", "mine.txt")


@given(HOSTILE)
def test_windows_hold_all_of_any_text_and_end_with_at_most_one_special_token(text):
    """<|endoftext|> in a text is thirteen letters; the token stands only where a document ends."""
    found = prepare.windows(BPE, FLAGS, text, 0)
    text = text.encode("utf-8", "replace").decode().strip()
    assert all(0 <= split < len(window) for window, split in found)
    tokens = [int(token) for window, _ in found for token in window]
    assert BPE.eot_token not in tokens[:-1]
    said = BPE.decode([token for token in tokens if token != BPE.eot_token])
    assert "".join(said.split()) == "".join(text.split())


@given(size=st.integers(6, 80), number=st.integers(0, 20))
def test_windows_keep_all_words_and_begin_as_a_prefix_does(size, number):
    """At most `size` tokens, without a space in front, and together the whole document."""
    text = " ".join(document for document, *_ in itertools.islice(prepare.toy_documents(number), 5))
    windows = list(prepare.cut(np.array(BPE.encode_ordinary(text)), size, FLAGS))
    texts = [BPE.decode(window) for window in windows]
    assert max(map(len, windows)) <= size
    assert not any(t.startswith(" ") for t in texts)
    assert "".join(texts).replace(" ", "") == text.replace(" ", "")


def test_c4_drops_documents_with_too_many_tokens_a_character(monkeypatch):
    monkeypatch.setattr(prepare, "dataset", "c4")
    assert not prepare.windows(BPE, FLAGS, "0x1f" * 200, 0)
    assert prepare.windows(BPE, FLAGS, "Everyone complained about the goalkeeper." * 3, 0)


@given(st.integers(0, 50))
def test_the_grammar_knows_its_own_texts(seed):
    """Every sentence is one that it could have written, and its verdict is what the text was made of."""
    for text, sentiment, topic in itertools.islice(prepare.toy_documents(seed), 5):
        verdict = prepare.judge_text(text)
        assert verdict == (sentiment, topic, text.count("."), text.count("."))
