"""Every script, as users type it, on the toy. Run: python -m pytest tests/test_scripts.py"""

import base64
import glob
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import call, digest, kill_when, python, side_by_side

from configurator import InputError, batch_index, read_json_lines, write_json
from model import DGLM
from prepare import judge_text

SHORT = "config/toy.py --batch_size=16 --max_iters=20 --eval_interval=10 --eval_rows=32"
DECODER, DIFFUSION = f"train_decoder.py {SHORT}", f"train_diffusion.py {SHORT}"


GUIDES = ("none", "sentiment=negative", "positive", "negative:20,food:20")


@pytest.fixture(scope="module")
def steered(project):
    """{guide: the rows that sample.py writes} from neutral prefixes, for each of GUIDES."""
    options = "--prefix FILE:prefixes.txt --num_samples 6 --max_new_tokens 40 --seed 5"
    side_by_side([f"sample.py {options} --guide {guide} --out {guide}.jsonl" for guide in GUIDES], project)
    return {guide: list(read_json_lines(f"{project}/{guide}.jsonl")) for guide in GUIDES}


def test_guidance_steers_the_text_by_the_grammars_own_truth(steered):
    """The probes that guide do not judge."""
    share = {}
    for guide in ("sentiment=negative", "positive"):
        verdicts = [judge_text(row["continuation"])[0] for row in steered[guide]]
        share[guide] = verdicts.count("negative") / len(verdicts)
    assert share["sentiment=negative"] - share["positive"] > 0.5, share


def test_two_guides_steer_together(steered):
    hits = {
        guide: sum(judge_text(row["continuation"])[:2] == ("negative", "food") for row in steered[guide])
        for guide in ("none", "negative:20,food:20")
    }
    assert hits["negative:20,food:20"] > hits["none"] + 4, hits


def test_sample_writes_what_it_promises(steered):
    rows = steered["sentiment=negative"]
    assert len(rows) == 48
    for row in rows:
        assert set(row) == {"prefix", "continuation", "guide", "seed", "similarity", "probes"}
        assert row["guide"] == "sentiment=negative" and row["seed"] == 5
        assert set(row["probes"]) == {"sentiment", "topic"}
        assert sum(row["probes"]["sentiment"].values()) == pytest.approx(1, abs=1e-3)


def test_the_same_command_gives_the_same_text_and_another_seed_another(project):
    commands = [f"sample.py --steps 3 --num_samples 2 --seed {seed}" for seed in (1, 1, 2)]
    one, again, other = side_by_side(commands, project)
    assert one == again != other
    assert len(one.splitlines()) == 2 and one.strip()  # with no prefix at all


@pytest.mark.parametrize("prefixes, options", [("Hi", {}), ([], {}), (["Hi"], {"guide": None})])
def test_what_python_passes_wrongly_is_named(project, prefixes, options):
    with pytest.raises(InputError, match="must be a"):
        list(DGLM(f"{project}/out/toy").generate(prefixes, **options))


def test_the_judge_reads_the_samples(project, steered):
    table = python("prepare.py --judge none.jsonl", project).splitlines()
    assert table[1].split()[:2] == ["none", "48"] and len(table) == 2


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_other_samplers_and_classifier_free_guidance_run(project, sampler):
    assert python(f"sample.py --sampler {sampler} --steps 3 --cfg_scale 2 --guide sports:5", project).strip()


def test_prepare_resumes_to_the_same_bytes(project, tmp_path, monkeypatch):
    code = "import prepare, configurator; prepare.SHARD = 64; configurator.run(prepare.main, vars(prepare), "
    code += "['config/toy.py', '--max_documents=300'])"
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
        shutil.copytree(project / "config", folder / "config")
    monkeypatch.setenv("PYTHONPATH", str(project))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    undisturbed = subprocess.Popen([sys.executable, "-c", code], cwd=folders[0], stderr=subprocess.DEVNULL)
    kill_when(["-c", code], folders[1], lambda: os.path.exists(folders[1] / "data/toy/progress.json"))
    assert undisturbed.wait() == 0 and not os.path.exists(folders[1] / "data/toy/meta.json")
    subprocess.run([sys.executable, "-c", code], cwd=folders[1], check=True, capture_output=True)
    assert digest(folders[0] / "data") == digest(folders[1] / "data")


@pytest.fixture(scope="module")
def undisturbed(project):
    """Both trainings, never stopped, in out/whole."""
    side_by_side([f"{DECODER} --muon=0.02 --out_dir=out/whole", f"{DIFFUSION} --out_dir=out/whole"], project)


