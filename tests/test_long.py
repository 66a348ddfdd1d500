"""Texts longer than one proposal. Run: python -m pytest tests/test_long.py"""

import re

import pytest

from model import DGLM


@pytest.fixture(scope="module")
def model(project):
    return DGLM(f"{project}/out/toy")


def write(model, prefixes, **options):
    """-> the texts, and for each part the prefixes that its proposals were conditioned on."""
    seen = []

    def on_step(prefixes, log_snr, e):
        if prefixes not in seen:
            seen.append(prefixes)

    written = list(model.generate(prefixes, on_step=on_step, **options))
    return [text for text, _ in written], seen


def test_each_part_has_a_proposal_conditioned_on_the_text_so_far(model):
    (text,), seen = write(model, ["The food was"], max_new_tokens=30, proposal_tokens=10, may_end=False)
    first, *later = [prefix for (prefix,) in seen]
    assert first == "The food was" and len(later) >= 2
    finished = "The food was" + text
    for prefix in later:
        assert prefix in finished and not finished.partition(prefix)[2][:1].isalnum()  # it ends at a word


def test_later_parts_read_the_last_sentence_only(model, monkeypatch):
    """The more the decoder has read, the less it follows a new proposal."""
    read = []
    write_part = model.decoder.write

    def watch(prompts, *rest, **options):
        read.append([model.tokenizer.decode(prompt) for prompt in prompts])
        return write_part(prompts, *rest, **options)

    monkeypatch.setattr(model.decoder, "write", watch)
    prefixes = ["It rained. The food was", "", "We left! The hotel"]
    _, seen = write(model, prefixes, max_new_tokens=60, proposal_tokens=12, may_end=False)
    assert read[0] == prefixes and len(read) == len(seen) >= 4
    for texts, known in zip(read[1:], seen[1:]):
        assert len(texts) == len(known) == 3 and sum(map(len, texts)) < sum(map(len, known))
        for text, so_far in zip(texts, known):
            assert so_far.endswith(text.strip())
            assert not re.search(r"[.!?]\s\S+\s\S+\s\S", text)  # no sentence ends before its last words


@pytest.mark.parametrize(
    "text, last",
    [
        ("The food was good", "The food was good"),
        ("It rained. The food was", " The food was"),
        ("It rained! The", "It rained! The"),  # hardly begun
        ("We left. It rained. The", " It rained. The"),
        ("", ""),
    ],
)
def test_the_last_sentence_has_at_least_three_tokens(model, text, last):
    bpe = model.tokenizer
    assert bpe.decode(bpe.last_sentence(bpe.encode_ordinary(text))) == last


def test_a_text_of_one_part_is_what_its_proposal_makes_of_it(model):
    """However long the next parts could have been."""
    options = {"max_new_tokens": 12, "num_samples": 3, "may_end": False}
    one = list(model.generate(["The food was", ""], proposal_tokens=12, **options))
    same = list(model.generate(["The food was", ""], proposal_tokens=100, **options))
    assert [text for text, _ in one] == [text for text, _ in same]
    assert all((a == b).all() for (_, a), (_, b) in zip(one, same))


def test_the_repetition_penalty_remembers_earlier_parts(model):
    options = {"max_new_tokens": 40, "proposal_tokens": 8, "temperature": 0, "may_end": False}
    (text,), _ = write(model, ["The food was"], repetition_penalty=100, **options)
    tokens = model.tokenizer.encode_ordinary(text)
    assert len(tokens) > 25 and len(set(tokens)) == len(tokens)


def test_a_text_may_be_longer_than_the_decoders_positions(model):
    positions = model.decoder.gpt.config.n_positions
    (text,), seen = write(model, ["The food was"], max_new_tokens=2 * positions, may_end=False)
    assert len(model.tokenizer.encode_ordinary(text)) > 1.5 * positions
    longest = max(len(model.tokenizer.encode_ordinary(prefix)) for (prefix,) in seen)
    assert longest <= model.info["block_size"]


def test_finished_texts_take_no_part_in_the_next(model):
    prefixes = ["The food was", "I saw", "The hotel"]
    texts, seen = write(model, prefixes, max_new_tokens=90, proposal_tokens=10, num_samples=4)
    sizes = [len(part) for part in seen]
    assert sizes[0] == 12 and sizes == sorted(sizes, reverse=True) and sizes[-1] < 12
    assert len(texts) == 12


def test_parts_may_be_as_short_as_a_word(model):
    """Texts then differ in length, as each part ends at a word."""
    prefixes = ["The food was", "I saw", "The hotel"]
    texts, _ = write(model, prefixes, max_new_tokens=40, proposal_tokens=3, num_samples=4, may_end=False)
    # words, each a token here: a part may begin in a way that no tokenizer would cut (`hotelThis`)
    sizes = [len(re.findall(r"[A-Z]?[a-z]+|[^\w\s]", text)) for text in texts]
    assert min(sizes) > 25 and max(sizes) <= 40


def test_watching_shows_every_part(project, call):
    base = "sample.py --out_dir out/toy --prefix It --steps 2 --proposal_tokens 20 --max_new_tokens 90"
    status, lines, _ = call(project, f"{base} --may_end False --watch")
    assert status == 0 and sum(line.startswith("lambda") for line in lines) == 10
    assert lines[-1] == call(project, f"{base} --may_end False")[1][-1]
