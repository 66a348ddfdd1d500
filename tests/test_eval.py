"""The measures and judges of eval.py, the peers, and every task on the toy."""

import json
import math
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from conftest import kill_when, python
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

import eval as evaluation
from model import DGLM, GPT, GPTConfig, Probe, Sampling
from peers import best_of_n, by_vectors, dexperts_logits, prompting, steering_vectors
from plumbing.decoding import Reader, decode
from plumbing.judges import LanguageModel, fit_judge, read_judge, scores
from plumbing.results import Results
from plumbing.toy import toy_documents

SIZES = """
out_dir = "out/toy"
judges = "judges/sentiment.npz,judges/topic.npz"
judge_lm = "judge_lm"
num_texts = 48
prefix_tokens = 10
new_tokens = 12
cfg_scales = "1,3"
plain_temperatures = "1"
sigma2s = "0,1"
prompts = "On Friday a friend and I made a plan.|In March my sister and I met again."
num_samples = 4
attributes = "negative,sports"
guidance_weights = "20"
guide_through = "estimate,network"
best_of = "3"
experts = "negative=out/toy+out/toy,sports=out/toy+out/toy"
expert_weights = "1"
vector_rows = "sentiment.jsonl,topic.jsonl"
vector_layer = 0
vector_weights = "1"
pairs = "negative+sports"
lengths = "8,999"
batch_sizes = "1,4"
seeds = 2
"""
WAYS = ["weight 0", "weight 20", "network, weight 20", "best of 3", "DExperts 1", "vector 1", "prompted"]
ALONE = ["none", "negative", "sports", "negative,sports", *WAYS[3:]]
ROWS = {
    "generation": ["reference", "true embedding", "plain decoder, temperature 1", "w 1", "w 3"],
    "noise": ["reference", "sigma2 0", "sigma2 1"],
    "control": [
        *(f"negative: {way}" for way in WAYS),
        *(f"sports: {way}" for way in WAYS),
    ],
    "compose": [f"negative+sports: {way}" for way in ALONE],
    "runtime": ["batch 1, tokens 8", "batch 4, tokens 8"],
}


# ---- measures ----


def test_distinct_counts_n_grams_that_did_not_occur_before_in_their_group():
    assert evaluation.distinct([["a b c", "A b d"]], 2) == 3 / 4  # of one group, whatever the case
    assert evaluation.distinct([["a b c"], ["a b d"]], 2) == 1  # a group each
    assert evaluation.distinct([["a"]], 2) == 0  # no n-grams at all
    assert evaluation.distinct([["a b c d a b c d"]], 4) == 4 / 5  # within a text
    assert [evaluation.distinct([["a b c d", "a b c d"]], n) for n in (2, 3, 4)] == [1 / 2] * 3


def test_best_of_n_draws_the_same_texts_however_many_seeds_follow(monkeypatch):
    """So a table continued with more seeds is the one made in one go."""
    drawn = {}
    monkeypatch.setattr(evaluation.peers, "best_of_n", lambda model, drafts, guide: drafts[0])
    for seeds in (1, 5):
        asked = drawn[seeds] = []
        draw = lambda model, lines, guide, count, at, sampling: (asked.append(at), 0.0)  # noqa: E731, B023
        monkeypatch.setattr(evaluation, "seeds", seeds)
        monkeypatch.setattr(evaluation, "draw", draw)
        for at in (1337, 1338):
            evaluation.by_best_of_n(SimpleNamespace(model=None), ("It",), "negative", 3, at, Sampling())
    assert drawn[1] == drawn[5] and len(set(drawn[1])) == 6


# ---- judges ----