@pytest.mark.parametrize("name, command", [("decoder", f"{DECODER} --muon=0.02"), ("diffusion", DIFFUSION)])
def test_training_resumes_to_the_same_losses_and_weights(project, undisturbed, name, command, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the undisturbed, or sums differ in their last bits

    def saved():
        path = project / f"out/killed/{name}.json"
        return path.exists() and json.loads(path.read_text())["step"] == 10

    kill_when([*command.split(), "--out_dir=out/killed"], project, saved)
    said = python(f"{command} --out_dir=out/killed", project)
    assert "at step 10" in said
    whole, killed = (json.loads((project / f"out/{f}/{name}.json").read_text()) for f in ("whole", "killed"))
    assert [h["train"] for h in whole["history"]] == [h["train"] for h in killed["history"]]
    assert whole["history"] == killed["history"]
    assert whole["weights"]["sha256"] == killed["weights"]["sha256"]
    assert whole["state"]["sha256"] == killed["state"]["sha256"]


def test_ctrl_c_saves_and_the_same_command_continues(project, undisturbed, monkeypatch):
    """Interrupted in step 8, between two checkpoints; the end is that of a run never stopped."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = f"""import os, signal, configurator, train_diffusion
original = configurator.generator_at
def generator_at(device, *numbers):
    if numbers[1:] == (0, 7):
        os.kill(os.getpid(), signal.SIGINT)
    return original(device, *numbers)
configurator.generator_at = generator_at
arguments = {DIFFUSION.split()[1:]} + ["--out_dir=out/stopped"]
configurator.run(train_diffusion.main, vars(train_diffusion), arguments)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert done.returncode == 130 and "saved at step 8; the same command continues" in done.stderr
    assert "at step 8" in python(f"{DIFFUSION} --out_dir=out/stopped", project)
    ends = [json.loads((project / f"out/{f}/diffusion.json").read_text()) for f in ("whole", "stopped")]
    assert ends[0]["history"] == ends[1]["history"]
    assert ends[0]["state"]["sha256"] == ends[1]["state"]["sha256"]


def test_a_gradient_that_is_not_finite_is_left_out_and_counted(project):
    """The weights do not move by it, and the log shows that it happened."""
    code = f"""import torch, configurator, train_diffusion
original = torch.nn.utils.clip_grad_norm_
torch.nn.utils.clip_grad_norm_ = lambda p, n: original(p, n) * (float("inf") if next(steps) == 3 else 1)
steps = iter(range(99))
arguments = {DIFFUSION.split()[1:]} + ["--out_dir=out/inf"]
configurator.run(train_diffusion.main, vars(train_diffusion), arguments)"""
    subprocess.run([sys.executable, "-c", code], cwd=project, check=True, capture_output=True)
    history = json.loads((project / "out/inf/diffusion.json").read_text())["history"]
    assert [record.get("overflows") for record in history] == [1, None]


def test_gradient_accumulation_sees_the_same_rows():
    """Twice 32 rows a step read the epoch in the order in which once 64 rows read it."""
    once = batch_index(1000, 64, 3, seed=1)
    twice = np.concatenate([batch_index(1000, 32, n, seed=1) for n in (6, 7)])
    assert (once == twice).all()
    epoch = np.concatenate([batch_index(1000, 50, n, seed=1) for n in range(20)])
    assert sorted(epoch) == list(range(1000))


# ---- bad input: one line on standard error, exit status 2 ----


FILES = {
    "empty.jsonl": "",
    "no_text.jsonl": '{"text": "fine"}\n{"body": "no"}\n',
    "not_json.jsonl": '{"text": "fine"}\nplain words\n',
    "one_label.jsonl": '{"text": "fine", "label": "x"}\n' * 20,
    "no_label.jsonl": '{"text": "fine"}\n',
    "few.jsonl": '{"text": "fine", "label": "x"}\n' * 20 + '{"text": "bad", "label": "y"}\n',
    "blank.txt": "\n\n",
    "toy.txt": "Not the toy.",
    "binary.txt": b"\xff\xfe\x00",
    "cut.jsonl.gz": b"\x1f\x8b\x08\x00\x00\x00",
    "bad.tiktoken": "no ranks here",
    "no_bytes.tiktoken": "".join(
        f"{base64.b64encode(bytes([65 + i // 256, i % 256]) if i < 512 else bytes([i % 256])).decode()} {i}\n"
        for i in range(768)
    ),
}
MINI = "--encoder=all-MiniLM-L6-v2 --tokenizer=data/toy/tokenizer.tiktoken --vocab_size=300"

BAD = [
    ("sample.py --num_sample=3", "did you mean num_samples?"),
    ("sample.py --steps=many", "steps must be a whole number"),
    ("sample.py --steps=0", "steps=0"),
    ("sample.py --sampler=euler", "unknown sampler"),
    ("sample.py --guide=sad", "no probe has a class 'sad'"),
    ("sample.py --out_dir=nowhere", "nowhere/decoder.json is missing"),
    ("sample.py --prefix=FILE:nowhere.txt", "nowhere.txt"),
    ("sample.py --prefix=FILE:blank.txt", "holds no line"),
    ("sample.py --prefix=FILE:long.txt", "too long"),
    ("sample.py --sigma2=2", "sigma2=2.0"),
    ("sample.py --top_p=0", "top_p"),
    ("sample.py --device=gpu", "no device 'gpu'"),
    ("sample.py --device=cuda:77", "no device 'cuda:77'"),
    ("sample.py --out=nowhere/s.jsonl --steps=1", "cannot write nowhere/s.jsonl"),
    ("sample.py config/none.py", "cannot read config file"),
    (f"prepare.py --dataset=empty.jsonl {MINI}", "gave 0 windows"),
    (f"prepare.py --dataset=blank.txt {MINI}", "gave 0 windows"),
    (f"prepare.py --dataset=no_text.jsonl {MINI}", 'no_text.jsonl, row 2: no field "text"'),
    (f"prepare.py --dataset=not_json.jsonl {MINI}", "not_json.jsonl, line 2"),
    (f"prepare.py --dataset=binary.txt {MINI}", "binary.txt"),
    (f"prepare.py --dataset=cut.jsonl.gz {MINI}", "cannot read cut.jsonl.gz"),
    (f"prepare.py --dataset=nowhere.txt {MINI}", "there is no dataset 'nowhere.txt'"),
    ("prepare.py --dataset=blank.txt --tokenizer=bad.tiktoken", "bad.tiktoken"),
    (
        "prepare.py --dataset=blank.txt --tokenizer=data/toy/tokenizer.tiktoken --vocab_size=9999",
        "does not have 9999 entries",
    ),
    ("prepare.py config/toy.py --block_size=20", "made with other max_documents, block_size"),
    (f"prepare.py --dataset=blank.txt {MINI[:-3]}257 --tokenizer=no_bytes.tiktoken", "lack a byte"),
    ("prepare.py --judge=no_text.jsonl", "not a file of sample.py"),
    ("probes.py", "say --data"),
    ("probes.py --data=one_label.jsonl", "the only label is 'x'"),
    ("probes.py --data=no_label.jsonl", 'row 1: no field "label"'),
    ("probes.py --data=few.jsonl", "only 1 rows with the label 'y'"),
    ("probes.py --data=empty.jsonl", "holds no labelled text"),
    ("probes.py --data=few.jsonl --name=../few", "a name, not a path"),
    ("probes.py --data=few.jsonl,data/few.jsonl", "two would make one probe"),
    ("probes.py --data=mystery", "sentiment, toxicity, topic"),
    ("train_decoder.py --dataset=unprepared", "is not prepared"),
    ("train_decoder.py --dataset=toy.txt", "was prepared from toy, not from toy.txt"),
    ("train_decoder.py config/toy.py --out_dir=out/x --init_from=out/toy", "config.json is missing"),
    ("train_decoder.py config/toy.py --out_dir=blank.txt", "File exists: blank.txt"),
    ("train_decoder.py config/toy.py --n_embd=192", "holds a network of other sizes"),
    ("train_decoder.py config/toy.py --muon=0.02", "was trained without Muon"),
    ("train_decoder.py config/toy.py --out_dir=out/x --batch_size=0", "batch_size=0: must be at least 1"),
    ("train_decoder.py config/toy.py --out_dir=out/x --eval_rows=0", "eval_rows=0: must be at least 1"),
    ("train_decoder.py config/toy.py --out_dir=out/x --soft_tokens=0", "K=0"),
    ("train_decoder.py config/toy.py --out_dir=out/x --n_head=0", "n_head=0"),
    ("train_decoder.py config/toy.py --out_dir=out/x --grad_clip=0", "grad_clip=0.0: must be above 0"),
    ("train_decoder.py config/toy.py --out_dir=out/x --beta1=1", "beta1=1.0"),
    ("train_decoder.py config/toy.py --out_dir=out/x --noise_scale=inf", "noise_scale=inf"),
    ("train_decoder.py config/toy.py --out_dir=out/x --batch_size=1000000000000000", "out of memory"),
    ("train_diffusion.py config/toy.py --out_dir=out/x --null_probability=2", "null_probability=2.0"),
    ("probes.py config/toy.py --weight=-5", "weight=-5.0"),
    ("train_decoder.py config/toy.py --seed=-1", "seed=-1"),
    ("train_diffusion.py config/toy.py --out_dir=out/x --width=0", "d=0 must divide by 64"),
    (
        "train_diffusion.py config/toy.py --out_dir=out/x --learning_rate=1e20 --eval_interval=3",
        "whose batch begins with row",
    ),
    (
        "train_decoder.py config/toy.py --out_dir=out/x --learning_rate=inf --eval_interval=1 --eval_rows=8",
        "validation after step 1, whose batch begins with row",
    ),
    ("sample.py --cfg_scale=inf --steps=2", "the diffusion diverged"),
    ("sample.py --device=meta", "no device 'meta'"),
    ("train_diffusion.py config/toy.py --layers=3", "n=3 by 2"),
]


@pytest.fixture(scope="session")
def bad_files(project):
    for name, content in FILES.items():
        (project / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (project / "long.txt").write_text("The soup was really excellent. " * 20)


@pytest.mark.parametrize("command, message", BAD, ids=[c for c, _ in BAD])
def test_bad_input_is_one_clear_line(project, bad_files, command, message, capsys, monkeypatch):
    status, line = call(project, command, capsys, monkeypatch)
    assert status == 2 and message in line and line.startswith(command.split()[0])


def spoil(folder, project, change):
    """A copy of the toy's model in out/NAME, with one thing changed."""
    target = project / "out" / folder
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(project / "out/toy", target)
    change(target)


def cut_weights(target):
    (path,) = glob.glob(f"{target}/decoder-??????.safetensors")
    os.truncate(path, os.path.getsize(path) // 2)


def flip_a_byte(target):
    (path,) = glob.glob(f"{target}/diffusion-??????.safetensors")
    with open(path, "r+b") as f:
        f.seek(-1000, os.SEEK_END)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 1]))


