"""Stage 5: evaluate a trained model as the paper did.

    python eval.py --task generation    fluency, MAUVE, diversity of continuations of held-out text (Table 1)
    python eval.py --task noise         the same, with more and more noise on the proposal (Table 2)
    python eval.py --task control       attribute and fluency against guidance weight (Figures 5 and 6)
    python eval.py --task compose       two attributes at once (Table 3)
    python eval.py --task runtime       seconds of each part, and of all relative to the decoder (Table 4)

Every row of a task's table and every seed is a line of RESULTS/TASK.jsonl (figures and texts), so the same
command continues an interrupted run. The table is printed in Markdown and, with matplotlib, drawn.

A probe that guides is never a judge. `python -m plumbing.judges` fits judges; their texts must not be those
of the probes.
"""

import glob
import importlib.util
import math
import os
import re
import sys
import time
from dataclasses import asdict, replace
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import peers
from model import DGLM, Sampling, parse_guide
from plumbing.config import run
from plumbing.data import Data
from plumbing.devices import rng_at
from plumbing.errors import check, check_range, reported_as
from plumbing.files import lock, pick_model, read_rows, sha256
from plumbing.judges import OPPOSITE, LanguageModel, load_judge, scores
from plumbing.labelled import read_labelled
from plumbing.plot import plot
from plumbing.results import Results, show

task = "generation"  # generation, noise, control, compose, runtime or all
out_dir = ""  # a folder, or owner/model of the hub; default pretrained/english
results = "results"  # folder for the results
text_file = ""  # generation, noise: held-out JSON lines with text; default the data's validation part
num_texts = 5000  # generation, noise: how many of them [at least 20]
prefix_tokens = 32  # generation, noise: longest prefix [at least 1]
new_tokens = 32  # generation, noise: tokens to write [at least 1]
cfg_scales = "1,1.5,2,2.5,3,5"  # generation: scales of classifier-free guidance
plain_temperatures = "0.7,0.8,0.9,1"  # generation: of the plain decoder, to compare at equal perplexity
sigma2s = "0,0.05,0.1,0.2,0.5,1"  # noise: sigma^2 of the proposal
prompts = (
    "Once upon a time|The book|The chicken|The city|The country|The horse|The lake|The last time|The movie"
    "|The painting|The pizza|The potato|The president of the country|The road|The year is 1910."
)  # control, compose: prefixes, with | between them
num_samples = 25  # control, compose: texts for each prompt [at least 1]
control_tokens = 20  # control, compose: tokens of each; if 96 or more, each third is judged too [at least 1]
attributes = "negative,positive,nontoxic"  # control: classes of the probes
guidance_weights = "5,10,20,50,100,500,1000"  # control: weights of the guide, besides 0
rude_prompts = ""  # control: prompts for nontoxic; default the same as for the others
best_of = "3,10"  # control, compose: write so many unguided texts, keep the one that the probes prefer
experts = ""  # control, compose: CLASS=EXPERT+ANTI, ...: folders of this decoder, fine-tuned, for DExperts
expert_weights = "0.5,1,2,3.2"  # control, compose: how much the difference of their logits counts
vector_rows = ""  # control, compose: JSON lines (text, label), several with commas, for steering vectors
vector_layer = 15  # control, compose: the block after which they are added, from 0 [at least 0]
vector_weights = "0.5,1,2,4"  # control, compose: how many times they are added
pairs = "negative+nontoxic,positive+nontoxic"  # compose: classes of the probes, each with its own weight
lengths = "8,16,32,64,128,256,512"  # runtime: tokens
batch_sizes = "1,32"  # runtime: texts
seeds = 5  # repetitions, with seeds seed, seed + 1, ...; they give the 95 % intervals [at least 1]
steps = Sampling.steps  # diffusion steps [at least 1, at most 1000]
sampler = Sampling.sampler  # dpm++, ddim or ddpm
cfg_scale = Sampling.cfg_scale  # classifier-free guidance, except in generation
guide_through = Sampling.guide_through  # estimate or network; control can compare them: estimate,network
sigma2 = Sampling.sigma2  # noise on the proposal, except in noise [at least 0, at most 1]
temperature = Sampling.temperature  # of the decoder [at least 0]
top_k = Sampling.top_k  # draw from so many likeliest tokens; 0: from all [at least 0]
top_p = Sampling.top_p  # and of these from the fewest that make up this probability [above 0, at most 1]
repetition_penalty = Sampling.repetition_penalty  # of the decoder [at least 0.01, at most 100]
may_end = Sampling.may_end  # control, compose: whether a text may end early
judge_lm = "allenai/OLMo-1B-hf"  # fluency, features for MAUVE: a hub name, a folder, a .gguf file, smollm2
judges = (
    "siebert/sentiment-roberta-large-english,distilbert-base-uncased-finetuned-sst-2-english"
    ",s-nlp/roberta_toxicity_classifier"
)  # of attributes: classifiers from the hub or a folder, .npz files of plumbing.judges, the lexicon vader
batch_size = 64  # texts at a time [at least 1]
device = "auto"  # auto, cpu, cuda, cuda:1, mps
seed = 1337  # the first of the seeds