@pytest.fixture(scope="module")
def judge_lm(tmp_path_factory):
    """A tiny random GPT-2 with a tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("judge") / "judge_lm"
    letters = {chr(c): i for i, c in enumerate(range(32, 127))} | {"<|endoftext|>": 95}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    special["bos_token"] = "~"  # which does not come between documents
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"  # as an instruct model has
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    config = transformers.GPT2Config(**sizes, bos_token_id=95, eos_token_id=95)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_perplexity_is_of_the_text_given_its_prefix(judge_lm):
    """In batches of several lengths as one by one in transformers, whatever the text, even none."""
    prefixes, written = ["The food", "A much longer prefix than that", ""], [" was good", "", "<|endoftext|>"]
    nats, tokens, features = LanguageModel(str(judge_lm), "cpu").read(prefixes, written, batch_size=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(judge_lm).eval()
    for prefix, text, nat, count, feature in zip(prefixes, written, nats, tokens, features):
        row = torch.tensor([[95, *(ord(c) - 32 for c in prefix + text)]])
        with torch.no_grad():
            theirs = model(row, output_hidden_states=True)
        each = F.cross_entropy(theirs.logits[0, :-1], row[0, 1:], reduction="none")
        assert count == len(text)
        assert nat == pytest.approx(each[len(prefix) :].sum().item(), rel=0.02, abs=1e-6)
        np.testing.assert_allclose(feature, theirs.hidden_states[-1][0, -1], atol=0.05)


def test_prompting_continues_each_prefix_whatever_the_others_are(judge_lm):
    lm, greedy = LanguageModel(str(judge_lm), "cpu"), Sampling(temperature=0)
    prefixes = ["It", "A long walk by the sea", "Our"]
    together = prompting(lm, prefixes, ["sad"], 8, greedy)
    assert together == [prompting(lm, [prefix], ["sad"], 8, greedy)[0] for prefix in prefixes]


def test_an_empty_text_has_no_class():
    judges = {"mood.npz": (["bad", "good"], lambda texts: np.full((len(texts), 2), 0.5))}
    for label in ("bad", "good", "other"):
        found = scores(judges, label, ["A day", " ", ""]).values()
        assert [each.tolist() for each in found] == [[0.5, 0, 0]] * (label != "other")


def test_a_figure_that_some_seeds_lack_is_a_mean_over_the_rest(tmp_path):
    """Such as the thirds of texts that all turn out short."""
    book = Results(f"{tmp_path}/control.jsonl", {}, range(3))
    for seed, figures in enumerate(({"share": 1}, {"share": 0, "third 1": 0.5}, {"share": 1})):
        book.add("row", seed, figures, [])
    assert book.table()["row"]["third 1"] == (0.5, 0)
    assert book.table()["row"]["share"][0] == pytest.approx(2 / 3)


@pytest.mark.parametrize("moods", [["bad", "good"], ["bad", "good", "odd"]])
def test_a_judge_that_travels_judges_as_it_was_fitted(moods, tmp_path):
    """Its arrays, in half precision, are enough to build it again."""
    rng = np.random.default_rng(0)
    texts = [" ".join([*rng.choice(["it", "was", "so", "a", *moods], 6), mood]) for mood in moods * 60]
    parts = train_test_split(texts, moods * 60, test_size=0.1, random_state=1337, stratify=moods * 60)
    known, unseen, y_known, y_unseen = parts
    accuracy = fit_judge(f"{tmp_path}/moods.npz", known, y_known, unseen, y_unseen)
    classes, score = read_judge(f"{tmp_path}/moods.npz")
    features = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=3)
    fitted = make_pipeline(features, LogisticRegression(C=10)).fit(known, y_known)
    assert classes == moods and accuracy == fitted.score(unseen, y_unseen)
    np.testing.assert_allclose(score(texts), fitted.predict_proba(texts), atol=5e-3)


# ---- peers ----


def test_best_of_n_keeps_for_each_prefix_the_text_that_the_guides_like_most():
    texts = {"bad film": [3.0, 0.0], "good film": [0.0, 3.0], "bad day": [1.0, 0.0], "a day": [0.0, 0.0]}
    probe = Probe("sentiment", ["negative", "positive"], torch.eye(2), torch.zeros(2), "", [1.0, 1.0])
    model = SimpleNamespace(probes=[probe], encode=lambda x: torch.tensor([texts[text] for text in x]))
    drafts = [[("good film", 0), ("bad day", 1)], [("bad film", 2), ("a day", 3)]]
    assert best_of_n(model, drafts, "negative") == [("bad film", 2), ("bad day", 1)]
    assert best_of_n(model, drafts, "positive") == [("good film", 0), ("a day", 3)]


@pytest.mark.parametrize("a, top_k", [(1.0, 0), (-1.0, 0), (1.0, 5)])
def test_dexperts_adds_the_difference_of_expert_and_anti_expert(a, top_k):
    """Greedy text in batches, with the cache, is that of the logits written out."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=64, n_positions=32, n_layer=2, n_head=2, n_embd=32, tied=False)
    base, expert, anti = gpts = [GPT(config).eval() for _ in range(3)]
    for gpt in gpts:
        torch.nn.init.normal_(gpt.lm_head.weight, std=0.4)
    eot_row, prompts = torch.randn(32), [[1, 2, 3], [4]]

    @torch.no_grad()
    def by_hand(tokens):
        for _ in range(8):
            z = base(base.wte(tokens), eot_row=eot_row)[0, -1]
            wish, avoid = (gpt(gpt.wte(tokens))[0, -1] for gpt in (expert, anti))
            falling, likely = z.sort(descending=True)
            falling = falling[: top_k or None].softmax(-1)
            likely = likely[: (falling.cumsum(0) < 0.9).sum() + 1]
            token = likely[(z + a * (wish - avoid))[likely].argmax()]
            tokens = torch.cat((tokens, token.view(1, 1)), dim=1)
        return tokens[0, -8:].tolist()

    readers = [Reader(base, prompts, 8, eot_row=eot_row), *([Reader(gpt, prompts, 8)] for gpt in gpts[1:])]
    greedy = Sampling(temperature=0, top_k=top_k, top_p=0.9, repetition_penalty=1)
    rows = decode(dexperts_logits(*readers, a, greedy), 8, greedy)
    assert rows == [by_hand(torch.tensor([prompt])) for prompt in prompts]


