"""Two processes of torchrun do what one does. Run: python -m pytest tests/test_processes.py"""

import json

import numpy as np
import pytest
from conftest import python, side_by_side

SMALL = "--max_iters=6 --eval_interval=3 --eval_rows=32 --gradient_accumulation=2 --batch_size=16"


TWO = "-m torch.distributed.run --standalone --nproc_per_node=2"  # over gloo, on the loopback address


@pytest.mark.parametrize("script", ["train_decoder", "train_diffusion"])
def test_two_processes_train_as_one_does(project, script):
    """The same total batch gives the same losses and weights, to rounding."""
    command = f"{script}.py config/toy.py {SMALL}"
    one, two = f"{command} --out_dir=out/one_{script}", f"{TWO} {command} --out_dir=out/two_{script}"
    side_by_side([one, two], project)
    name = script.removeprefix("train_")
    one, two = (
        json.loads((project / f"out/{f}_{script}/{name}.json").read_text())["history"] for f in ("one", "two")
    )
    assert [record["step"] for record in two] == [3, 6]
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)


def test_two_processes_prepare_the_windows_of_one(project, tmp_path):
    """In another order, and with the same mean and deviation."""
    python(f"{TWO} {project}/prepare.py {project}/config/toy.py --max_documents=1200", tmp_path)
    one, two = (json.loads((folder / "data/toy/meta.json").read_text()) for folder in (project, tmp_path))
    assert one["N"] == two["N"] and one["tokenizer"] == two["tokenizer"]
    assert one["mean"] == pytest.approx(two["mean"], abs=1e-4)
    assert one["std"] == pytest.approx(two["std"], abs=1e-4)
    assert not list((tmp_path / "data/toy").glob("part-*"))
    for split in ("train", "val"):
        rows = [np.load(folder / f"data/toy/{split}/tokens.npy") for folder in (project, tmp_path)]
        assert sorted(map(tuple, rows[0])) == sorted(map(tuple, rows[1]))
