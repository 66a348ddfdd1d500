"""Stage 5: evaluate a trained model as the paper did.

    python eval.py --task generation    fluency, MAUVE, diversity of continuations of held-out text (Table 1)
    python eval.py --task noise         the same as the proposal is drowned in noise (Table 2)
    python eval.py --task control       attribute and fluency against guidance weight (Figures 5 and 6)
    python eval.py --task compose       two attributes at once (Table 3)
    python eval.py --task runtime       seconds of each part, and of all relative to the decoder (Table 4)

Each row of a task's table and each seed is a line of RESULTS/TASK.jsonl (figures and texts), from which the
same command continues when interrupted. The table is printed in Markdown; with matplotlib, its figures are
drawn. No judge is a probe that guides: `probes.py --judge` must fit judges to text that no probe knows.
"""

import glob
import importlib.util
import json
import math
import os
import re
import time
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from configurator import InputError, check, run
from model import DGLM, GPT, Sampling, load_decoder, parse_guide
from storage import Data, autocast, generator_at, gguf_path, newest_model, read_rows, sha256, write_file

task = "generation"  # generation, noise, control, compose, runtime or all
out_dir = ""  # the model's folder; default the newest in out/, else pretrained/reviews
results = "results"  # folder for what comes out
text_file = ""  # generation, noise: held-out JSON lines with text; default the data's validation part
num_texts = 5000  # generation, noise: so many of them
prefix_tokens = 32  # generation, noise: at most so many of each are given
new_tokens = 32  # generation, noise: so many are written
cfg_scales = "1,1.5,2,2.5,3,5"  # generation: scales of classifier-free guidance
plain_temperatures = "0.7,0.8,0.9,1"  # generation: of the plain decoder, to be seen at equal perplexity
noise_levels = "0,0.05,0.1,0.2,0.5,1"  # noise: sigma^2 of the proposal
prompts = (
    "Once upon a time|The book|The chicken|The city|The country|The horse|The lake|The last time|The movie"
    "|The painting|The pizza|The potato|The president of the country|The road|The year is 1910."
)  # control, compose: with | between them
num_samples = 25  # control, compose: texts a prompt
control_tokens = 20  # control, compose: tokens of each
attributes = "negative,positive,nontoxic"  # control: classes of the probes
guidance_weights = "5,10,20,50,100,500,1000"  # control: beside 0
rude_prompts = ""  # control: the prompts of nontoxic; default the others'
best_of = "3,10"  # control, compose: of so many unguided texts the one that the probes find likeliest
experts = ""  # control, compose: CLASS=EXPERT+ANTI, ...: folders of this decoder, fine-tuned, for DExperts
expert_weights = "0.5,1,2,3.2"  # control, compose: how much the difference of their logits counts
pairs = "negative+nontoxic,positive+nontoxic"  # compose: classes of the probes, each with its probe's weight
lengths = "8,16,32,64,128,256,512"  # runtime: tokens
batch_sizes = "1,32"  # runtime
seeds = 5  # repetitions: seed, seed + 1, ...; the errors in the tables are over them
steps = Sampling.steps  # of the diffusion
sampler = Sampling.sampler  # dpm++, ddim or ddpm
cfg_scale = Sampling.cfg_scale  # classifier-free guidance, in all but generation
guide_through = Sampling.guide_through  # of guides: estimate or network; control takes both, with a comma
sigma2 = Sampling.sigma2  # noise on the proposal
temperature = Sampling.temperature  # of the decoder
top_k = Sampling.top_k  # so many likeliest tokens; 0 takes all
top_p = Sampling.top_p  # of these, the likeliest that make up this probability
repetition_penalty = Sampling.repetition_penalty  # of the decoder
may_end = Sampling.may_end  # in control and compose: whether a text may end early
judge_lm = "allenai/OLMo-1B-hf"  # fluency, MAUVE's features: a hub's name, a folder, a .gguf file, smollm2
judges = (
    "siebert/sentiment-roberta-large-english,distilbert-base-uncased-finetuned-sst-2-english"
    ",s-nlp/roberta_toxicity_classifier"
)  # of attributes: classifiers of the hub or a folder, .npz of probes.py --judge, the lexicon vader
batch_size = 64  # texts at a time
device = "auto"  # auto, cpu, cuda, cuda:1, mps
seed = 1337  # the first