@torch.no_grad()
def test_a_steering_vector_is_a_difference_of_means_and_shifts_the_hidden_states(project):
    model = DGLM(f"{project}/out/toy")
    gpt, bpe = model.decoder.gpt.float(), model.tokenizer
    texts = ["The food was awful.", "A bad film", "We loved the hotel and the beach.", "Great", "Not sure"]
    labels = ["negative", "negative", "positive", "positive", "neutral"]
    vectors = steering_vectors(model, texts, labels, layer=0)

    def states(text):
        h = gpt.wte(torch.tensor([bpe.encode_ordinary(text)]))
        return gpt.h[0](h + gpt.wpe(torch.arange(h.shape[1])), None, None, None, None)[0]

    means = {
        y: torch.cat([states(t) for t, label in zip(texts, labels) if label == y]).mean(0) for y in labels
    }
    by_hand = means["negative"] - (means["positive"] + means["neutral"]) / 2
    torch.testing.assert_close(vectors["negative"], by_hand, atol=1e-4, rtol=1e-4)

    def write(a, vectors=(by_hand,)):
        rng = torch.Generator().manual_seed(0)
        return by_vectors(model, ["The food", "It"], vectors, 0, a, 12, Sampling(), rng)

    plain = gpt.generate(
        [bpe.encode_ordinary(p) for p in ("The food", "It")],
        12,
        Sampling(),
        bpe.eot_token,
        torch.Generator().manual_seed(0),
    )
    assert write(0.0) == [bpe.decode(row) for row in plain] != write(8.0)
    assert write(2.0) == write(1.0, (by_hand, by_hand)) and not gpt.h[0]._forward_hooks


# ---- every task, on the toy ----


def read(project, name):
    """-> what made a file of results, and its lines."""
    made_with, *lines = map(json.loads, (project / f"results/{name}.jsonl").read_text().splitlines())
    return made_with, lines


CONTROL = "eval.py config/small.py --task control --results"


@pytest.fixture(scope="module")
def evaluated(project, judge_lm):
    """The project after every task has run, and what they printed. Judges and probes share no text.

    In killed/, one task was killed and run again.
    """
    shutil.copytree(judge_lm, project / "judge_lm", dirs_exist_ok=True)
    (project / "config/small.py").write_text(SIZES)
    (project / "judges").mkdir(exist_ok=True)
    documents = [document for document, _ in zip(toy_documents(99), range(400))]
    for name, at in (("sentiment", 1), ("topic", 2)):
        rows = (json.dumps({"text": row[0], "label": row[at]}) + "\n" for row in documents)
        (project / f"{name}.jsonl").write_text("".join(rows))
        python(f"probes.py --data {name}.jsonl --judge judges/{name}.npz", project)

    def killed():
        path = project / "killed/control.jsonl"
        kill_when(f"{CONTROL} killed", project, lambda: path.exists() and path.read_bytes().count(b"\n") > 4)
        python(f"{CONTROL} killed", project)

    with ThreadPoolExecutor(2) as pool:
        said = pool.submit(python, "eval.py config/small.py --task all", project)
        pool.submit(killed).result()
        return project, said.result()


