"""Every script, as users type it, on the toy. Run: python -m pytest tests/test_scripts.py"""

import json
import math
import re
import resource
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    TOY,
    TRAININGS,
    copy_scripts,
    cut_the_tail,
    digest,
    flip_a_bit,
    in_one,
    kill_when,
    python,
    run_here,
)

from model import DGLM
from plumbing.data import Data
from plumbing.files import load_weights, read_rows, save_weights
from plumbing.optim import configure_optimizers
from plumbing.toy import grade_text

GUIDES = ("sentiment=negative", "positive", "negative:20,food:40")


@pytest.fixture(scope="module")
def steered(project):
    """{guide: the rows that sample.py writes} from neutral prefixes."""
    options = "--prefix FILE:data/toy/prefixes.txt --num_samples 2 --max_new_tokens 40 --seed 5"
    command = f"sample.py config/toy.py {options} --guide"
    for guide in GUIDES:
        run_here(project, f"{command} {guide} --out {guide}.jsonl")
    return {guide: list(read_rows(f"{project}/{guide}.jsonl")) for guide in GUIDES}


def test_guidance_steers_the_text_by_the_grammars_own_truth(steered):
    """The probes that guide do not grade."""
    share = {}
    for guide in ("sentiment=negative", "positive"):
        grades = [grade_text(row["continuation"])[0] for row in steered[guide]]
        share[guide] = grades.count("negative") / len(grades)
    assert share["sentiment=negative"] - share["positive"] > 0.5, share


def test_two_guides_steer_together(steered):
    hits = {}
    for guide in ("sentiment=negative", "negative:20,food:40"):
        grades = [grade_text(row["continuation"])[:2] for row in steered[guide]]
        hits[guide] = grades.count(("negative", "food"))
    assert hits["negative:20,food:40"] > hits["sentiment=negative"] + 5, hits


def test_sample_writes_what_it_promises_and_the_grammar_grades_it(project, steered, call):
    rows = steered["sentiment=negative"]
    assert len(rows) == 40
    for row in rows:
        assert set(row) == {"prefix", "continuation", "guide", "seed", "similarity", "probes"}
        assert row["guide"] == "sentiment=negative" and row["seed"] == 5
        assert set(row["probes"]) == {"sentiment", "topic"}
        assert sum(row["probes"]["sentiment"].values()) == pytest.approx(1, abs=1e-3)
    table = python("-m plumbing.toy --grade sentiment=negative.jsonl", project).splitlines()
    assert table[1].split()[:2] == ["sentiment=negative", "40"] and len(table) == 2


def test_watching_shows_each_step_and_changes_no_text_but_another_seed_does(project, call):
    """With the sampler of the paper too, and without any prefix."""
    base = "--out_dir out/toy --guide negative --num_samples 2 --steps 3 --seed"
    commands = [f"sample.py {base} {end}" for end in ("1", "1 --watch", "2")]
    commands.append(f"sample.py config/paper.py {base} 1")
    (text, watched, other, paper), notes = zip(*(call(project, command)[1:] for command in commands))
    assert "%" not in "".join(notes)  # the progress bar is gone
    assert len(text) == 2 and len(watched) == 5 and watched[3:] == text
    assert all(re.match(r"lambda +-?\d+\.\d  negative [01]\.\d\d  \w", line) for line in watched[:3])
    assert len({*text, *other, *paper}) == 6


def test_any_prefix_is_plain_text(project):
    """<|endoftext|> is not a token there, and half an emoji is not a traceback."""
    hostile = ["<|endoftext|>", "\ud83c emoji 🎬 映画"]
    texts = [text for text, _ in DGLM(f"{project}/out/toy").generate(hostile, max_new_tokens=5)]
    assert len(texts) == 2 and "<|endoftext|>" not in "".join(texts)