OPPOSITE = {"negative": "positive", "positive": "negative", "toxic": "nontoxic", "nontoxic": "toxic"}


# ---------- Judges ------------------------------------------------------------------------------------------


class LanguageModel:
    """A causal language model, the judge of fluency. Raises InputError where it cannot be had."""

    def __init__(self, name, device):
        folder, file = name, {}
        if path := gguf_path(name):
            folder, file["gguf_file"] = os.path.split(os.path.abspath(path))
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **file)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
        except (ImportError, OSError, ValueError) as e:
            raise InputError(f"--judge_lm: cannot load {name}: {e}") from None
        self.model, self.device = model.to(device).eval(), device

    @torch.no_grad()
    def read(self, prefixes, written):
        """-> nats of each text given its prefix (N,), its tokens (N,), features of both (N, width)."""
        first = next(t for t in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if t is not None)
        plain = {"add_special_tokens": False, "split_special_tokens": True}  # whatever the texts hold
        ids = [self.tokenizer(list(x), **plain)["input_ids"] for x in (prefixes, written)]
        rows, out = [(torch.tensor([first, *p, *t]), 1 + len(p)) for p, t in zip(*ids)], []
        for at in batches(rows):
            tokens = [row for row, _ in rows[at]]
            real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], True).to(self.device)
            tokens = torch.nn.utils.rnn.pad_sequence(tokens, True).to(self.device)
            with autocast(self.device):
                seen = self.model(input_ids=tokens, attention_mask=real, output_hidden_states=True)
            logits = seen.logits[:, :-1].float().transpose(1, 2)
            nats = F.cross_entropy(logits, tokens[:, 1:], reduction="none")  # (B, T - 1)
            for i, (row, begin) in enumerate(rows[at]):
                feature = seen.hidden_states[-1][i, len(row) - 1].float().cpu().numpy()
                out.append((nats[i, begin - 1 : len(row) - 1].sum().item(), len(row) - begin, feature))
        return tuple(np.array(column) for column in zip(*out))


def attribute_judge(name, device):
    """-> its classes, and a function of texts to their probabilities (N, classes)."""
    if name.endswith(".npz"):
        try:
            with np.load(name, allow_pickle=False) as f:
                words, fit = f["words"].tobytes().decode().split("\n"), LogisticRegression()
                features = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, vocabulary=words)
                features.idf_, fit.classes_ = f["idf"].astype(float), f["classes"]
                fit.coef_, fit.intercept_ = f["coef"].astype(float), f["intercept"]
        except Exception as e:  # whatever a damaged archive makes zipfile and numpy raise
            raise InputError(f"cannot read {name} as a judge of probes.py: {e}") from None
        return fit.classes_.tolist(), make_pipeline(features, fit).predict_proba
    if name == "vader":
        check(importlib.util.find_spec("vaderSentiment"), "the judge vader: pip install vaderSentiment")
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        polarity = SentimentIntensityAnalyzer().polarity_scores  # "compound" is from -1 to 1
        return ["positive"], lambda texts: np.array([[polarity(t)["compound"] / 2 + 0.5] for t in texts])
    classify = pipeline("text-classification", model=name, device=device, top_k=None, truncation=True)
    labels = list(classify.model.config.id2label.values())

    def score(texts):
        found = [{s["label"]: s["score"] for s in row} for row in classify(texts, batch_size=batch_size)]
        return np.array([[row[label] for label in labels] for row in found])

    return [label.lower() for label in labels], score


