"""More than one process. Run: python -m pytest tests/test_processes.py"""

import multiprocessing

import numpy as np
import pytest
from conftest import TRAININGS, copy_scripts, python

from plumbing.files import load_weights

TWO = "-m torch.distributed.run --standalone --nproc_per_node=2"  # over gloo, on the loopback address


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_as_one_does(project, undisturbed, name):
    """On the same total batch with other random numbers, the loss is the same to a few percent."""
    python(f"{TWO} {TRAININGS[name]} --out_dir=out/two", project)
    one, two = (load_weights(f"{project}/out/{f}", name)[0]["history"] for f in ("whole", "two"))
    assert [record["step"] for record in two] == [10, 20]
    assert two[1]["loss"] < two[0]["loss"]
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=0.02)


def test_several_devices_embed_as_one_does(project, tmp_path, call):
    command = "prepare.py config/toy.py --max_documents=60 --val_every=10 --device=cpu,cpu"
    assert call(copy_scripts(tmp_path), command)[0] == 0
    for process in multiprocessing.active_children():
        process.kill()
    one, two = (np.load(folder / "data/toy/train/cont_emb.npy") for folder in (project, tmp_path))
    np.testing.assert_allclose(two, one[: len(two)], atol=0.01)
