"""The measures of eval.py, its judges, and every task on the toy. Run: python -m pytest tests/test_eval.py"""

import http.server
import json
import math
import shutil
import threading

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from conftest import call, kill_when, python
from hypothesis import given
from hypothesis import strategies as st
from mauve.compute_mauve import compute_mauve

import eval as evaluation
from prepare import toy_documents

SIZES = """
judges = "judge.jsonl,judge_topic.jsonl"
judge_lm = "judge_lm"
num_texts = 24
prefix_tokens = 10
new_tokens = 12
cfg_scales = "1,3"
plain_temperatures = "1"
noise_levels = "0,1"
prompts = "On Friday a friend and I made a plan.|In March my sister and I met again."
num_samples = 4
attributes = "negative,sports"
weights = "20"
pairs = "negative+sports"
lengths = "8,999"
batch_sizes = "1,4"
samplers = "ddpm 6,dpm++ 3"
seeds = 2
steps = 4
sampler = "dpm++"
"""


# ---- measures ----


def test_mauve_agrees_with_the_reference_package():
    """On the same features and clusters, and on the whole where the clusters are plain to see."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 32)) * 5
    a, b = (centres[rng.choice(20, 200, p=p)] for p in (rng.dirichlet([1] * 20), rng.dirichlet([2] * 20)))
    a, b = (x + rng.normal(size=x.shape) * 0.01 for x in (a, b))
    theirs = compute_mauve(a, b, verbose=False)
    assert evaluation.mauve(theirs.p_hist, theirs.q_hist) == pytest.approx(theirs.mauve, abs=1e-6)
    assert evaluation.mauve(*evaluation.histograms(a, b, seed=0)) == pytest.approx(theirs.mauve, abs=0.01)


@given(st.lists(st.integers(0, 9), min_size=3, max_size=8).filter(lambda x: sum(x) > 0))
def test_mauve_is_one_for_the_same_and_falls_to_nothing_for_disjoint_histograms(counts):
    p = np.array(counts) / sum(counts)
    none = np.zeros_like(p)
    assert evaluation.mauve(p, p) == pytest.approx(1)
    assert evaluation.mauve(np.append(p, none), np.append(none, p)) < 0.01


def test_frechet_distance_of_gaussians_is_the_closed_form():
    """N(0, 1) against N(m, s^2), in each of 5 dimensions: m^2 + (1 - s)^2."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40_000, 5)), 2 + 3 * rng.normal(size=(40_000, 5))
    assert evaluation.frechet(a, b) == pytest.approx(5 * (2**2 + (1 - 3) ** 2), rel=0.02)
    assert evaluation.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_neighbours_are_at_chance_for_one_source_and_certain_for_two():
    x = np.random.default_rng(0).normal(size=(2000, 4))
    assert evaluation.neighbour_accuracy(x[:1000], x[1000:]) == pytest.approx(0.5, abs=0.05)
    assert evaluation.neighbour_accuracy(x[:1000], x[1000:] + 100) == 1


def test_diversity_counts_repeated_n_grams():
    assert evaluation.diversity(["a b c d e f"]) == 1
    assert evaluation.diversity(["a b c d", "a b c d"]) == 1 / 8  # half of each of three kinds
    assert evaluation.distinct_3(["a b c", "a b c"]) == 1 / 6  # over words


# ---- judges ----