class DExperts(GPT):
    """The logits of a decoder + a (an expert's - its anti-expert's), within the decoder's top_p likeliest
    tokens [Liu et al. 2021]. gpts: the decoder, an expert, its anti-expert; further pairs add up.

    It generates as a GPT does whose embeddings are theirs, side by side, and whose layers are theirs.
    """

    def __init__(self, gpts, a, top_p):
        torch.nn.Module.__init__(self)
        self.gpts, self.a, self.top_p, self.config = torch.nn.ModuleList(gpts), a, top_p, gpts[0].config
        self.h = [block for gpt in gpts for block in gpt.h]

    def wte(self, tokens):
        return torch.cat([gpt.wte(tokens) for gpt in self.gpts], dim=-1)

    def forward(self, h, positions, mask, cache, end, eot_row):
        n, rows = self.config.n_layer, [eot_row] + [None] * len(self.gpts)
        each = zip(self.gpts, h.chunk(len(self.gpts), dim=-1), range(0, len(cache), n), rows)
        every = [gpt(x, positions, mask, cache[i:], end, eot_row=row)[:, -1:] for gpt, x, i, row in each]
        base, *pairs = (logits.float() for logits in every)
        p = base.softmax(-1)
        falling = p.sort(descending=True)[0]
        least = falling.where(falling.cumsum(-1) - falling < self.top_p, 1.0).amin(-1, keepdim=True)
        logits = base + self.a * (sum(pairs[::2]) - sum(pairs[1::2]))
        return torch.where(p < least, logits - 100, logits)


class Bench:
    """A model, its judges and its peers, all loaded at once: what is missing is said before the work."""

    def __init__(self, model, labels):
        self.model, self.lm = model, LanguageModel(judge_lm, model.device)
        self.judges = {name: attribute_judge(name, model.device) for name in judges.split(",") if labels}
        for label in labels:
            known = any({label, OPPOSITE.get(label)} & set(classes) for classes, _ in self.judges.values())
            check(known, f"--judges: none of {judges} knows {label!r}: see probes.py --judge")
        self.generate = cache(self.generate)  # unguided texts serve every attribute
        load, gpt = cache(load_decoder), model.decoder.gpt
        self.experts = {}  # class: its expert, its anti-expert
        for label, _, folders in (item.partition("=") for item in experts.split(",") if item and labels):
            pair = [load(folder, model.device) for folder in folders.split("+")]
            tuned = [e.gpt.config == gpt.config and "frozen" not in meta["network"] for meta, e in pair]
            fits = all(meta["data"]["tokenizer"] == model.data["tokenizer"] for meta, _ in pair)
            check(fits and tuned == [True, True], "--experts: CLASS=EXPERT+ANTI, this decoder tuned twice")
            self.experts[label] = [expert.gpt.to(gpt.wte.weight.dtype) for _, expert in pair]

    def generate(self, prefixes, guide, count, r, sampling):
        """-> a text for each of a tuple of prefixes, their proposals (N, E), seconds a text."""
        options = asdict(sampling) | {"batch_size": batch_size}
        every = self.model.generate(list(prefixes), guide, 1, count, seed + r, **options)
        pairs, seconds = timed(list, every)
        written, proposals = zip(*pairs)
        return list(written), torch.stack(proposals), seconds / len(written)

    def measure(self, prefixes, written, proposals=None):
        """The figures of all tables but runtime's, and the features of MAUVE."""
        nats, tokens, features = self.lm.read(prefixes, written)
        real = tokens > 0  # not the empty texts
        figures = {
            "perplexity": np.exp(nats[real] / tokens[real]).mean(),  # the paper's, which outliers rule
            "corpus perplexity": np.exp(nats.sum() / tokens.sum()),
            "Div": math.prod(distinct([written], n) for n in (2, 3, 4)),
            "rep-4": 1 - distinct([[text] for text in written], 4),
        }
        if proposals is not None:
            x = self.model.encode(written)
            figures["similarity"] = F.cosine_similarity(x, proposals).mean().item()
        return figures, features

    def scores(self, label, written):
        """{judge: p(label) of each text (N,)}, by all judges that know the label or its opposite."""
        out = {}
        for name, (classes, score) in self.judges.items():
            known = label if label in classes else OPPOSITE.get(label)
            if known in classes:
                p = score(written)[:, classes.index(known)]
                out[os.path.basename(name)] = p if known == label else 1 - p
        return out


# ---------- Measures ----------------------------------------------------------------------------------------