@pytest.mark.parametrize("name", ROWS)
def test_every_task_writes_its_lines_and_prints_its_table(evaluated, name):
    project, said = evaluated
    made_with, lines = read(project, name)
    assert made_with["seed"] == 1337 and len(made_with["decoder.safetensors"]) == 64
    assert [(line["row"], line["seed"]) for line in lines] == list(product(ROWS[name], (1337, 1338)))
    count = {"generation": 48, "noise": 48, "control": 8, "compose": 8, "runtime": 0}[name]
    assert name == "runtime" or (project / f"results/{name}.png").stat().st_size > 10_000
    for line in lines:
        assert f"\n| {line['row']} |" in said and len(line["texts"]) == count
        assert all(map(math.isfinite, line["figures"].values()))


def test_the_tables_tell_what_the_method_promises(evaluated):
    """A guide moves its attribute and noise drowns the proposal, by judges that saw neither."""

    def mean(name, row, figure):
        lines = read(evaluated[0], name)[1]
        return np.mean([line["figures"][figure] for line in lines if line["row"] == row])

    guided, free = (
        mean("control", f"negative: weight {weight}", "share sentiment.npz") for weight in (20, 0)
    )
    assert guided > free + 0.1
    alike = {row: mean("generation", row, "MAUVE") for row in ROWS["generation"]}
    assert alike["reference"] == pytest.approx(1) and max(alike, key=alike.get) == "reference"
    assert mean("noise", "sigma2 0", "similarity") > mean("noise", "sigma2 1", "similarity")
    alone, both = (mean("compose", f"negative+sports: {by}", "both") for by in ("none", "negative,sports"))
    assert both > alone


def test_long_texts_are_judged_by_thirds_too(evaluated, call):
    project, _ = evaluated
    few = "--attributes negative --guide_through estimate --best_of= --experts= --vector_rows= --seeds 1"
    long = "--control_tokens 96 --may_end False"
    status, lines, _ = call(project, f"eval.py config/small.py --task control --results long {few} {long}")
    assert status == 0 and any("| third 1 | third 2 | third 3 |" in line for line in lines)
    rows = map(json.loads, (project / "long/control.jsonl").read_text().splitlines()[1:])
    figures = {row["row"]: row["figures"] for row in rows}
    assert figures["negative: weight 20"]["third 3"] > figures["negative: weight 0"]["third 3"]


def test_a_killed_evaluation_continues_to_the_same_results(evaluated):
    """Except for the seconds that it took."""
    project, _ = evaluated
    whole, killed = ((project / f"{folder}/control.jsonl").read_text() for folder in ("results", "killed"))
    assert re.sub(r'"seconds": [\d.e-]+', "", killed) == re.sub(r'"seconds": [\d.e-]+', "", whole)


def test_results_of_another_probe_are_not_continued(evaluated, call):
    project, _ = evaluated
    path = project / "out/toy/probes/topic.npz"
    before = path.read_bytes()
    np.savez(path, **dict(np.load(path)) | {"weight": 99.0})
    status, _, line = call(project, f"{CONTROL} results")
    path.write_bytes(before)
    assert status == 2 and "results/control.jsonl was made with other probes/topic.npz" in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--task nothing", "task='nothing': must be generation, noise, control, compose, runtime or all"),
        ("--task control --attributes sad", "no probe has a class 'sad'"),
        ("--task runtime --attributes sad", "no probe has a class 'sad'"),
        ("--task noise --attributes sad --new_tokens 900", "only 0 held-out texts"),  # it needs no probe
        ("--task control --judges judges/topic.npz", "none of judges/topic.npz knows 'negative'"),
        ("--task control --guidance_weights 5,x", "must be numbers"),
        ("--task control --sigma2 0.1 --results results", "made with other sigma2"),
        ("--task noise --sigma2s 0,2", "sigma2=2.0: must be from 0"),
        ("--task compose --pairs negative", "--pairs negative: write negative+sports"),
        ("--task noise --judge_lm config", "cannot load config"),
        ("--task control --judges nowhere.npz", "cannot read nowhere.npz"),
        ("--task control --experts negative=out/toy", "CLASS=EXPERT+ANTI, this decoder tuned twice"),
        ("--task noise --new_tokens 900", "only 0 held-out texts of 910 tokens"),
    ],
)
def test_bad_input_is_one_clear_line(evaluated, arguments, message, call):
    command = f"eval.py config/small.py --results r {arguments}"
    status, _, line = call(evaluated[0], command)
    shutil.rmtree(evaluated[0] / "r", ignore_errors=True)
    assert status == 2 and message in line and line.startswith("eval.py: ")
