"""The measures and judges of eval.py, the peers, and every task on the toy."""

import json
import math
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, product
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, digest, kill_when, python
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

import eval as evaluation
import plumbing.judges
from model import DGLM, GPT, GPTConfig, Probe, Sampling
from peers import best_of_n, by_vectors, dexperts_logits, prompting, steering_vectors
from plumbing.autoregression import Reader, draw_tokens
from plumbing.errors import InputError
from plumbing.judges import LanguageModel, fit_judge, load_judge, read_judge, scores
from plumbing.labelled import read_labelled
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
    asked = []  # the seeds of all texts

    def draw(model, prefixes, guide, count, run_seed, sampling):
        asked.append(run_seed)
        return None, 0.0

    monkeypatch.setattr(evaluation, "draw", draw)
    monkeypatch.setattr(evaluation.peers, "best_of_n", lambda model, drafts, guide: drafts[0])
    for seeds in (1, 5):
        monkeypatch.setattr(evaluation, "seeds", seeds)
        for run_seed in (1337, 1338):
            evaluation.by_best_of_n(SimpleNamespace(model=None), ("It",), "negative", 3, run_seed, Sampling())
    assert asked[:6] == asked[6:] and len(set(asked)) == 6


# ---- judges ----


def save_judge_lm(folder, n_positions):
    """A tiny random GPT-2 with a tokenizer, whose tokens are characters."""
    letters = {chr(c): i for i, c in enumerate(range(32, 127))} | {"<|endoftext|>": 95}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE(letters, [])),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        bos_token="~",  # which does not come between documents
    )
    fast.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"  # as an instruct model has
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=96,
        n_positions=n_positions,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=95,
        eos_token_id=95,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge_lm(tmp_path_factory):
    return save_judge_lm(tmp_path_factory.mktemp("judge") / "judge_lm", n_positions=1024)


def test_perplexity_is_of_the_text_given_its_prefix(judge_lm):
    """In batches of several lengths as one by one in transformers, whatever the text, even none."""
    prefixes = ["The food", "A much longer prefix than that", ""]
    texts = [" was good", "", "<|endoftext|>"]
    nats, num_tokens, features = LanguageModel(str(judge_lm), "cpu").read(prefixes, texts, batch_size=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(judge_lm).eval()
    for prefix, text, nat, count, feature in zip(prefixes, texts, nats, num_tokens, features):
        row = torch.tensor([[95, *(ord(c) - 32 for c in prefix + text)]])
        with torch.no_grad():
            theirs = model(row, output_hidden_states=True)
        each = F.cross_entropy(theirs.logits[0, :-1], row[0, 1:], reduction="none")
        assert count == len(text)
        assert nat == pytest.approx(each[len(prefix) :].sum().item(), rel=0.02, abs=1e-6)
        np.testing.assert_allclose(feature, theirs.hidden_states[-1][0, -1], atol=0.05)


def test_a_text_that_fills_the_window_of_its_judge_is_read_with_the_end_of_its_prefix(tmp_path):
    lm = LanguageModel(str(save_judge_lm(tmp_path, n_positions=12)), "cpu")
    assert lm.window == 12
    found = lm.read(["The food", "food", "It"], [" is good", " is good", " is not good at all"], batch_size=2)
    expected = lm.read(["ood", "ood", ""], [" is good", " is good", " is not goo"], batch_size=2)
    for each, like in zip(found, expected):
        np.testing.assert_allclose(each, like, rtol=1e-5, atol=1e-6)


def test_prompting_continues_each_prefix_whatever_the_others_are(judge_lm):
    lm = LanguageModel(str(judge_lm), "cpu")
    greedy = Sampling(temperature=0)
    prefixes = ["It", "A long walk by the sea", "Our"]
    together = prompting(lm, prefixes, ["sad"], 8, greedy)
    assert together == [prompting(lm, [prefix], ["sad"], 8, greedy)[0] for prefix in prefixes]


def test_an_empty_text_has_no_class():
    judges = {"mood.npz": (["negative", "odd"], lambda texts: np.full((len(texts), 2), 0.25))}
    texts = ["A day", " ", ""]
    assert scores(judges, "odd", texts)["mood.npz"].tolist() == [0.25, 0, 0]
    assert scores(judges, "positive", texts)["mood.npz"].tolist() == [0.75, 0, 0]  # not negative
    assert scores(judges, "sports", texts) == {}


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
    known, unseen, y_known, y_unseen = train_test_split(
        texts, moods * 60, test_size=0.1, random_state=1337, stratify=moods * 60
    )
    accuracy = fit_judge(f"{tmp_path}/moods.npz", known, y_known, unseen, y_unseen)
    classes, score = read_judge(f"{tmp_path}/moods.npz")
    features = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=3)
    fitted = make_pipeline(features, LogisticRegression(C=10)).fit(known, y_known)
    assert classes == moods and accuracy == fitted.score(unseen, y_unseen)
    np.testing.assert_allclose(score(texts), fitted.predict_proba(texts), atol=5e-3)