@pytest.fixture(scope="module")
def judge_lm(tmp_path_factory):
    """A tiny random GPT-2 with a tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("judge") / "judge_lm"
    letters = {chr(c): i for i, c in enumerate(range(32, 127))} | {"<|endoftext|>": 95}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=2, bos_token_id=95, eos_token_id=95
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_perplexity_is_of_the_text_given_its_prefix(judge_lm):
    """In batches of several lengths as one by one in transformers, whatever the text; none costs nothing."""
    prefixes, written = ["The food", "A much longer prefix than that", ""], [" was good", "", "<|endoftext|>"]
    nats, tokens, features = evaluation.LanguageModel(str(judge_lm), "cpu").read(prefixes, written)
    model = transformers.AutoModelForCausalLM.from_pretrained(judge_lm)
    for prefix, text, nat, count in zip(prefixes, written, nats, tokens):
        row = torch.tensor([[95, *(ord(c) - 32 for c in prefix + text)]])
        each = F.cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="none")
        assert count == len(text)
        assert nat == pytest.approx(each[len(prefix) :].sum().item(), rel=0.02, abs=1e-6)
    assert features.shape == (3, 32)


def test_perspective_waits_where_it_is_told_to(monkeypatch):
    """Against a server that first says 429, too many requests, and then answers."""
    asked = []

    class Perspective(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200 if len(asked) > 1 else 429)
            self.end_headers()
            score = {"attributeScores": {"TOXICITY": {"summaryScore": {"value": 0.25}}}}
            self.wfile.write(json.dumps(score).encode())

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Perspective)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(evaluation, "PERSPECTIVE", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("PERSPECTIVE_API_KEY", "key")
    waits = []
    monkeypatch.setattr(evaluation.time, "sleep", waits.append)
    assert evaluation.perspective("you fool") == 0.25
    server.shutdown()
    assert [body["comment"]["text"] for body in asked] == ["you fool"] * 2
    assert sum(waits) >= 3  # a second before each, and one more after the refusal


# ---- every task, on the toy ----


@pytest.fixture(scope="module")
def evaluated(project, judge_lm):
    """The project, with judges that the probes know nothing of, in which every task has run."""
    shutil.copytree(judge_lm, project / "judge_lm", dirs_exist_ok=True)
    (project / "config/small.py").write_text(SIZES)
    documents = [document for document, _ in zip(toy_documents(99), range(400))]
    for name, at in (("judge", 1), ("judge_topic", 2)):
        rows = (json.dumps({"text": row[0], "label": row[at]}) + "\n" for row in documents)
        (project / f"{name}.jsonl").write_text("".join(rows))
    return project, python("eval.py config/small.py --task all --out_dir out/toy", project)


def read(project, name, folder="results"):
    whole = json.loads((project / folder / f"{name}.json").read_text())
    return whole, {row.pop("row"): row for row in whole["table"]}


def test_every_task_writes_its_table_and_its_raw_numbers(evaluated):
    project, said = evaluated
    for name in ("generation", "noise", "control", "compose", "runtime"):
        whole, rows = read(project, name)
        assert whole["configuration"]["seed"] == 1337 and whole["versions"]["torch"]
        assert all(f"| {row} |" in said for row in rows)
        assert all(math.isfinite(mean) for row in rows.values() for mean, _ in row.values())
        assert not (project / f"results/{name}.partial.jsonl").exists()
    assert set(read(project, "generation")[1]) == {
        "reference",
        "plain decoder, temperature 1",
        "true embedding",
        "w 1",
        "w 3",
    }
    timed = {"batch 1, tokens 8", "batch 4, tokens 8", "ddpm 6", "dpm++ 3"}
    assert set(read(project, "runtime")[1]) == timed
    assert len(read(project, "control")[0]["cells"]["negative:20/0/0"]["text"]) == 4


def test_the_tables_tell_what_the_method_promises(evaluated):
    """A guide moves its attribute and noise drowns the proposal, by judges that saw neither."""
    control, noise = read(evaluated[0], "control")[1], read(evaluated[0], "noise")[1]
    score = "score (judge.jsonl)"
    assert control["negative 20"][score][0] > control["negative 0"][score][0] + 0.1
    assert noise["sigma2 0"]["similarity"][0] > noise["sigma2 1"]["similarity"][0]


def test_a_killed_evaluation_continues_to_the_same_bytes(evaluated, capsys, monkeypatch):
    project, _ = evaluated
    command = "eval.py config/small.py --task control --out_dir out/toy --results killed"
    partial = project / "killed/control.partial.jsonl"
    kill_when(command.split(), project, lambda: partial.exists() and partial.read_bytes().count(b"\n") > 4)
    whole = partial.read_bytes()
    partial.write_bytes(whole.replace(b"0.1", b"0.2", 1))
    status, line = call(project, command, capsys, monkeypatch)
    assert status == 2 and "control.partial.jsonl is damaged" in line
    partial.write_bytes(whole + b'["torn')
    python(command, project)
    path, whole = project / "killed/control.json", (project / "results/control.json").read_bytes()
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b"0.1", b"0.2", 1))
    status, line = call(project, command, capsys, monkeypatch)
    assert status == 2 and "control.json is damaged" in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--task nothing", "task='nothing': must be"),
        ("--task control --attributes sad", "no probe has a class 'sad'"),
        ("--task control --judges judge_topic.jsonl --results r", "knows 'negative'"),
        ("--task control --weights 5,x --results r", "must be numbers"),
        ("--task control --sigma2 0.1", "made with other sigma2"),
        ("--task noise --noise_levels 0,2 --results r", "sigma2=2.0"),
        ("--task control --sampler eulr --results r", "unknown sampler"),
        ("--task compose --pairs negative --results r", "must be two classes"),
        ("--task runtime --samplers ddpm --results r", "names with their steps"),
        ("--task noise --judge_lm config --results r", "cannot load config"),
        ("--task control --judges vaderr --results r", "did you mean vader?"),
        ("--task noise --texts nowhere.jsonl --results r", "nowhere.jsonl"),
        ("--task noise --num_texts 4 --results r", "num_texts=4: must be at least 20"),
        ("--task noise --new_tokens 900 --results r", "only 0 held-out texts"),
    ],
)
def test_bad_input_is_one_clear_line(evaluated, arguments, message, capsys, monkeypatch):
    status, line = call(
        evaluated[0], f"eval.py config/small.py --out_dir=out/toy {arguments}", capsys, monkeypatch
    )
    assert status == 2 and message in line
