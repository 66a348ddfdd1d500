"""Killed again and again, at random moments, every long script ends as if it had never been stopped.

This takes minutes, so it runs when asked: python -m pytest tests/test_kills.py --kills 20
"""

import random
import shutil
import subprocess
import sys
import time

import pytest
from conftest import digest, python
from test_eval import evaluated, judge_lm  # noqa: F401, two fixtures

SHORT = "config/toy.py --max_iters=40 --eval_interval=5 --eval_rows=32 --out_dir=out/new"
COMMANDS = {
    "prepare.py config/toy.py --max_documents=400": "data/toy",
    f"train_decoder.py {SHORT}": "out/new",
    f"train_diffusion.py {SHORT}": "out/new",
    "eval.py config/small.py --task control --out_dir=out/toy --results=new": "new",
}


@pytest.mark.parametrize("command", COMMANDS, ids=[command.split()[0] for command in COMMANDS])
def test_kills_at_random_moments_change_nothing(evaluated, command, request, tmp_path):  # noqa: F811
    kills = request.config.getoption("--kills")
    if not kills:
        pytest.skip("say --kills 20")
    moments, result = random.Random(command), COMMANDS[command]
    folders = [tmp_path / "undisturbed", tmp_path / "killed"]
    for folder in folders:
        shutil.copytree(evaluated[0], folder, ignore=shutil.ignore_patterns("hf", "killed", "results"))
        if command.startswith("prepare"):
            shutil.rmtree(folder / "data")
            source = (folder / "prepare.py").read_text()
            (folder / "prepare.py").write_text(source.replace("SHARD = 4096", "SHARD = 64"))
    begin = time.perf_counter()
    python(command, folders[0])
    duration, whole = time.perf_counter() - begin, digest(folders[0] / result)
    options = {"cwd": folders[1], "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    while kills:
        process = subprocess.Popen([sys.executable, *command.split()], **options)
        try:
            process.wait(moments.uniform(0, duration))
            assert digest(folders[1] / result) == whole  # it came to its end first: once more, from nothing
            shutil.rmtree(folders[1] / result)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills -= 1
    python(command, folders[1])
    assert digest(folders[1] / result) == whole