def test_a_classifier_reads_the_beginning_of_a_text_that_is_too_long(tmp_path):
    """Even if its tokenizer does not know how much it reads."""
    letters = tokenizers.models.BPE({chr(c): i for i, c in enumerate(range(32, 127))}, [])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(letters), pad_token="~", cls_token="~", sep_token="~"
    )
    fast.save_pretrained(tmp_path)
    config = transformers.RobertaConfig(
        vocab_size=96,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
        max_position_embeddings=34,
        pad_token_id=1,
        id2label={0: "Bad", 1: "Good"},
    )
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    classes, score = load_judge(str(tmp_path), "cpu", batch_size=2)
    long = "We like it very much here, so we stay on."
    p = score([long, long[:32], "We"])
    assert classes == ["bad", "good"] and p.sum(axis=1) == pytest.approx([1, 1, 1])
    assert p[0] == pytest.approx(p[1], abs=1e-5)


def write_rows(path, rows):
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))


MOODS = [(f"It was a {mood} day, number {i}.", mood) for i in range(20) for mood in ("bad", "good")]


def test_a_text_with_two_labels_keeps_the_first_and_is_reported(tmp_path, capsys):
    """Copies with the same label need no word."""
    path = tmp_path / "moods.jsonl"
    write_rows(path, [*MOODS, *MOODS[:5], *((text, "odd") for text, _ in MOODS[:3])])
    texts, labels = read_labelled(str(path))
    assert list(zip(texts, labels)) == MOODS
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"{path}: 3 rows have the text of an earlier row and another label: dropped"


def test_fitting_a_judge_replaces_neither_its_data_nor_a_shipped_judge(tmp_path, monkeypatch):
    """Not even through a link."""
    rows = tmp_path / "moods.jsonl"
    write_rows(rows, MOODS)

    def fit(out):
        monkeypatch.setattr(plumbing.judges, "data", str(rows))
        monkeypatch.setattr(plumbing.judges, "out", out)
        plumbing.judges.main({})

    shipped = "pretrained/english/judges/topic.npz"
    (tmp_path / "data.npz").symlink_to(rows)
    (tmp_path / "judge.npz").symlink_to(f"{ROOT}/{shipped}")
    cases = {
        f"{ROOT}/{shipped}": "belongs to a shipped model",
        f"{tmp_path}/judge.npz": "belongs to a shipped model",
        f"{tmp_path}/data.npz": "would overwrite",
        f"{tmp_path}/judge.txt": "must be a file that ends in .npz",
        "": "must be a file that ends in .npz",
    }
    before = digest(f"{ROOT}/pretrained/english/judges")
    for out, message in cases.items():
        with pytest.raises(InputError, match=re.escape(message)):
            fit(out)
    assert digest(f"{ROOT}/pretrained/english/judges") == before
    fit(f"{tmp_path}/mine.npz")
    classes, score = read_judge(f"{tmp_path}/mine.npz")
    assert classes == ["bad", "good"] and score(["a bad day"])[0, 0] > 0.5


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
    base, expert, anti = (GPT(config).eval() for _ in range(3))
    for gpt in (base, expert, anti):
        torch.nn.init.normal_(gpt.lm_head.weight, std=0.4)
    eot_row = torch.randn(32)
    prompts = [[1, 2, 3], [4]]

    @torch.no_grad()
    def by_hand(tokens):
        for _ in range(8):
            z = base(base.wte(tokens), eot_row=eot_row)[0, -1]
            wish = expert(expert.wte(tokens))[0, -1]
            avoid = anti(anti.wte(tokens))[0, -1]
            falling, order = z.sort(descending=True)
            p = falling[: top_k or None].softmax(-1)
            allowed = order[: (p.cumsum(0) < 0.9).sum() + 1]
            token = allowed[(z + a * (wish - avoid))[allowed].argmax()]
            tokens = torch.cat((tokens, token.view(1, 1)), dim=1)
        return tokens[0, -8:].tolist()

    greedy = Sampling(temperature=0, top_k=top_k, top_p=0.9, repetition_penalty=1)
    next_logits = dexperts_logits(
        base=Reader(base, prompts, 8, eot_row=eot_row),
        experts=[Reader(expert, prompts, 8)],
        anti_experts=[Reader(anti, prompts, 8)],
        a=a,
        sampling=greedy,
    )
    rows = draw_tokens(next_logits, 8, greedy)
    assert rows == [by_hand(torch.tensor([prompt])) for prompt in prompts]