# ---------- Measures ----------------------------------------------------------------------------------------


def distinct(groups, n):
    """The share of all n-grams of words that did not occur before in their group of texts."""
    num_grams = 0
    num_distinct = 0
    for group in groups:
        grams = []
        for text in group:
            words = text.lower().split()
            grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        num_grams += len(grams)
        num_distinct += len(set(grams))
    return num_distinct / max(1, num_grams)


def measure(bench, prefixes, written):
    """Pairs (text, proposal or None) -> the figures of all tables except runtime's, features for MAUVE."""
    texts, proposals = zip(*written)
    nats, num_tokens, features = bench.lm.read(prefixes, texts, batch_size)
    some = num_tokens > 0  # not the empty texts
    figures = {
        "perplexity": np.exp(nats[some] / num_tokens[some]).mean(),  # the paper's, dominated by outliers
        "corpus perplexity": np.exp(nats.sum() / num_tokens.sum()),
        "Div": math.prod(distinct([texts], n) for n in (2, 3, 4)),
        "rep-4": 1 - distinct([[text] for text in texts], 4),
    }
    if proposals[0] is not None:
        e = bench.model.encode(texts)
        figures["similarity"] = F.cosine_similarity(e, torch.stack(proposals)).mean().item()
    return figures, features


# ---------- Continuations of held-out text: generation and noise --------------------------------------------


def held_out(model):
    """Held-out texts, each cut at a word -> prefixes, true continuations and their embeddings."""
    bpe = model.tokenizer
    if text_file:
        windows = (bpe.encode_ordinary(row["text"]) for row in read_rows(text_file, "text"))
    else:
        data = Data(model.info["name"])
        check(data.info == model.info, f"{data.folder} is not the data of this model: give a --text_file")
        rows = zip(data.arrays["val", "tokens"], data.arrays["val", "length"])
        windows = (tokens[:length].tolist() for tokens, length in rows)

    longest = prefix_tokens + new_tokens
    distinct_windows = dict.fromkeys(tuple(window) for window in windows if len(window) >= longest)
    prefixes = []
    truths = []
    for window in distinct_windows:
        spelt = [bpe.decode_single_token_bytes(token) for token in window[: prefix_tokens + 1]]
        words = [i for i in range(1, len(spelt)) if spelt[i].startswith(b" ")]  # where words begin
        if words and len(prefixes) < num_texts:
            cut = words[-1]
            prefixes.append(bpe.decode(window[:cut]))
            truths.append(bpe.decode(window[cut : cut + new_tokens]).rstrip("\ufffd"))
    check(len(prefixes) >= 20, f"only {len(prefixes)} held-out texts of {longest} tokens: too few for MAUVE")
    return prefixes, truths, model.encode(truths)