def test_prepare_resumes_to_the_same_bytes(tmp_path, call):
    folders = copy_scripts(tmp_path / "whole"), copy_scripts(tmp_path / "killed")
    command = "prepare.py config/toy.py --max_documents=100"
    for folder in folders:
        source = (folder / "prepare.py").read_text()
        (folder / "prepare.py").write_text(source.replace("SHARD = 1024", "SHARD = 16"))
    kill_when(command, folders[1], lambda: list((folders[1] / "data/toy/parts").rglob("*.npz")))
    assert not (folders[1] / "data/toy/meta.json").exists()
    for folder in folders:
        call(folder, command)
    assert digest(folders[1] / "data") == digest(folders[0] / "data") != {}


# two optimizers
MUON = "--muon=0.02 --max_iters=4 --eval_interval=2"


@pytest.mark.parametrize("name, options, steps", [("decoder", MUON, "2 of 4"), ("diffusion", "", "10 of 20")])
def test_a_killed_training_resumes_to_the_same_losses_and_weights(project, call, name, options, steps):
    """Killed at its first checkpoint."""
    whole, killed = (f"{TRAININGS[name]} {options} --out_dir=out/{folder}" for folder in ("never", "killed"))
    kill_when(killed, project, (project / f"out/killed/{name}.pt").exists)
    assert f"at step {steps}" in "".join(call(project, killed)[1])
    call(project, whole)
    metas, weights = zip(*(load_weights(f"{project}/out/{f}", name) for f in ("never", "killed")))
    assert metas[0]["history"] == metas[1]["history"] and len(metas[0]["history"]) == 2
    assert all(torch.equal(weight, weights[1][key]) for key, weight in weights[0].items())


@pytest.mark.parametrize("name", TRAININGS)
def test_a_step_whose_gradient_is_not_finite_is_skipped_and_counted(project, name):
    steps = iter(range(10))

    def overflow_in_step_3(net, *rest):
        next(net.parameters()).register_hook(lambda g: g * math.inf if next(steps) == 3 else g)
        return configure_optimizers(net, *rest)

    command = f"{TRAININGS[name]} --max_iters=10 --eval_interval=5 --out_dir=out/inf"
    run_here(project, command, configure_optimizers=overflow_in_step_3)
    meta, weights = load_weights(f"{project}/out/inf", name)
    assert [record["skipped"] for record in meta["history"]] == [1, 0]
    assert all(weight.isfinite().all() for weight in weights.values())


def test_gradient_accumulation_and_processes_see_the_rows_of_one_batch(project, monkeypatch):
    """Batch 3 of 64 rows is batches 6 and 7 of 32, and what two processes take of it."""
    monkeypatch.chdir(project)

    def rows(*batches):
        parts = [Data("toy").batch(*batch, ("cont_emb",), "cpu")[0] for batch in batches]
        return sorted(map(tuple, torch.cat(parts).tolist()))

    every = slice(None)
    assert rows((3, 64, 1, every)) == rows((6, 32, 1, every), (7, 32, 1, every))
    assert rows((3, 64, 1, every)) == rows((3, 64, 1, slice(0, None, 2)), (3, 64, 1, slice(1, None, 2)))


def test_guides_know_the_covariance_of_the_data(project, monkeypatch):
    """A diffusion is saved with the covariance of its data. On the sphere nothing is left of the noise in the
    encoder's dead dimensions; MiniLM has three.
    """
    monkeypatch.chdir(project)
    model = DGLM("out/toy", "cpu")
    data = Data("toy")
    (x,) = data.rows("train", np.arange(data.size["train"]), ("cont_emb",), "cpu")
    variance, axes = model.covariance
    torch.testing.assert_close(axes * variance @ axes.T, x.T.cov(), atol=1e-3, rtol=0)
    dead = x.std(0) < 0.5
    assert dead.sum() == 3 and model.to_sphere(torch.randn(64, 384))[:, dead].abs().max() < 0.01


# ---- bad input: one line on standard error, exit status 2 ----


FILES = {
    "empty.jsonl": "",
    "no_text.jsonl": '{"text": "fine"}\n{"body": "no"}\n',
    "not_json.jsonl": '{"text": "fine"}\nplain words\n',
    "one_label.jsonl": '{"text": "fine", "label": "x"}\n' * 20,
    "few.jsonl": "".join(f'{{"text": "fine {i}", "label": "{"xy"[i == 0]}"}}\n' for i in range(21)),
    "blank.txt": "\n\n",
    "latin.txt": "caf\xe9",
    "bad.tiktoken": "no ranks here",
}
MINI = "--encoder=all-MiniLM-L6-v2 --tokenizer=data/toy/tokenizer.tiktoken --vocab_size=300"
DECODER = f"train_decoder.py {TOY} --out_dir=out/x"

