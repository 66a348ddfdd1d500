"""Text that a decoder writes itself, as training data."""

import json
import shutil

import pytest
import tokenizers
import transformers
from conftest import copy_scripts, digest, run_here
from test_decoders import save_llama

from plumbing.data import Data

ASKS = "{% for m in messages %}Q: {{ m.content }} A: {% endfor %}"
SELF = "prepare.py --dataset=self --encoder=all-MiniLM-L6-v2 --block_size=16 --val_every=5 --tokenizer"


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    """A project with a tiny Llama in two folders, with and without a chat template."""
    project = copy_scripts(tmp_path_factory.mktemp("writers"))
    for name, template in (("plain", None), ("chat", ASKS)):
        save_llama(f"{project}/{name}")
        bpe = tokenizers.Tokenizer.from_file(f"{project}/{name}/tokenizer.json")
        bpe.decoder = tokenizers.decoders.ByteLevel()
        options = {"eos_token": "<|endoftext|>", "chat_template": template}
        transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **options).save_pretrained(project / name)
    (project / "openings.txt").write_text("{The film|Our dinner}\nSay it is {good|bad}. => My {cat|dog}\n")
    (project / "real.jsonl").write_text("".join(json.dumps({"text": f"Text {i}."}) + "\n" for i in range(40)))
    return project


def read(monkeypatch, project, name="self"):
    """What was prepared: (text, whether it is complete) of each window, training's first."""
    monkeypatch.chdir(project)
    data = Data(name)
    for subset in ("train", "val"):
        columns = (data.arrays[subset, name] for name in ("tokens", "length"))
        for tokens, length in zip(*columns):
            yield data.tokenizer.decode(tokens[:length].tolist()), tokens[length] == data.tokenizer.eot_token


def test_documents_begin_as_asked(writers, monkeypatch):
    """The instruction is not part of the text, and <|endoftext|> only follows what is complete."""
    run_here(writers, f"{SELF} chat --openings=openings.txt --max_documents=200")
    texts, ends = zip(*read(monkeypatch, writers))
    counts = [sum(t.startswith(s) for t in texts) for s in ("The film", "Our dinner", "My cat", "My dog")]
    assert sum(counts) == 200 and min(counts) > 25
    assert not any("Say it is" in text or "<|" in text for text in texts)
    assert 0 < sum(ends) < 100  # random weights seldom end a text


def test_an_interrupted_run_continues_to_the_same_bytes(writers, tmp_path):
    command = f"{SELF} plain --max_documents=150"
    (writers / "data/self").rename(tmp_path / "other")
    run_here(writers, command, SHARD=64)
    undisturbed = digest(writers / "data/self")
    (writers / "data/self").rename(tmp_path / "undisturbed")

    def stop(folder, parts):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        run_here(writers, command, SHARD=64, join=stop)
    parts = sorted((writers / "data/self/parts").rglob("*.npz"))
    assert len(parts) > 1
    parts[-1].unlink()
    run_here(writers, command, SHARD=64)
    assert digest(writers / "data/self") == undisturbed


def test_self_takes_turns_with_other_text(writers, monkeypatch):
    run_here(writers, f"{SELF} plain --max_documents=80".replace("=self", "=self,real.jsonl"))
    assert sum(text.startswith("Text ") for text, _ in read(monkeypatch, writers, "self+real")) == 40


@pytest.mark.parametrize(
    "options, message",
    [
        ("plain --openings=openings.txt --max_documents=9", "openings.txt: plain has no chat template"),
        ("plain", "self has no end: say --max_documents"),
        ("plain --max_documents=9 --openings=none.txt", "No such file or directory: none.txt"),
    ],
)
def test_mistakes_are_told_in_a_line(writers, call, options, message):
    shutil.rmtree(writers / "data/self", ignore_errors=True)
    status, _, line = call(writers, f"{SELF} {options}")
    assert status == 2 and message in line
