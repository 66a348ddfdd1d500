"""Two processes of torchrun do what one does. Run: python -m pytest tests/test_processes.py"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import python

SMALL = "--max_iters=6 --eval_interval=3 --eval_rows=32 --gradient_accumulation=2 --batch_size=16"


def torchrun(command, cwd):
    """The command in two processes, which meet over gloo on the loopback address."""
    prefix = "-m torch.distributed.run --standalone --nproc_per_node=2"
    done = subprocess.run(
        [sys.executable, *prefix.split(), *command.split()], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["train_decoder", "train_diffusion"])
def test_two_processes_train_as_one_does(project, script):
    """The same total batch gives the same losses and weights, to rounding."""
    command = f"{script}.py config/toy.py {SMALL}"
    python(f"{command} --out_dir=out/one_{script}", project)
    torchrun(f"{command} --out_dir=out/two_{script}", project)
    name = script.removeprefix("train_")
    one, two = (
        json.loads((project / f"out/{f}_{script}/{name}.json").read_text())["history"] for f in ("one", "two")
    )
    assert [record["step"] for record in two] == [3, 6]
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)


def test_two_processes_prepare_the_windows_of_one(project, tmp_path):
    """In another order, and with the same mean and deviation."""
    shutil.copytree(project / "config", tmp_path / "config")
    for path in project.glob("*.py"):
        shutil.copy(path, tmp_path)
    command = "prepare.py config/toy.py --max_documents=101"
    torchrun(command, tmp_path)
    shutil.move(tmp_path / "data", tmp_path / "two")
    python(command, tmp_path)
    one, two = (json.loads((tmp_path / f"{f}/toy/meta.json").read_text()) for f in ("data", "two"))
    assert one["N"] == two["N"] and one["tokenizer"] == two["tokenizer"]
    assert one["mean"] == pytest.approx(two["mean"], abs=1e-4)
    assert one["std"] == pytest.approx(two["std"], abs=1e-4)
    assert not list((tmp_path / "two/toy").glob("part-*"))
    for split in ("train", "val"):
        rows = [np.load(tmp_path / f"{f}/toy/{split}/tokens.npy") for f in ("data", "two")]
        assert sorted(map(tuple, rows[0])) == sorted(map(tuple, rows[1]))