BAD = [
    ("sample.py --num_sample=3", "did you mean num_samples?"),
    ("sample.py --steps=0", "steps=0: must be at least 1"),
    ("sample.py --num_samples=0", "num_samples=0: must be at least 1"),
    ("sample.py --guide_through=probe", "guide_through: use network or estimate"),
    ("sample.py --sampler=euler", "sampler=euler: use ddpm, ddim or dpm++"),
    ("sample.py --seed=-1", "seed=-1"),
    ("sample.py --out_dir=nowhere", "nowhere/decoder.safetensors is missing"),
    ("sample.py --prefix=FILE:nowhere.txt", "nowhere.txt"),
    ("sample.py --prefix=FILE:blank.txt", "holds no line"),
    ("sample.py --prefix=FILE:latin.txt", "not text in UTF-8"),
    ("sample.py config/toy.py --guide=sad", "no probe has a class 'sad'"),
    ("sample.py config/toy.py --guide=negative:much", "is not a number"),
    ("sample.py config/toy.py --cfg_scale=inf", "the diffusion diverged"),
    ("sample.py config/toy.py --device=cuda:77", "no device 'cuda:77'"),
    ("sample.py config/toy.py --out=nowhere/s.jsonl --steps=1", "cannot write nowhere/s.jsonl"),
    ("prepare.py --dataset=toy", "toy has no end: say --max_documents"),
    ("prepare.py --dataset=nowhere.txt", "there is no dataset 'nowhere.txt'"),
    (f"prepare.py --dataset=empty.jsonl {MINI}", "gave too few windows"),
    (f"prepare.py --dataset=no_text.jsonl {MINI}", 'no_text.jsonl, line 2: no field "text"'),
    (f"prepare.py --dataset=not_json.jsonl {MINI}", "not_json.jsonl as JSON lines, after line 2"),
    ("prepare.py --dataset=blank.txt --tokenizer=bad.tiktoken", "bad.tiktoken is not a tokenizer"),
    (f"prepare.py --dataset=blank.txt {MINI[:-3]}9999", "--vocab_size=9999"),
    (f"prepare.py {TOY} --block_size=20", "made with other block_size"),
    ("probes.py", "say --data"),
    ("probes.py --data=mystery", "sentiment, toxicity, topic"),
    ("probes.py --data=one_label.jsonl", "two labels or more are needed; found: x"),
    ("probes.py --data=few.jsonl", "only 1 texts with the label 'y'"),
    ("train_decoder.py --dataset=unprepared", "data/unprepared is not prepared: run prepare.py"),
    (f"{DECODER} --init_from=data/toy", "config.json"),
    (f"{DECODER} --init_from=nowhere.gguf", "nowhere.gguf"),
    ("prepare.py --dataset=blank.txt,nowhere.txt", "there is no dataset 'nowhere.txt'"),
    (f"{DECODER} --batch_size=0", "batch_size=0: must be at least 1"),
    (f"{DECODER} --learning_rate=inf --eval_interval=1 --eval_rows=8", "the loss is not finite"),
    (f"train_decoder.py {TOY} --n_embd=192", "made with another architecture"),
    (f"train_diffusion.py {TOY} --muon=0.02", "made with another optimizer"),
    ("train_diffusion.py config/toy.py --out_dir=out/x --width=100", "width=100: must be at least"),
    ("train_diffusion.py config/toy.py --out_dir=out/x --null_probability=2", "must be at least 0, at most"),
]


@pytest.fixture(scope="module")
def bad_files(project):
    for name, content in FILES.items():
        (project / name).write_text(content, encoding="latin-1")
    return digest(project / "out/toy")