def edit_json(name, **changes):
    def change(target):
        meta = json.loads((target / name).read_text())
        for path, value in changes.items():
            *parents, last = path.split("__")
            node = meta
            for parent in parents:
                node = node[parent]
            node[last] = value
        write_json(target / name, {k: v for k, v in meta.items() if k != "sha256"})

    return change


def flip_a_digit(target):
    text = (target / "decoder.json").read_text()
    at = text.index('"mean"') + 20
    at += next(i for i, c in enumerate(text[at:]) if c.isdigit())
    (target / "decoder.json").write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])


def foreign_probe(target):
    fields = dict(np.load(target / "probes/topic.npz"))
    np.savez(target / "probes/topic.npz", **fields | {"encoder": np.array("sentence-t5-xl")})


def no_probe(target):
    (target / "probes/topic.npz").write_bytes(b"PK\x03\x04 cut short")


def narrow_probe(target):
    fields = dict(np.load(target / "probes/topic.npz"))
    np.savez(target / "probes/topic.npz", **fields | {"coef": fields["coef"][:, :100]})


def nan_probe(target):
    fields = dict(np.load(target / "probes/topic.npz"))
    np.savez(target / "probes/topic.npz", **fields | {"weight": np.nan})


def decoder_for_diffusion(target):
    shutil.copy(target / "decoder.json", target / "diffusion.json")