def distinct(groups, n):
    """The share of all n-grams of words that did not come before in their group of texts."""
    words = [[text.lower().split() for text in group] for group in groups]
    grams = [[tuple(row[i : i + n]) for row in group for i in range(len(row) - n + 1)] for group in words]
    return sum(len(set(group)) for group in grams) / max(1, sum(map(len, grams)))


# ---------- Results -----------------------------------------------------------------------------------------


class Results:
    """RESULTS/TASK.jsonl: a line that says what made it, then a line for each row of the table and seed."""

    def __init__(self, name, made_with):
        self.path, self.made_with, self.lines = f"{results}/{name}.jsonl", made_with, []
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as f:
                before, *self.lines = map(json.loads, f)
            changed = ", ".join(k for k, v in made_with.items() if before.get(k) != v)
            check(not changed, f"{self.path} was made with other {changed}: give another --results")

    def missing(self, rows):
        """The (row, repetition) that have no line yet."""
        done = {(line["row"], line["seed"]) for line in self.lines}
        every = tqdm([(row, r) for row in rows for r in range(seeds)], self.path)
        return ((row, r) for row, r in every if (row, seed + r) not in done)

    def add(self, row, r, figures, written):
        figures = {name: float(value) for name, value in figures.items()}
        self.lines.append({"row": row, "seed": seed + r, "figures": figures, "texts": written})
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in (self.made_with, *self.lines)))

    def table(self):
        """{row: {figure: (mean, its standard error)}}, over seeds."""
        out = {}
        for line in self.lines:
            each = [other["figures"] for other in self.lines if other["row"] == line["row"]]
            x = {name: np.array([figures[name] for figures in each]) for name in line["figures"]}
            n = len(each)
            out[line["row"]] = {k: (v.mean(), v.std(ddof=min(1, n - 1)) / n**0.5) for k, v in x.items()}
        return out


def show(table):
    """Prints a table as Markdown."""
    names = list(dict.fromkeys(name for figures in table.values() for name in figures))
    print("\n| | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for row, figures in table.items():
        cells = ("{:.4g} ± {:.2g}".format(*figures[name]) if name in figures else "" for name in names)
        print(f"| {row} | " + " | ".join(cells) + " |")


def plot(table, y, path):
    """Draws the figure y (none: each row's first) against perplexity and diversity, with standard errors."""
    if importlib.util.find_spec("matplotlib") is None:
        return print("no picture: that needs matplotlib (pip install matplotlib)")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys(row.rpartition(": ")[0] for row in table))  # attributes, if any
    fig, axes = plt.subplots(len(groups), 2, figsize=(10, 4 * len(groups)), squeeze=False, layout="tight")
    for row, figures in table.items():
        (group, _, how), shown = row.rpartition(": "), y or next(iter(figures))
        for name, ax in zip(("corpus perplexity", "Div"), axes[groups.index(group)]):
            if shown in figures:
                (at, at_error), (height, height_error) = figures[name], figures[shown]
                ax.errorbar(at, height, height_error, at_error, fmt="o", capsize=2)
                ax.annotate(how, (at, height), (4, 4), textcoords="offset points", fontsize=8)
            ax.set(xlabel=name, ylabel=f"{group} {shown}", xmargin=0.25)
    write_file(path, lambda f: fig.savefig(f, format="png", dpi=110))


# ---------- The tasks ---------------------------------------------------------------------------------------


def held_out(model):
    """Held-out texts, each cut at a word -> prefixes, true continuations, the embeddings of these."""
    bpe, longest = model.tokenizer, prefix_tokens + new_tokens
    if text_file:
        rows = (bpe.encode_ordinary(row["text"]) for row in read_rows(text_file, "text"))
    else:
        data = Data(model.data["name"])
        check(data.meta == model.data, f"{data.folder} is not the data of this model: say --text_file")
        rows = (t[:n].tolist() for t, n in zip(data.arrays["val"]["tokens"], data.arrays["val"]["length"]))
    prefixes, truths = [], []
    for row in dict.fromkeys(tuple(row) for row in rows if len(row) >= longest):  # each window once
        words = [i for i in range(1, prefix_tokens + 1) if bpe.decode_single_token_bytes(row[i])[:1] == b" "]
        if words and len(prefixes) < num_texts:
            prefixes.append(bpe.decode(row[: words[-1]]))
            truths.append(bpe.decode(row[words[-1] : words[-1] + new_tokens]).rstrip("\ufffd"))
    check(len(prefixes) >= 20, f"only {len(prefixes)} held-out texts of {longest} tokens: too few for MAUVE")
    return prefixes, truths, model.encode(truths)