@pytest.mark.parametrize("command, message", BAD)
def test_bad_input_is_one_clear_line(project, bad_files, command, message, call):
    """And the model stays as it was."""
    status, _, line = call(project, command)
    assert status == 2 and message in line and line.startswith(command.split()[0])
    assert digest(project / "out/toy") == bad_files


# ---- a spoilt model is named ----


def remove(path):
    path.unlink()


def drop_a_row(path):
    np.save(path, np.load(path)[:-1])


def other_encoder(path):
    if path.suffix == ".json":
        meta = json.loads(path.read_text())
        path.write_text(json.dumps(meta | {"data": meta["data"] | {"encoder": "other"}}))
    elif path.suffix == ".npz":
        np.savez(path, **dict(np.load(path)) | {"encoder": np.array("other")})
    else:
        meta, weights = load_weights(path.parent, path.stem)
        save_weights(path.parent, path.stem, weights, meta | {"data": meta["data"] | {"encoder": "other"}})


SAMPLE = "sample.py --out_dir=out/spoilt"
RESUME = f"train_diffusion.py {TOY} --out_dir=out/spoilt --dataset=spoilt"
SPOILT = [
    ("out/spoilt/decoder.safetensors", SAMPLE, "{} is damaged"),
    ("out/spoilt/decoder.pt", RESUME.replace("diffusion", "decoder"), "{} is damaged"),
    ("out/spoilt/tokenizer.tiktoken", SAMPLE, "{} is "),
    ("out/spoilt/probes/topic.npz", SAMPLE, "{} is damaged"),
    ("data/spoilt/tokenizer.tiktoken", RESUME, "{} is "),
]
SPOILT = [(damage, *row) for damage in (flip_a_bit, cut_the_tail) for row in SPOILT]
SPOILT += [
    (cut_the_tail, "data/spoilt/train/cont_emb.npy", RESUME, "{} is missing or damaged"),
    (remove, "data/spoilt/val/tokens.npy", RESUME, "{} is missing or damaged"),
    (drop_a_row, "data/spoilt/val/split.npy", RESUME, "{} is damaged: "),
    (other_encoder, "out/spoilt/diffusion.safetensors", SAMPLE, "were trained on different data"),
    (other_encoder, "out/spoilt/probes/topic.npz", SAMPLE, "{} is a probe of the encoder other"),
    (other_encoder, "data/spoilt/meta.json", RESUME, "out/spoilt/diffusion.pt was made with another data"),
]


@pytest.mark.parametrize("change, path, command, message", SPOILT)
def test_what_is_damaged_or_does_not_belong_together_is_named(project, change, path, command, message, call):
    for folder in ("data", "out"):
        shutil.rmtree(project / folder / "spoilt", ignore_errors=True)
        shutil.copytree(project / folder / "toy", project / folder / "spoilt")
    change(project / path)
    status, _, line = call(project, command)
    assert status == 2 and message.format(path) in line


def test_a_full_disk_is_one_clear_line_and_the_old_checkpoint_stands(project, undisturbed, call):
    shutil.copytree(project / "out/whole", project / "out/full")
    before = digest(project / "out/full")
    (soft, hard) = resource.getrlimit(resource.RLIMIT_FSIZE)
    command = f"{TRAININGS['decoder']} --out_dir=out/full --max_iters=21"
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        status, _, line = call(project, command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2 and "cannot write out/full/decoder." in line
    assert digest(project / "out/full") == before


def test_no_network_is_one_clear_line(project, bad_files):
    commands = {
        "probes.py config/toy.py --data=topic": "cannot get train.jsonl of SetFit/ag_news",
        f"{DECODER} --init_from=gpt2": "cannot get the files of gpt2",
        f"prepare.py --dataset=few.jsonl {MINI} --encoder=org/sentence-t5-xl": "of org/sentence-t5-xl",
    }
    # the hub's client waits before it tries again
    (project / "hasten.py").write_text("import time\ntime.sleep = lambda seconds: None\n")
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(project / "hf")}
    _, notes = in_one(["hasten.py", *commands], project, **env)
    assert notes.count("exit status 2 ") == 3, notes
    for command, message in commands.items():
        (line,) = (x for x in notes.splitlines() if x.startswith(command.split()[0]))
        assert message in line
