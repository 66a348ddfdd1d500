"""Probes: how hard to steer is found from what the model writes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import probes
from model import DGLM, Probe, parse_guide

WRITES = {  # p(class) of the texts at each guidance weight, 0 first -> the weight that is found
    "more is better": ((0.2, 0.5, 0.7, 0.8, 0.9), 160),
    "no better than half of it": ((0.2, 0.5, 0.88, 0.9, 0.9), 80),
    "too much harms": ((0.2, 0.5, 0.6, 0.8, 0.7), 80),
    "always there": ((0.96, 0.9, 0.9, 0.9, 0.9), 20),  # a guide must not do nothing
    "never reached": ((0.1, 0.1, 0.15, 0.2, 0.25), 160),
    "sure": ((0.2, 0.94, 0.96, 1.0, 1.0), 40),
}


@pytest.mark.parametrize("case", WRITES)
def test_the_weight_is_the_one_with_the_most_control(case, monkeypatch, capsys):
    p, expected = WRITES[case]
    p_of = {f"yes:{w}": p for w, p in zip((0, *probes.WEIGHTS), p)}

    def log_prob(e):  # the texts carry their p(yes) as embeddings
        return torch.stack((1 - e, e), dim=1).log()

    def fit(e, labels, balance, surer=1):
        return SimpleNamespace(classes=["no", "yes"], log_prob=log_prob, coef=e_all, intercept=e_all)

    def generate(prefixes, guide, num_samples, *rest):
        return [(guide, torch.zeros(2))] * len(prefixes) * num_samples

    e_all = torch.zeros(30, 2)
    model = SimpleNamespace(
        generate=generate,
        encode=lambda texts: torch.tensor([p_of.get(text, 0.5) for text in texts]),
        tokenizer=SimpleNamespace(encode_ordinary=list, texts=lambda rows: list(map(str, rows))),
        proposal_tokens=8,
        device="cpu",
    )
    monkeypatch.setattr(probes, "fit", fit)
    texts = [f"text {i}" for i in range(30)]
    labels = ["no", "yes"] * 15
    assert probes.find_weights(model, e_all.numpy(), texts, labels, False)[1] == expected
    said = "even the best guide seldom makes a text yes" in capsys.readouterr().out
    assert said == (case == "never reached")


def test_a_chosen_penalty_is_as_strong_on_half_of_the_rows(monkeypatch):
    """As on nine tenths: C multiplies a sum over rows, so a probe of fewer rows needs a larger one."""
    monkeypatch.setattr(probes, "inverse_penalty", 3.0)
    e = np.random.default_rng(0).standard_normal((40, 4))
    labels = ["no", "yes"] * 20
    nine, five = (probes.fit(np.tile(e, (n, 1)), labels * n, False, surer) for n, surer in ((9, 1), (5, 1.8)))
    torch.testing.assert_close(nine.coef, five.coef, atol=1e-3, rtol=1e-3)


def test_a_text_counts_once(tmp_path):
    path = tmp_path / "mood.jsonl"
    rows = [(f"day {i % 12}", "good" if i % 12 < 6 else "bad") for i in range(40)]
    rows += [(f"night {i}", ("good", "bad")[i % 2]) for i in range(20)]
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    texts, labels = probes.read_labelled(str(path))
    assert len(texts) == len(set(texts)) == 32 and labels.count("good") == labels.count("bad") == 16


def test_the_probe_of_a_finished_model_knows_how_hard_to_steer(project):
    """Each class has a weight of its own, and it shows in a guide that says none."""
    probe = Probe.load(f"{project}/out/toy/probes/topic.npz")
    assert len(probe.guidance_weights) == len(probe.classes) == 4
    assert set(probe.guidance_weights) <= set(probes.WEIGHTS)
    model = DGLM(f"{project}/out/toy", "cpu")
    for label, weight in zip(probe.classes, probe.guidance_weights):
        (guide,) = parse_guide(label, model.probes)
        assert guide.weight == weight


def test_weight_and_penalty_may_be_chosen(project, call):
    rows = f"{project}/data/toy/sentiment.jsonl"
    options = "--name chosen --weight 33 --inverse_penalty 1000"
    status, lines, _ = call(project, f"probes.py --data {rows} --out_dir out/toy {options}")
    path = project / "out/toy/probes/chosen.npz"
    chosen = dict(np.load(path))
    path.unlink()
    assert status == 0 and chosen["weight"].tolist() == [33.0, 33.0]
    smooth = np.load(f"{project}/out/toy/probes/sentiment.npz")
    assert np.linalg.norm(chosen["coef"]) > 2 * np.linalg.norm(smooth["coef"])
