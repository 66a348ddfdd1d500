"""Killed again and again, at random moments, every long script ends as if it had never been stopped.

This takes minutes, so it runs when asked: python -m pytest tests/test_kills.py --kills 20
"""

import random
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import TOY, digest, python
from test_eval import CONTROL, evaluated, judge_lm  # noqa: F401, two fixtures

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
    kills, (project, _) = request.config.getoption("--kills"), evaluated
    moments, result = random.Random(command), COMMANDS[command]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        shutil.copytree(project, folder, ignore=shutil.ignore_patterns("hf", "killed", "results"))
        if command.startswith("prepare"):
            shutil.rmtree(folder / "data")
            source = (folder / "prepare.py").read_text()
            (folder / "prepare.py").write_text(source.replace("SHARD = 1024", "SHARD = 64"))
    begin = time.perf_counter()
    python(command, whole)
    duration, expected = time.perf_counter() - begin, final(whole / result)
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