def continuations(bench, book, sampling, settings):
    """What generation and noise share. settings: {row: what differs from `sampling`}."""
    check(importlib.util.find_spec("mauve"), "MAUVE needs a package: pip install mauve-text")
    from mauve import compute_mauve

    model, sampling = bench.model, replace(sampling, may_end=False)  # as in the paper
    prefixes, truths, true = held_out(model)
    _, real = bench.measure(prefixes, truths)
    for row, r in book.missing(["reference", *settings]):
        here = replace(sampling, **settings.get(row, {}))
        if row == "reference":
            written, told = truths, None
        elif row.startswith(("true", "plain")):  # told the truth, or nothing
            rng = generator_at(model.device, seed + r)
            parts = [(prefixes[at], true[at]) for at in batches(prefixes)]
            written = [text for part in parts for text in model.write(*part, new_tokens, here, rng)]
            told = true
        else:
            written, told, _ = bench.generate(tuple(prefixes), "none", new_tokens, r, here)
        figures, features = bench.measure(prefixes, written, told)
        same = compute_mauve(features, real, seed=seed + r, verbose=False).mauve
        book.add(row, r, {"MAUVE": same} | figures, written)


def generation(bench, book, sampling):
    """Table 1: continuations of held-out text, by the scale w of classifier-free guidance."""
    settings = {"true embedding": {}}
    for t in numbers(plain_temperatures):
        settings[f"plain decoder, temperature {t:g}"] = {"sigma2": 1.0, "temperature": t}
    settings |= {f"w {w:g}": {"cfg_scale": w} for w in numbers(cfg_scales)}
    continuations(bench, book, sampling, settings)


def noise(bench, book, sampling):
    """Table 2: the same, as the proposal is drowned in noise."""
    settings = {f"sigma2 {level:g}": {"sigma2": level} for level in numbers(noise_levels)}
    continuations(bench, book, sampling, settings)