@torch.no_grad()
def test_a_steering_vector_is_a_difference_of_means_and_shifts_the_hidden_states(project):
    model = DGLM(f"{project}/out/toy")
    gpt = model.decoder.gpt.float()
    bpe = model.tokenizer
    texts = ["The food was awful.", "A bad film", "We loved the hotel and the beach.", "Great", "Not sure"]
    labels = ["negative", "negative", "positive", "positive", "neutral"]
    vectors = steering_vectors(model, texts, labels, layer=0)

    def states(text):
        h = gpt.wte(torch.tensor([bpe.encode_ordinary(text)]))
        return gpt.h[0](h + gpt.wpe(torch.arange(h.shape[1])), None, None, None, None)[0]

    negative = torch.cat([states(text) for text in texts[:2]]).mean(0)
    positive = torch.cat([states(text) for text in texts[2:4]]).mean(0)
    neutral = states(texts[4]).mean(0)
    by_hand = negative - (positive + neutral) / 2
    torch.testing.assert_close(vectors["negative"], by_hand, atol=1e-4, rtol=1e-4)

    def write(a, vectors=(by_hand,)):
        rng = torch.Generator().manual_seed(0)
        return by_vectors(model, ["The food", "It"], vectors, 0, a, 12, Sampling(), rng)

    prompts = [bpe.encode_ordinary(prefix) for prefix in ("The food", "It")]
    rng = torch.Generator().manual_seed(0)
    plain = gpt.generate(prompts, 12, Sampling(), stop=bpe.eot_token, rng=rng)
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
    save_judge_lm(project / "short_lm", n_positions=64)
    (project / "config/small.py").write_text(SIZES)
    (project / "judges").mkdir(exist_ok=True)
    documents = list(islice(toy_documents(99), 400))
    write_rows(project / "sentiment.jsonl", [(text, sentiment) for text, sentiment, _ in documents])
    write_rows(project / "topic.jsonl", [(text, topic) for text, _, topic in documents])
    for name in ("sentiment", "topic"):
        said = python(f"-m plumbing.judges --data {name}.jsonl --out judges/{name}.npz", project)
        assert re.match(rf"judges/{name}.npz: .*; accuracy \d\.\d+ on 40 rows", said)

    def killed():
        path = project / "killed/control.jsonl"
        kill_when(f"{CONTROL} killed", project, lambda: path.exists() and path.read_bytes().count(b"\n") > 4)
        python(f"{CONTROL} killed", project)

    with ThreadPoolExecutor(2) as pool:
        printed = pool.submit(python, "eval.py config/small.py --task all", project)
        pool.submit(killed).result()
        return project, printed.result()


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

    guided = mean("control", "negative: weight 20", "share sentiment.npz")
    unguided = mean("control", "negative: weight 0", "share sentiment.npz")
    assert guided > unguided + 0.1
    alike = {row: mean("generation", row, "MAUVE") for row in ROWS["generation"]}
    assert alike["reference"] == pytest.approx(1) and max(alike, key=alike.get) == "reference"
    assert mean("noise", "sigma2 0", "similarity") > mean("noise", "sigma2 1", "similarity")
    guided = mean("compose", "negative+sports: negative,sports", "both")
    assert guided > mean("compose", "negative+sports: none", "both")


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
    undisturbed, killed = (
        re.sub(r'"seconds": [\d.e-]+', "", (project / f"{folder}/control.jsonl").read_text())
        for folder in ("results", "killed")
    )
    assert killed == undisturbed


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
        ("--task noise --attributes sad --new_tokens 100", "only 0 held-out texts"),  # it needs no probe
        ("--task control --judges judges/topic.npz", "none of judges/topic.npz has the class 'negative'"),
        ("--task control --guidance_weights 5,x", "must be numbers"),
        ("--task control --sigma2 0.1 --results results", "made with other sigma2"),
        ("--task noise --sigma2s 0,2", "sigma2=2.0: must be at least 0, at most 1"),
        ("--task noise --batch_size 0", "batch_size=0: must be at least 1"),
        ("--task control --best_of 0", "best_of=0.0: must be at least 1"),
        ("--task compose --pairs negative", "--pairs negative: write negative+sports"),
        ("--task noise --judge_lm config", "cannot load config"),
        ("--task control --judges nowhere.npz", "cannot read nowhere.npz"),
        ("--task control --experts negative=out/toy", "write CLASS=EXPERT+ANTI, two folders"),
        ("--task noise --new_tokens 100", "only 0 held-out texts of 110 tokens"),
        ("--task noise --judge_lm short_lm", "--judge_lm short_lm reads at most 64 tokens"),
        ("--task control --judge_lm short_lm", "--judge_lm short_lm reads at most 64 tokens"),
    ],
)
def test_bad_input_is_one_clear_line(evaluated, arguments, message, call):
    project, _ = evaluated
    status, _, line = call(project, f"eval.py config/small.py --results r {arguments}")
    written = list(project.glob("r/*.jsonl"))
    shutil.rmtree(project / "r", ignore_errors=True)
    assert status == 2 and message in line and line.startswith("eval.py: ") and not written