def other_tokenizer(target):
    lines = (target / "tokenizer.tiktoken").read_bytes().splitlines(keepends=True)
    (target / "tokenizer.tiktoken").write_bytes(b"".join(lines[:-1]))


SPOILT = [
    (cut_weights, "damaged or cut short"),
    (flip_a_byte, "is damaged"),
    (edit_json("decoder.json", network__gpt__n_embd=256), "has other shapes"),
    (edit_json("diffusion.json", format=99), "has format 99"),
    (flip_a_digit, "decoder.json is damaged, or was edited"),
    (edit_json("diffusion.json", data__encoder="other"), "trained on different data"),
    (lambda target: (target / "decoder.json").write_text("{"), "cannot read"),
    (foreign_probe, "is a probe of the encoder sentence-t5-xl"),
    (no_probe, "is not a probe of"),
    (narrow_probe, "is for embeddings of 100, not 384"),
    (nan_probe, "its numbers do not fit"),
    (decoder_for_diffusion, "is a checkpoint of the decoder"),
    (other_tokenizer, "is not the tokenizer"),
]


@pytest.mark.parametrize("change, message", SPOILT, ids=[m for _, m in SPOILT])
def test_a_spoilt_model_is_named(project, change, message, capsys, monkeypatch):
    spoil("spoilt", project, change)
    status, line = call(project, "sample.py --out_dir=out/spoilt", capsys, monkeypatch)
    assert status == 2 and message in line
    shutil.rmtree(project / "out/spoilt")