def timed(f, *arguments):
    """-> what f gives, and its seconds."""
    begin = time.perf_counter()
    out = f(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return out, time.perf_counter() - begin


def guided(bench, lines, guide, through, r, sampling):
    """DGLM -> texts, proposals (or None), seconds a text; so do all ways that follow."""
    return bench.generate(lines, guide, control_tokens, r, replace(sampling, guide_through=through))


def best_of_n(bench, lines, guide, n, r, sampling):
    """Of n unguided texts the one that the guide's probes find likeliest -> texts, proposals, seconds."""
    rounds = [bench.generate(lines, "none", control_tokens, r + 1000 * k, sampling) for k in range(n)]
    guides = parse_guide(guide, bench.model.probes)

    def choose():
        x = torch.stack([bench.model.encode(written) for written, *_ in rounds])  # (n, lines, E)
        return sum(probe.log_prob(x)[..., i] for probe, i, _ in guides).argmax(0).tolist()

    best, seconds = timed(choose)
    written, proposals = zip(*((rounds[k][0][i], rounds[k][1][i]) for i, k in enumerate(best)))
    seconds = seconds / len(lines) + sum(each for *_, each in rounds)
    return list(written), torch.stack(proposals), seconds


def by_experts(bench, lines, guide, a, r, sampling):
    """DExperts: the decoder and, of each class, an expert and an anti-expert, all without soft tokens."""
    decoder, bpe, rng = bench.model.decoder, bench.model.tokenizer, generator_at(bench.model.device, seed + r)
    pairs = [gpt for label in guide.split(",") for gpt in bench.experts[label]]
    gpt = DExperts([decoder.gpt, *pairs], a, sampling.top_p)
    how = replace(sampling, top_k=0, top_p=1.0), None, bpe.eot_token, rng, decoder.generator.end

    def write():
        each = ([bpe.encode_ordinary(line) for line in lines[at]] for at in batches(lines))
        return [row for prompts in each for row in gpt.generate(prompts, control_tokens, *how)]

    rows, seconds = timed(write)
    return [bpe.decode(row).rstrip("\ufffd") for row in rows], None, seconds / len(lines)


def in_words(bench, lines, guide, _, r, sampling):
    """The judge of fluency, an instruct model, asked in words for the guide's classes."""
    torch.manual_seed(seed + r)
    lm, wish = bench.lm, f"Write a {guide.replace(',', ' and ')} text that begins: "

    def chat(line):
        return [{"role": "user", "content": wish + line}, {"role": "assistant", "content": line}]

    least = 0 if sampling.may_end else control_tokens
    options = {"do_sample": True, "max_new_tokens": control_tokens, "min_new_tokens": least}
    options |= {key: getattr(sampling, key) for key in ("temperature", "top_k", "top_p")}
    options |= {"device": lm.device, "batch_size": batch_size, "return_full_text": False}
    write = pipeline("text-generation", model=lm.model, tokenizer=lm.tokenizer, **options)
    with autocast(lm.device):
        rows, seconds = timed(write, [chat(line) for line in lines])
    return [row["generated_text"].rstrip("\ufffd") for (row,) in rows], None, seconds / len(lines)


def peers(bench, labels, sampling):
    """{name: (way, its strength)}: what else steers to these classes, as far as it is at hand."""
    ways = {f"best of {n:g}": (best_of_n, int(n)) for n in numbers(best_of)}
    if set(labels) <= set(bench.experts):
        ways |= {f"DExperts {a:g}": (by_experts, a) for a in numbers(expert_weights)}
    if bench.lm.tokenizer.chat_template and sampling.temperature > 0:
        ways["asked in words"] = in_words, None
    return ways


def steer(bench, book, sampling, rows):
    """What control and compose share. rows: {name: (classes, guide, way, its strength)}."""
    guided(bench, ("It",), "none", "estimate", 0, sampling)  # to warm up, which is no part of the seconds

    @cache
    def texts_by(begun, guide, way, strength, r):
        lines = tuple(line for line in begun.split("|") for _ in range(num_samples))
        written, proposals, seconds = way(bench, lines, guide, strength, r, sampling)
        figures, _ = bench.measure(lines, written, proposals)
        figures["Dist-3"] = distinct(np.reshape(written, (-1, num_samples)), 3)  # in a prompt's texts
        return written, figures | {"seconds": seconds}

    for row, r in book.missing(rows):
        labels, *how = rows[row]
        begun = rude_prompts if rude_prompts and labels == ["nontoxic"] else prompts
        written, figures = texts_by(begun, *how, r)
        scores = [bench.scores(label, written) for label in labels]
        if len(labels) == 1:
            each = {f"share {judge}": (p > 0.5).mean() for judge, p in scores[0].items()}
            shares = {"share": np.mean(list(each.values()))} | each
        else:  # by the mean of the judges of a class
            first, second = (np.mean(list(each.values()), axis=0) > 0.5 for each in scores)
            shares = {"both": (first & second).mean(), "first": first.mean(), "second": second.mean()}
        book.add(row, r, shares | figures, written)


def control(bench, book, sampling):
    """Figures 5 and 6: attribute and fluency against the weight of the guide, and what else steers."""
    rows = {}
    for label in attributes.split(","):
        rows[f"{label}: weight 0"] = [label], "none", guided, "estimate"
        for through in guide_through.split(","):
            name = "weight" if through == "estimate" else "network, weight"
            for w in numbers(guidance_weights):
                rows[f"{label}: {name} {w:g}"] = [label], f"{label}:{w:g}", guided, through
        for name, way in peers(bench, [label], sampling).items():
            rows[f"{label}: {name}"] = [label], label, *way
    steer(bench, book, sampling, rows)


def compose(bench, book, sampling):
    """Table 3: two attributes at once, and each alone."""
    rows = {}
    for pair in (pair.split("+") for pair in pairs.split(",")):
        name, both = "+".join(pair), ",".join(pair)
        for guide in ("none", *pair, both):
            rows[f"{name}: {guide}"] = pair, guide, guided, sampling.guide_through
        for way, how in peers(bench, pair, sampling).items():
            rows[f"{name}: {way}"] = pair, both, *how
    steer(bench, book, sampling, rows)


def runtime(bench, book, sampling):
    """Table 4: seconds a text of each part, and of all relative to the decoder, by batch and length."""
    model, line, label = bench.model, prompts.split("|")[0], attributes.split(",")[0]
    tokens, generator = model.tokenizer.encode_ordinary(line), model.decoder.generator
    room = model.decoder.gpt.config.n_positions - generator.K - len(tokens)
    sizes = [(int(b), int(n)) for b in numbers(batch_sizes) for n in numbers(lengths) if n <= room]
    check(sizes, f"--lengths: this model has room for {room} tokens after the prompt")
    rows = {f"batch {batch}, tokens {count}": (batch, count) for batch, count in sizes}

    for row, r in book.missing(rows):
        batch, count = rows[row]
        rng, figures = generator_at(model.device, seed + r), {}
        no_prefix = [""] * batch  # which needs no encoding
        for _ in range(2):  # the first is to warm up
            _, figures["encode"] = timed(model.encode, [line] * batch)
            x, figures["diffuse"] = timed(model.propose, no_prefix, "none", sampling, rng)
            _, figures["diffuse, guided"] = timed(model.propose, no_prefix, label, sampling, rng)
            alpha2 = torch.full((batch,), 1 - sigma2, device=model.device)
            soft_prompt, figures["prompt"] = timed(generator, model.standardise(x), alpha2)
            rest = sampling, soft_prompt, None, rng, generator.end, model.decoder.soft_first
            _, figures["decode"] = timed(model.decoder.gpt.generate, [tokens] * batch, count, *rest)
        figures = {part: seconds / batch for part, seconds in figures.items()}
        every = sum(figures[part] for part in ("encode", "diffuse", "prompt", "decode"))
        figures["relative"] = every / figures["decode"]
        book.add(row, r, figures, [])


TASKS = {f.__name__: f for f in (generation, noise, control, compose, runtime)}


def batches(rows):
    return [slice(i, i + batch_size) for i in range(0, len(rows), batch_size)]


def numbers(text):
    """`0,0.05,1` -> [0.0, 0.05, 1.0]; none of an empty text."""
    check(re.fullmatch(r"[\d.,]*", text), f"{text!r}: must be numbers, with commas between them")
    return [float(item) for item in text.split(",") if item]


def main(settings):
    wanted = list(TASKS) if task == "all" else [task]
    check(set(wanted) <= set(TASKS), f"task={task!r}: must be {', '.join(TASKS)} or all")
    fields = {field: settings[field] for field in asdict(Sampling())}
    sampling, *_ = [Sampling(**fields | {"guide_through": way}) for way in guide_through.split(",")]
    check(all(pair.count("+") == 1 for pair in pairs.split(",")), f"--pairs {pairs}: write negative+sports")
    folder = out_dir or newest_model()
    model = DGLM(folder, device)
    made_with = {k: v for k, v in settings.items() if k not in ("task", "results", "device", "seeds")}
    read = [f"{part}/decoder.safetensors" for part in re.split("[=+,]", experts)]
    read += [text_file, judge_lm, *judges.split(",")]
    read += glob.glob(f"{folder}/*.safetensors") + glob.glob(f"{folder}/probes/*.npz")
    for path in filter(os.path.isfile, read):
        made_with[os.path.relpath(path, folder)] = sha256(path)
    labels = attributes.split(",") if "control" in wanted else []
    labels += re.split("[,+]", pairs) if "compose" in wanted else []
    parse_guide(",".join(labels), model.probes)  # says it now where no probe has that class
    os.makedirs(results, exist_ok=True)
    bench = Bench(model, labels)
    for name in wanted:
        book = Results(name, made_with)
        TASKS[name](bench, book, sampling)
        print(f"\n{name}, fluency by {judge_lm}")
        show(book.table())
        if name != "runtime":
            plot(book.table(), "similarity" if name == "noise" else "", f"{results}/{name}.png")


if __name__ == "__main__":
    run(main, globals())