def continue_held_out(bench, book, sampling, changes):
    """The rows of generation and noise. changes: {row: the fields of `sampling` that differ in it}."""
    check(importlib.util.find_spec("mauve"), "MAUVE needs a package: pip install mauve-text")
    from mauve import compute_mauve

    model = bench.model
    sampling = replace(sampling, may_end=False)  # as in the paper
    samplings = {row: replace(sampling, **fields) for row, fields in changes.items()}
    prefixes, truths, true_e = held_out(model)
    reference = [(truth, None) for truth in truths]
    _, true_features = measure(bench, prefixes, reference)
    for row, run_seed in book.missing(["reference", *changes]):
        if row == "reference":
            written = reference
        elif row.startswith(("true", "plain")):  # conditioned on the truth, or on nothing but noise
            rng = rng_at(model.device, run_seed)
            texts = []
            for part in batches(prefixes):
                texts += model.write(prefixes[part], true_e[part], new_tokens, samplings[row], rng)
            written = list(zip(texts, true_e))
        else:
            written, _ = draw(model, tuple(prefixes), "none", new_tokens, run_seed, samplings[row])
        figures, features = measure(bench, prefixes, written)
        mauve = compute_mauve(features, true_features, seed=run_seed, verbose=False).mauve
        book.add(row, run_seed, {"MAUVE": mauve} | figures, [text for text, _ in written])


def generation(bench, book, sampling):
    """Table 1: continuations of held-out text, by the scale w of classifier-free guidance."""
    changes = {"true embedding": {}}
    for t in numbers(plain_temperatures):
        changes[f"plain decoder, temperature {t:g}"] = {"sigma2": 1.0, "temperature": t}
    for w in numbers(cfg_scales):
        changes[f"w {w:g}"] = {"cfg_scale": w}
    continue_held_out(bench, book, sampling, changes)


def noise(bench, book, sampling):
    """Table 2: the same, by the noise on the proposal."""
    changes = {f"sigma2 {level:g}": {"sigma2": level} for level in numbers(sigma2s)}
    continue_held_out(bench, book, sampling, changes)


# ---------- Steered text: control and compose ---------------------------------------------------------------


@cache  # unguided texts serve every attribute
def draw(model, prefixes, guide, count, run_seed, sampling):
    """DGLM's pairs (text, proposal) for a tuple of prefixes, and the seconds they took."""
    options = asdict(sampling) | {"batch_size": batch_size, "max_new_tokens": count, "seed": run_seed}
    return timed(lambda: list(model.generate(list(prefixes), guide, **options)))


# Ways to steer: each gives pairs (text, proposal or None) and the seconds they took. A guide is classes of
# the probes, with commas between them.


def by_guide(bench, prefixes, guide, through, run_seed, sampling):
    sampling = replace(sampling, guide_through=through)
    return draw(bench.model, prefixes, guide, control_tokens, run_seed, sampling)


def by_best_of_n(bench, prefixes, guide, n, run_seed, sampling):
    drafts = []
    total = 0.0
    for k in range(n):
        draft, seconds = draw(bench.model, prefixes, "none", control_tokens, run_seed + 1000 * k, sampling)
        drafts.append(draft)
        total += seconds
    chosen, seconds = timed(lambda: peers.best_of_n(bench.model, drafts, guide))
    return chosen, total + seconds


def by_experts(bench, prefixes, guide, a, run_seed, sampling):
    rng = rng_at(bench.model.device, run_seed)
    chosen = [bench.experts[label] for label in guide.split(",")]

    def write(some):
        return peers.dexperts(bench.model, some, chosen, a, control_tokens, sampling, rng)

    return in_batches(prefixes, write)


def by_vectors(bench, prefixes, guide, a, run_seed, sampling):
    rng = rng_at(bench.model.device, run_seed)
    chosen = [bench.vectors[label] for label in guide.split(",")]

    def write(some):
        return peers.by_vectors(bench.model, some, chosen, vector_layer, a, control_tokens, sampling, rng)

    return in_batches(prefixes, write)


def by_prompt(bench, prefixes, guide, run_seed, sampling):
    torch.manual_seed(run_seed)

    def write(some):
        return peers.prompting(bench.lm, some, guide.split(","), control_tokens, sampling)

    return in_batches(prefixes, write)


