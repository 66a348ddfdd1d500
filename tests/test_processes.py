"""More than one process. Run: python -m pytest tests/test_processes.py"""

import numpy as np
import pytest
from conftest import TRAININGS, python, side_by_side

from storage import load_weights

TWO = "-m torch.distributed.run --standalone --nproc_per_node=2"  # over gloo, on the loopback address


@pytest.fixture(scope="module")
def by_two(project, undisturbed):
    """Both trainings by two processes, in out/two."""
    side_by_side([f"{TWO} {command} --out_dir=out/two" for command in TRAININGS.values()], project)


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_as_one_does(project, by_two, name):
    """The same total batch: other random numbers, but the same loss to a few percent."""
    one, two = (load_weights(f"{project}/out/{f}", name)[0]["history"] for f in ("whole", "two"))
    assert [record["step"] for record in two] == [10, 20]
    assert two[1]["loss"] < two[0]["loss"]
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=0.02)


def test_several_devices_embed_as_one_does(project, tmp_path):
    python(f"{project}/prepare.py {project}/config/toy.py --max_documents=60 --device=cpu,cpu", tmp_path)
    one, two = (np.load(folder / "data/toy/train/cont_emb.npy") for folder in (project, tmp_path))
    np.testing.assert_allclose(two, one[: len(two)], atol=0.01)
