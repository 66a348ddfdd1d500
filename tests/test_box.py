"""The model in the box, as a new user meets it: nothing trained, no hub, nothing else."""

import glob
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import side_by_side
from safetensors import safe_open

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BOX = f"{ROOT}/pretrained/reviews"
NEGATIVE = (
    r"\b(bad|worst|worse|awful|terrible|boring|waste|poor|poorly|stupid|dull|horrible|lame|fails?|annoying)\b"
)
POSITIVE = (
    r"\b(great|excellent|wonderful|best|love|loved|beautiful|amazing|perfect|superb|enjoyed|brilliant)\b"
)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a user has after the install: the scripts and the box."""
    folder = tmp_path_factory.mktemp("clone")
    for path in glob.glob(f"{ROOT}/*.py"):
        shutil.copy(path, folder)
    shutil.copytree(BOX, folder / "pretrained/reviews")
    with open(folder / "prefixes.txt", "w") as f:
        f.write(
            "The movie was\nI watched it with my friends and\nThe story\nThe actors\nThis film\nThe ending\n"
        )
    return folder


def test_the_readmes_first_command_writes_a_text(clone):
    command = ["sample.py", "--prefix", "The movie was", "--guide", "negative"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    options = {"cwd": clone, "capture_output": True, "text": True, "check": True, "env": offline}
    text = subprocess.run([sys.executable, *command], **options).stdout
    assert text.startswith("The movie was ") and len(text.split()) > 10


def test_the_two_sentiments_read_differently(clone):
    """By words that reviewers use, of which the probes know nothing."""
    command = "sample.py --prefix FILE:prefixes.txt --num_samples 6 --guide"
    texts = side_by_side([f"{command} negative", f"{command} positive"], clone, HF_HUB_OFFLINE="1")
    negative, positive = (len(re.findall(NEGATIVE, t)) - len(re.findall(POSITIVE, t)) for t in texts)
    assert negative > 5 and positive < -5


def test_the_box_is_small_and_says_what_it_is():
    """40 MiB at most, half precision, nothing for resuming; each probe knows how good it is."""
    files = [path for path in glob.glob(f"{BOX}/**", recursive=True) if os.path.isfile(path)]
    assert sum(map(os.path.getsize, files)) <= 40 * 2**20
    for path in glob.glob(f"{BOX}/*.safetensors"):
        with safe_open(path, "pt") as tensors:
            assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"F16"}
    for name in ("decoder", "diffusion"):
        with open(f"{BOX}/{name}.json") as f:
            meta = json.load(f)
        assert "state" not in meta and len(meta["history"]) > 5
    probes = {os.path.basename(path): np.load(path) for path in glob.glob(f"{BOX}/probes/*.npz")}
    assert set(probes) == {"sentiment.npz", "topic.npz", "toxicity.npz"}
    assert all(0.7 < float(probe["accuracy"]) < 1 for probe in probes.values())