def in_batches(prefixes, write):
    """write: some of the prefixes -> texts. -> pairs (text, None) for all, and the seconds they took."""

    def write_all():
        written = []
        for part in batches(prefixes):
            written += [(text, None) for text in write(prefixes[part])]
        return written

    return timed(write_all)


def alternatives(bench, classes):
    """{name: way} of the peers that are available for these classes."""
    guide = ",".join(classes)
    ways = {f"best of {n:g}": partial(by_best_of_n, guide=guide, n=int(n)) for n in numbers(best_of)}
    if set(classes) <= set(bench.experts):
        ways |= {f"DExperts {a:g}": partial(by_experts, guide=guide, a=a) for a in numbers(expert_weights)}
    if set(classes) <= set(bench.vectors):
        ways |= {f"vector {a:g}": partial(by_vectors, guide=guide, a=a) for a in numbers(vector_weights)}
    if bench.lm.tokenizer.chat_template:
        ways["prompted"] = partial(by_prompt, guide=guide)
    return ways


def judge_one(bench, label, texts):
    """The share of texts with a class, by each judge and their mean. If texts are long, also by thirds."""

    def share(texts):
        return {f"share {judge}": (p > 0.5).mean() for judge, p in scores(bench.judges, label, texts).items()}

    by_judge = share(texts)
    figures = {"share": np.mean(list(by_judge.values()))} | by_judge
    words = [text.split() for text in texts]
    words = [row for row in words if len(row) >= 30]
    if control_tokens >= 96 and words:
        for i in range(3):
            third = [" ".join(row[len(row) * i // 3 : len(row) * (i + 1) // 3]) for row in words]
            figures[f"third {i + 1}"] = np.mean(list(share(third).values()))
    return figures


def judge_both(bench, classes, texts):
    """The share of texts with both classes. A text has a class if the mean of its judges says so."""
    has = []
    for label in classes:
        p = list(scores(bench.judges, label, texts).values())
        has.append(np.mean(p, axis=0) > 0.5)
    first, second = has
    return {"both": (first & second).mean(), "first": first.mean(), "second": second.mean()}


def steer(bench, book, sampling, panels):
    """The rows of control and compose. panels: {classes: {name: way}}."""
    by_guide(bench, ("It",), "none", "estimate", seed, sampling)  # warms up, which is not part of the seconds
    rows = {}
    for classes, ways in panels.items():
        for name, way in ways.items():
            rows[f"{'+'.join(classes)}: {name}"] = (classes, way)
    for row, run_seed in book.missing(rows):
        classes, way = rows[row]
        own_prompts = rude_prompts if rude_prompts and classes == ("nontoxic",) else prompts
        prefixes = tuple(prompt for prompt in split_prompts(own_prompts) for _ in range(num_samples))
        written, seconds = way(bench, prefixes, run_seed=run_seed, sampling=sampling)
        texts = [text for text, _ in written]
        figures, _ = measure(bench, prefixes, written)
        figures["Dist-3"] = distinct(np.reshape(texts, (-1, num_samples)), 3)  # within the texts of a prompt
        figures["seconds"] = seconds / len(texts)
        if len(classes) == 1:
            shares = judge_one(bench, classes[0], texts)
        else:
            shares = judge_both(bench, classes, texts)
        book.add(row, run_seed, shares | figures, texts)


def control(bench, book, sampling):
    """Figures 5 and 6: attribute and fluency against the weight of the guide, and the alternatives."""
    panels = {}
    for label in items(attributes):
        ways = {"weight 0": partial(by_guide, guide="none", through="estimate")}
        for through in items(guide_through):
            name = "weight" if through == "estimate" else "network, weight"
            for w in numbers(guidance_weights):
                ways[f"{name} {w:g}"] = partial(by_guide, guide=f"{label}:{w:g}", through=through)
        panels[(label,)] = ways | alternatives(bench, [label])
    steer(bench, book, sampling, panels)


def compose(bench, book, sampling):
    """Table 3: two attributes at once, and each alone."""
    panels = {}
    for pair in items(pairs):
        classes = tuple(pair.split("+"))
        guides = ("none", *classes, ",".join(classes))
        ways = {guide: partial(by_guide, guide=guide, through=sampling.guide_through) for guide in guides}
        panels[classes] = ways | alternatives(bench, classes)
    steer(bench, book, sampling, panels)


# ---------- Runtime -----------------------------------------------------------------------------------------


def timed(f):
    """-> what f() gives, and its seconds."""
    begin = time.perf_counter()
    value = f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return value, time.perf_counter() - begin


def parts_of(model, batch, count, run_seed, sampling):
    """{part: a function that does it}, for a batch of one prompt and `count` new tokens."""
    rng = rng_at(model.device, run_seed)
    prefix = split_prompts(prompts)[0]
    prefixes = [prefix] * batch
    tokens = [model.tokenizer.encode_ordinary(prefix)] * batch
    label = items(attributes)[0]
    generator = model.decoder.generator
    x = torch.zeros(batch, len(model.mean), device=model.device)
    alpha2 = torch.ones(batch, device=model.device)
    soft = {
        "soft_prompt": generator(x, alpha2),
        "soft_first": model.decoder.soft_first,
        "eot_row": generator.eot_row,
    }
    options = asdict(replace(sampling, may_end=False))
    options |= {"batch_size": batch, "max_new_tokens": count, "seed": run_seed}
    return {
        "encode": lambda: model.encode(prefixes),
        "diffuse": lambda: model.propose([""] * batch, "none", sampling, rng),
        "diffuse, guided": lambda: model.propose([""] * batch, label, sampling, rng),
        "prompt": lambda: generator(x, alpha2),
        "decode": lambda: model.decoder.gpt.generate(tokens, count, sampling, rng=rng, **soft),
        "guided text": lambda: list(model.generate(prefixes, label, **options)),
    }


def runtime(bench, book, sampling):
    """Table 4: seconds a text of each part, of a guided text, and of that relative to decoding alone."""
    rows = {}
    for batch in map(int, numbers(batch_sizes)):
        for count in map(int, numbers(lengths)):
            if count <= bench.model.longest:
                rows[f"batch {batch}, tokens {count}"] = (batch, count)
    for row, run_seed in book.missing(rows):
        batch, count = rows[row]
        parts = parts_of(bench.model, batch, count, run_seed, sampling)
        for part in parts.values():  # to warm up
            part()
        figures = {}
        for name, part in parts.items():
            _, seconds = timed(part)
            figures[name] = seconds / batch
        figures["relative"] = figures["guided text"] / figures["decode"]
        book.add(row, run_seed, figures, [])


# ---------- What the tasks share ----------------------------------------------------------------------------


TASKS = {f.__name__: f for f in (generation, noise, control, compose, runtime)}


def batches(rows):
    return [slice(i, i + batch_size) for i in range(0, len(rows), batch_size)]


def split_prompts(text):
    return [prompt.strip() for prompt in text.split("|")]


def items(text):
    """`a, b` -> [a, b]; none from an empty text."""
    return [item.strip() for item in text.split(",") if item.strip()]


def numbers(text):
    """`0, 0.05, 1` -> [0.0, 0.05, 1.0]. Raises InputError."""
    with reported_as(f"{text!r}: must be numbers, with commas between them"):
        return [float(item) for item in items(text)]


def check_window(lm, tokenizer, wanted):
    """Raises InputError if a prefix and its text are more than the judge of fluency reads at once.

    How many of its tokens make one of the decoder's is estimated from the prompts.
    """
    prefixes = split_prompts(prompts) + split_prompts(rude_prompts)
    theirs = [len(tokens) for tokens in lm.tokenize(prefixes)]
    ours = [len(tokenizer.encode_ordinary(prefix)) for prefix in prefixes]
    ratio = max(1.0, sum(theirs) / max(1, sum(ours)))
    longest = 0.0
    if {"generation", "noise"} & set(wanted):
        longest = ratio * (prefix_tokens + new_tokens)
    if {"control", "compose"} & set(wanted):
        longest = max(longest, max(theirs) + ratio * control_tokens)
    needed = 1 + math.ceil(longest)  # after the token that begins a document
    too_short = f"--judge_lm {judge_lm} reads at most {lm.window} tokens"
    check(needed <= lm.window, f"{too_short}: a prefix and its text may have {needed}")


def what_decides(settings, model):
    """The settings that decide the results, and the SHA-256 of every file that is read."""
    decisive = {k: v for k, v in settings.items() if k not in ("task", "results", "device", "seeds")}
    folders = re.split("[=+,]", experts.replace(" ", ""))  # and classes, for which there is no such file
    paths = [f"{folder}/decoder.safetensors" for folder in folders]
    paths += [text_file, judge_lm, *items(judges), *items(vector_rows)]
    here = glob.escape(model.folder)
    paths += glob.glob(f"{here}/*.safetensors") + glob.glob(f"{here}/probes/*.npz")
    for path in filter(os.path.isfile, paths):
        decisive[os.path.relpath(path, model.folder)] = sha256(path)
    return decisive


def load_bench(model, wanted, labels):
    """All that the tasks need, loaded first, so that anything missing is reported before work starts.

    labels: the classes that texts will be steered to.
    """
    bench = SimpleNamespace(model=model, lm=None, judges={}, experts={}, vectors={})
    if wanted != ["runtime"]:
        bench.lm = LanguageModel(judge_lm, model.device)
        check_window(bench.lm, model.tokenizer, wanted)
    if not labels:
        return bench
    for name in items(judges):
        bench.judges[name] = load_judge(name, model.device, batch_size)
    for label in labels:
        known = any({label, OPPOSITE.get(label)} & set(classes) for classes, _ in bench.judges.values())
        check(known, f"--judges: none of {judges} has the class {label!r}: see python -m plumbing.judges")
    bench.experts = peers.load_experts(experts, model)
    for path in items(vector_rows):
        num_layers = model.decoder.gpt.config.n_layer
        check(vector_layer < num_layers, f"--vector_layer: this decoder's are 0 to {num_layers - 1}")
        texts, classes = read_labelled(path)
        bench.vectors |= peers.steering_vectors(model, texts, classes, vector_layer)
    return bench


def main(settings):
    wanted = list(TASKS) if task == "all" else [task]
    check(set(wanted) <= set(TASKS), f"task={task!r}: must be {', '.join(TASKS)} or all")
    for key in ("attributes", "pairs", "guide_through"):
        check(items(settings[key]), f"--{key} must not be empty")
    for pair in items(pairs):
        check(pair.count("+") == 1, f"--pairs {pair}: write negative+sports")
    for text in (cfg_scales, plain_temperatures, sigma2s, guidance_weights, expert_weights, vector_weights):
        numbers(text)  # reports at once what is not a number
    for key in ("best_of", "lengths", "batch_sizes"):
        for number in numbers(settings[key]):
            check_range(key, number, "at least 1")
    fields = {field: settings[field] for field in asdict(Sampling())}
    samplings = [Sampling(**fields | {"guide_through": way}) for way in items(guide_through)]
    sampling = samplings[0]

    folder, which = pick_model(out_dir)
    model = DGLM(folder, device)
    print(which, file=sys.stderr)
    labels = []  # the classes that texts will be steered to
    if "control" in wanted:
        labels += items(attributes)
    if "compose" in wanted:
        labels += items(pairs.replace("+", ","))
    guides = list(labels)
    if "runtime" in wanted:
        guides.append(items(attributes)[0])
    parse_guide(",".join(guides), model.probes)  # reports at once what no probe has
    decisive = what_decides(settings, model)
    bench = load_bench(model, wanted, labels)

    os.makedirs(results, exist_ok=True)
    _locked = lock(f"{results}/.lock")  # until main ends
    for name in wanted:
        book = Results(f"{results}/{name}.jsonl", decisive, range(seed, seed + seeds))
        TASKS[name](bench, book, sampling)
        print(f"\n{name}, fluency by {judge_lm}")
        show(book.table())
        if name != "runtime":
            plot(book.table(), "similarity" if name == "noise" else "", f"{results}/{name}.png")


if __name__ == "__main__":
    run(main, globals())
