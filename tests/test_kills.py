"""Killed again and again, at random moments, every long script ends as if it had never been stopped.

This takes minutes, so it runs when asked: python -m pytest tests/test_kills.py --kills 20. What always runs
is the test of a training that has lost its weights.
"""

import random
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import TOY, TRAININGS, digest, python
from test_eval import CONTROL, evaluated, judge_lm  # noqa: F401, two fixtures

from plumbing.files import load_weights

SHORT = f"{TOY} --eval_rows=32 --batch_size=16 --out_dir=out/new"
COMMANDS = {
    f"prepare.py {TOY} --max_documents=400": "data/toy",
    f"train_decoder.py {SHORT} --muon=0.02 --max_iters=8 --eval_interval=1": "out/new",
    f"train_diffusion.py {SHORT} --max_iters=40 --eval_interval=5": "out/new",
    f"{CONTROL} new": "new",
}
NOT_FINAL = (".pt", ".tmp", ".png")


def final(folder):
    """What a run leaves: its files, without the seconds that it took."""
    for path in folder.glob("*.jsonl"):
        path.write_text(re.sub(r'"seconds": [\d.e-]+', "", path.read_text()))
    return digest(folder, NOT_FINAL)


@pytest.mark.skipif("not config.getoption('--kills')", reason="say --kills 20")
@pytest.mark.parametrize("command", COMMANDS, ids=[command.split()[0] for command in COMMANDS])
def test_kills_at_random_moments_change_nothing(evaluated, command, request, tmp_path):  # noqa: F811
    """Of a training, its weights and what is saved with them: the losses of its validations too."""
    kills = request.config.getoption("--kills")
    project, _ = evaluated
    moments = random.Random(command)
    result = COMMANDS[command]
    undisturbed = tmp_path / "undisturbed"
    killed = tmp_path / "killed"
    for folder in (undisturbed, killed):
        shutil.copytree(project, folder, ignore=shutil.ignore_patterns("hf", "killed", "results"))
        if command.startswith("prepare"):
            shutil.rmtree(folder / "data")
            source = (folder / "prepare.py").read_text()
            (folder / "prepare.py").write_text(source.replace("SHARD = 1024", "SHARD = 64"))
    begin = time.perf_counter()
    python(command, undisturbed)
    duration = time.perf_counter() - begin
    expected = final(undisturbed / result)
    assert expected
    while kills:
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([sys.executable, *command.split()], cwd=killed, **options)
        try:
            process.wait(moments.uniform(0, duration))
            assert final(killed / result) == expected  # it came to its end: again, from nothing
            shutil.rmtree(killed / result)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills -= 1
    python(command, killed)
    assert final(killed / result) == expected


@pytest.mark.parametrize("name", TRAININGS)
def test_weights_that_were_removed_are_written_again_from_the_checkpoint(project, undisturbed, call, name):
    """Even if no step is left, and with what sampling needs beside them."""
    shutil.copytree(project / "out/whole", project / f"out/removed_{name}")
    removed = project / f"out/removed_{name}/{name}.safetensors"
    before = load_weights(removed.parent, name)
    removed.unlink()
    status, lines, _ = call(project, f"{TRAININGS[name]} --out_dir=out/removed_{name}")
    assert status == 0 and "nothing left to do" in lines[0]
    assert any("is missing: writing it again" in line for line in lines)
    after = load_weights(removed.parent, name)
    assert after[0]["history"] == before[0]["history"]
    assert all(torch.equal(weight, after[1][key]) for key, weight in before[1].items())