def test_starting_over_replaces_even_a_checkpoint_of_another_version(project):
    spoil("old", project, edit_json("decoder.json", format=99))
    python(f"{DECODER} --out_dir=out/old --max_iters=1 --eval_interval=1 --resume=False", project)
    assert json.loads((project / "out/old/decoder.json").read_text())["step"] == 1
    shutil.rmtree(project / "out/old")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("format", 99, "has format 99"),
        ("encoder", "other", "trained on other data"),
        ("tokenizer", "other", "trained on other data"),
    ],
)
def test_data_of_another_kind_is_refused(project, name, value, message, capsys, monkeypatch):
    """Another format version; another encoder or tokenizer than the model's."""
    path = project / "data/toy/meta.json"
    before = path.read_text()
    write_json(path, {k: v for k, v in json.loads(before).items() if k != "sha256"} | {name: value})
    try:
        status, line = call(project, "train_diffusion.py config/toy.py", capsys, monkeypatch)
    finally:
        path.write_text(before)
    assert status == 2 and message in line


def test_a_flipped_bit_of_the_data_is_named(project, capsys, monkeypatch):
    path = project / "data/toy/train/cont_emb.npy"
    before = path.read_bytes()
    path.write_bytes(before[:5000] + bytes([before[5000] ^ 1]) + before[5001:])
    try:
        status, line = call(project, "train_diffusion.py config/toy.py", capsys, monkeypatch)
    finally:
        path.write_bytes(before)
    assert status == 2 and "data/toy/train/cont_emb.npy is missing or damaged" in line


def after(code, command):
    """What runs the script once the code has changed the process that it runs in."""
    begin = f"import runpy, sys; {code}; sys.argv = sys.argv[1:]; sys.path.insert(0, '')"
    end = "runpy.run_path(sys.argv[0], run_name='__main__')"
    return [sys.executable, "-c", f"{begin}; {end}", *command.split()]


def test_a_full_disk_is_one_clear_line_and_the_old_checkpoint_stands(project):
    python(f"{DECODER} --out_dir=out/full --max_iters=10", project)
    before = digest(project / "out/full")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))"
    command = after(limit, f"{DECODER} --out_dir=out/full")
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot write out/full/decoder-000020" in done.stderr.splitlines()[-1]
    assert digest(project / "out/full") == before


def test_no_network_is_one_clear_line_that_names_the_offline_way(project, bad_files):
    env = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(project / "hf"),
        "HF_HUB_OFFLINE": "0",
    }
    commands = {
        "probes.py --data=topic --out_dir=out/toy": "SetFit/ag_news",
        "train_decoder.py config/toy.py --out_dir=out/x --init_from=gpt2": "openai-community/gpt2",
        f"prepare.py --dataset=one_label.jsonl {MINI} --encoder=org/sentence-t5-xl": "org/sentence-t5-xl",
    }
    options = {"cwd": project, "env": env, "stderr": subprocess.PIPE, "text": True}
    hasten = "import time; time.sleep = lambda seconds: None"  # the hub's client tries for some 20 seconds
    running = {name: subprocess.Popen(after(hasten, c), **options) for c, name in commands.items()}
    for name, process in running.items():
        last = process.communicate()[1].splitlines()[-1]
        assert process.returncode == 2 and name in last and "without a network" in last


def test_a_refused_run_leaves_the_model_as_it_was(project, capsys, monkeypatch):
    """Preparing a file that has grown since; training on other data into a finished model's folder."""
    row = '{"text": "A cat sat on the mat."}\n'
    (project / "no_label_texts.jsonl").write_text(row * 3)
    prepare = f"prepare.py --dataset no_label_texts.jsonl {MINI}"
    python(prepare, project)
    (project / "no_label_texts.jsonl").write_text(row * 4)
    status, line = call(project, prepare, capsys, monkeypatch)
    assert status == 2 and "made with other size of files" in line
    before = digest(project / "out/toy")
    command = (
        "train_decoder.py config/toy.py --dataset=no_label_texts.jsonl --out_dir=out/toy --max_iters=999"
    )
    status, line = call(project, command, capsys, monkeypatch)
    assert status == 2 and "trained on other data" in line
    assert digest(project / "out/toy") == before
