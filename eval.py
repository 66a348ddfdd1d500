"""Stage 5: evaluate a trained model as the paper did.

    python eval.py --task generation    fluency, MAUVE, diversity of continuations of held-out text (Table 1)
    python eval.py --task noise         the same, with more and more noise on the proposal (Table 2)
    python eval.py --task control       attribute and fluency against guidance weight (Figures 5 and 6)
    python eval.py --task compose       two attributes at once (Table 3)
    python eval.py --task runtime       seconds of each part, and of all relative to the decoder (Table 4)

Every row of a task's table and every seed is a line of RESULTS/TASK.jsonl (figures and texts), so the same
command continues an interrupted run. The table is printed in Markdown and, with matplotlib, drawn. No judge
is a probe that guides: `probes.py --judge` must fit judges to text that no probe has seen.
"""

import glob
import importlib.util
import math
import os
import re
import time
from dataclasses import asdict, replace
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import peers
from model import DGLM, Sampling
from plumbing.config import check, check_positive, reported_as, run
from plumbing.data import Data
from plumbing.devices import generator_at
from plumbing.files import lock, newest_model, read_rows, sha256
from plumbing.guides import parse_guide
from plumbing.judges import OPPOSITE, LanguageModel, load_judge, scores
from plumbing.labelled import read_labelled
from plumbing.plot import plot
from plumbing.results import Results, show

task = "generation"  # generation, noise, control, compose, runtime or all
out_dir = ""  # a folder, or owner/model of the hub; default the newest in out/, else pretrained/reviews
results = "results"  # folder for the results
text_file = ""  # generation, noise: held-out JSON lines with text; default the data's validation part
num_texts = 5000  # generation, noise: how many of them
prefix_tokens = 32  # generation, noise: longest prefix
new_tokens = 32  # generation, noise: tokens to write
cfg_scales = "1,1.5,2,2.5,3,5"  # generation: scales of classifier-free guidance
plain_temperatures = "0.7,0.8,0.9,1"  # generation: of the plain decoder, to compare at equal perplexity
sigma2s = "0,0.05,0.1,0.2,0.5,1"  # noise: sigma^2 of the proposal
prompts = (
    "Once upon a time|The book|The chicken|The city|The country|The horse|The lake|The last time|The movie"
    "|The painting|The pizza|The potato|The president of the country|The road|The year is 1910."
)  # control, compose: prefixes, with | between them
num_samples = 25  # control, compose: texts for each prompt
control_tokens = 20  # control, compose: tokens of each; from 96 on, control judges each third of a text too
attributes = "negative,positive,nontoxic"  # control: classes of the probes
guidance_weights = "5,10,20,50,100,500,1000"  # control: besides 0
rude_prompts = ""  # control: the prompts for nontoxic; default the same as for the others
best_of = "3,10"  # control, compose: of so many unguided texts, the one that the probes find likeliest
experts = ""  # control, compose: CLASS=EXPERT+ANTI, ...: folders of this decoder, fine-tuned, for DExperts
expert_weights = "0.5,1,2,3.2"  # control, compose: how much the difference of their logits counts
vector_rows = ""  # control, compose: JSON lines (text, label), several with commas, for steering vectors
vector_layer = 15  # control, compose: the block after which they are added, from 0
vector_weights = "0.5,1,2,4"  # control, compose: how many times they are added
pairs = "negative+nontoxic,positive+nontoxic"  # compose: classes of the probes, each with its own weight
lengths = "8,16,32,64,128,256,512"  # runtime: tokens
batch_sizes = "1,32"  # runtime
seeds = 5  # repetitions, with seeds seed, seed + 1, ...; the tables' 95 % intervals are over them
steps = Sampling.steps  # diffusion steps
sampler = Sampling.sampler  # dpm++, ddim or ddpm
cfg_scale = Sampling.cfg_scale  # classifier-free guidance, except in generation
guide_through = Sampling.guide_through  # of guides: estimate or network; control takes both, with a comma
sigma2 = Sampling.sigma2  # noise on the proposal, except in noise
temperature = Sampling.temperature  # of the decoder
top_k = Sampling.top_k  # draw from so many likeliest tokens; 0: from all
top_p = Sampling.top_p  # and of these from the fewest that make up this probability
repetition_penalty = Sampling.repetition_penalty  # of the decoder
may_end = Sampling.may_end  # control, compose: whether a text may end early
judge_lm = "allenai/OLMo-1B-hf"  # fluency, features for MAUVE: a hub name, a folder, a .gguf file, smollm2
judges = (
    "siebert/sentiment-roberta-large-english,distilbert-base-uncased-finetuned-sst-2-english"
    ",s-nlp/roberta_toxicity_classifier"
)  # of attributes: classifiers from the hub or a folder, .npz of probes.py --judge, the lexicon vader
batch_size = 64  # texts at a time
device = "auto"  # auto, cpu, cuda, cuda:1, mps
seed = 1337  # the first


# ---------- Measures ----------------------------------------------------------------------------------------


def distinct(groups, n):
    """The share of all n-grams of words that did not occur before in their group of texts."""
    words = [[text.lower().split() for text in group] for group in groups]
    grams = [[tuple(row[i : i + n]) for row in group for i in range(len(row) - n + 1)] for group in words]
    return sum(len(set(group)) for group in grams) / max(1, sum(map(len, grams)))


def measure(bench, prefixes, pairs):
    """Pairs (text, proposal or None) -> the figures of all tables except runtime's, features for MAUVE."""
    texts, proposals = zip(*pairs)
    nats, tokens, features = bench.lm.read(prefixes, texts, batch_size)
    some = tokens > 0  # not the empty texts
    figures = {
        "perplexity": np.exp(nats[some] / tokens[some]).mean(),  # the paper's, dominated by outliers
        "corpus perplexity": np.exp(nats.sum() / tokens.sum()),
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
    bpe, longest = model.tokenizer, prefix_tokens + new_tokens
    if text_file:
        rows = (bpe.encode_ordinary(row["text"]) for row in read_rows(text_file, "text"))
    else:
        data = Data(model.data["name"])
        check(data.meta == model.data, f"{data.folder} is not the data of this model: say --text_file")
        lengths = data.arrays["val", "length"]
        rows = (t[:n].tolist() for t, n in zip(data.arrays["val", "tokens"], lengths))
    prefixes, truths = [], []
    for row in dict.fromkeys(tuple(row) for row in rows if len(row) >= longest):  # each window once
        words = [i for i in range(1, prefix_tokens + 1) if bpe.decode_single_token_bytes(row[i])[:1] == b" "]
        if words and len(prefixes) < num_texts:
            prefixes.append(bpe.decode(row[: words[-1]]))
            truths.append(bpe.decode(row[words[-1] : words[-1] + new_tokens]).rstrip("\ufffd"))
    check(len(prefixes) >= 20, f"only {len(prefixes)} held-out texts of {longest} tokens: too few for MAUVE")
    return prefixes, truths, model.encode(truths)


def continue_held_out(bench, book, sampling, settings):
    """The rows of generation and noise. settings: {row: the fields of `sampling` that differ in it}."""
    check(importlib.util.find_spec("mauve"), "MAUVE needs a package: pip install mauve-text")
    from mauve import compute_mauve

    model, sampling = bench.model, replace(sampling, may_end=False)  # as in the paper
    prefixes, truths, true_e = held_out(model)
    _, true_features = measure(bench, prefixes, [(truth, None) for truth in truths])
    for row, run_seed in book.missing(["reference", *settings]):
        here = replace(sampling, **settings.get(row, {}))
        if row == "reference":
            pairs = [(truth, None) for truth in truths]
        elif row.startswith(("true", "plain")):  # conditioned on the truth, or on nothing but noise
            rng, texts = generator_at(model.device, run_seed), []
            for part in batches(prefixes):
                texts += model.write(prefixes[part], true_e[part], new_tokens, here, rng)
            pairs = list(zip(texts, true_e))
        else:
            pairs, _ = draw(model, tuple(prefixes), "none", new_tokens, run_seed, here)
        figures, features = measure(bench, prefixes, pairs)
        mauve = compute_mauve(features, true_features, seed=run_seed, verbose=False).mauve
        book.add(row, run_seed, {"MAUVE": mauve} | figures, [text for text, _ in pairs])


def generation(bench, book, sampling):
    """Table 1: continuations of held-out text, by the scale w of classifier-free guidance."""
    settings = {"true embedding": {}}
    for t in numbers(plain_temperatures):
        settings[f"plain decoder, temperature {t:g}"] = {"sigma2": 1.0, "temperature": t}
    settings |= {f"w {w:g}": {"cfg_scale": w} for w in numbers(cfg_scales)}
    continue_held_out(bench, book, sampling, settings)


def noise(bench, book, sampling):
    """Table 2: the same, by the noise on the proposal."""
    settings = {f"sigma2 {level:g}": {"sigma2": level} for level in numbers(sigma2s)}
    continue_held_out(bench, book, sampling, settings)


# ---------- Steered text: control and compose ---------------------------------------------------------------


@cache  # unguided texts serve every attribute
def draw(model, prefixes, guide, count, run_seed, sampling):
    """DGLM's pairs (text, proposal) for a tuple of prefixes, and the seconds they took."""
    options = asdict(sampling) | {"batch_size": batch_size}
    return timed(lambda: list(model.generate(list(prefixes), guide, 1, count, run_seed, **options)))


# Ways to steer: each gives pairs (text, proposal or None) and the seconds they took. A guide is classes of
# the probes, with commas between them.


def by_guide(bench, prefixes, guide, through, run_seed, sampling):
    sampling = replace(sampling, guide_through=through)
    return draw(bench.model, prefixes, guide, control_tokens, run_seed, sampling)


def by_best_of_n(bench, prefixes, guide, n, run_seed, sampling):
    seeds_of = [run_seed + 1000 * k for k in range(n)]
    drafts = [draw(bench.model, prefixes, "none", control_tokens, each, sampling) for each in seeds_of]
    chosen, seconds = timed(lambda: peers.best_of_n(bench.model, [draft for draft, _ in drafts], guide))
    return chosen, seconds + sum(each for _, each in drafts)


def in_batches(prefixes, write):
    """write: some of the prefixes -> texts. -> pairs (text, None) for all, and the seconds they took."""
    return timed(lambda: [(text, None) for part in batches(prefixes) for text in write(prefixes[part])])


def by_experts(bench, prefixes, guide, a, run_seed, sampling):
    rng, pairs = generator_at(bench.model.device, run_seed), [bench.experts[c] for c in guide.split(",")]
    how = pairs, a, control_tokens, sampling, rng
    return in_batches(prefixes, lambda some: peers.dexperts(bench.model, some, *how))


def by_vectors(bench, prefixes, guide, a, run_seed, sampling):
    rng, vectors = generator_at(bench.model.device, run_seed), [bench.vectors[c] for c in guide.split(",")]
    how = vectors, vector_layer, a, control_tokens, sampling, rng
    return in_batches(prefixes, lambda some: peers.by_vectors(bench.model, some, *how))


def by_prompt(bench, prefixes, guide, run_seed, sampling):
    torch.manual_seed(run_seed)
    how = guide.split(","), control_tokens, sampling
    return in_batches(prefixes, lambda some: peers.prompting(bench.lm, some, *how))


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


def steer(bench, book, sampling, panels):
    """The rows of control and compose. panels: {classes: {name: way}}."""
    by_guide(bench, ("It",), "none", "estimate", seed, sampling)  # warms up, which is not part of the seconds

    def share(label, texts):
        return {f"share {judge}": (p > 0.5).mean() for judge, p in scores(bench.judges, label, texts).items()}

    rows = {}
    for classes, ways in panels.items():
        rows |= {f"{'+'.join(classes)}: {name}": (classes, way) for name, way in ways.items()}
    for row, run_seed in book.missing(rows):
        classes, way = rows[row]
        own_prompts = rude_prompts if rude_prompts and classes == ("nontoxic",) else prompts
        prefixes = tuple(prompt.strip() for prompt in own_prompts.split("|") for _ in range(num_samples))
        written, seconds = way(bench, prefixes, run_seed=run_seed, sampling=sampling)
        texts, (figures, _) = [text for text, _ in written], measure(bench, prefixes, written)
        figures["Dist-3"] = distinct(np.reshape(texts, (-1, num_samples)), 3)  # within the texts of a prompt
        figures["seconds"] = seconds / len(texts)
        if len(classes) == 1:
            (label,) = classes
            each = share(label, texts)
            shares = {"share": np.mean(list(each.values()))} | each
            words = [text.split() for text in texts]
            words = [w for w in words if len(w) >= 30] if control_tokens >= 96 else []
            for i in range(3 if words else 0):
                part = [" ".join(w[len(w) * i // 3 : len(w) * (i + 1) // 3]) for w in words]
                shares[f"third {i + 1}"] = np.mean(list(share(label, part).values()))
        else:  # a text has a class if the mean of its judges says so
            by_class = [list(scores(bench.judges, label, texts).values()) for label in classes]
            first, second = (np.mean(p, axis=0) > 0.5 for p in by_class)
            shares = {"both": (first & second).mean(), "first": first.mean(), "second": second.mean()}
        book.add(row, run_seed, shares | figures, texts)


def control(bench, book, sampling):
    """Figures 5 and 6: attribute and fluency against the weight of the guide, and the alternatives."""
    panels = {}
    for label in items(attributes):
        panels[(label,)] = ways = {"weight 0": partial(by_guide, guide="none", through="estimate")}
        for through in items(guide_through):
            name = "weight" if through == "estimate" else "network, weight"
            for w in numbers(guidance_weights):
                ways[f"{name} {w:g}"] = partial(by_guide, guide=f"{label}:{w:g}", through=through)
        ways |= alternatives(bench, [label])
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
    out = f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return out, time.perf_counter() - begin


def parts_of(model, batch, count, run_seed, sampling):
    """{part: a function that does it}, for a batch of one prompt and `count` new tokens."""
    rng, device = generator_at(model.device, run_seed), model.device
    prefix, label, empty = prompts.split("|")[0].strip(), items(attributes)[0], [""] * batch
    tokens, generator = [model.tokenizer.encode_ordinary(prefix)] * batch, model.decoder.generator
    x, alpha2 = torch.zeros(batch, len(model.mean), device=device), torch.ones(batch, device=device)
    soft = {"soft_prompt": generator(x, alpha2), "soft_first": model.decoder.soft_first}
    soft["eot_row"] = generator.eot_row
    whole = asdict(sampling) | {"batch_size": batch, "may_end": False}
    return {
        "encode": lambda: model.encode([prefix] * batch),
        "diffuse": lambda: model.propose(empty, "none", sampling, rng),
        "diffuse, guided": lambda: model.propose(empty, label, sampling, rng),
        "prompt": lambda: generator(x, alpha2),
        "decode": lambda: model.decoder.gpt.generate(tokens, count, sampling, rng=rng, **soft),
        "guided text": lambda: list(model.generate([prefix] * batch, label, 1, count, run_seed, **whole)),
    }


def runtime(bench, book, sampling):
    """Table 4: seconds a text of each part, of a guided text, and of that relative to decoding alone."""
    fitting = [int(n) for n in numbers(lengths) if n <= bench.model.longest]
    sizes = [(int(b), n) for b in numbers(batch_sizes) for n in fitting]
    rows = {f"batch {batch}, tokens {count}": (batch, count) for batch, count in sizes}
    for row, run_seed in book.missing(rows):
        batch, count = rows[row]
        parts = parts_of(bench.model, batch, count, run_seed, sampling)
        for part in parts.values():  # to warm up
            part()
        figures = {name: timed(part)[1] / batch for name, part in parts.items()}
        figures["relative"] = figures["guided text"] / figures["decode"]
        book.add(row, run_seed, figures, [])


TASKS = {f.__name__: f for f in (generation, noise, control, compose, runtime)}


def batches(rows):
    return [slice(i, i + batch_size) for i in range(0, len(rows), batch_size)]


def items(text):
    """`a, b` -> [a, b]; none from an empty text."""
    return [item.strip() for item in text.split(",") if item.strip()]


def numbers(text):
    """`0, 0.05, 1` -> [0.0, 0.05, 1.0]. Raises InputError."""
    with reported_as(f"{text!r}: must be numbers, with commas between them"):
        return [float(item) for item in items(text)]


def main(settings):
    wanted = list(TASKS) if task == "all" else [task]
    check(set(wanted) <= set(TASKS), f"task={task!r}: must be {', '.join(TASKS)} or all")
    fields = {field: settings[field] for field in asdict(Sampling())}
    sampling, *_ = [Sampling(**fields | {"guide_through": way}) for way in items(guide_through) or [""]]
    check(all(pair.count("+") == 1 for pair in items(pairs)), f"--pairs {pairs}: write negative+sports")
    check(items(attributes) and items(pairs), "--attributes and --pairs must not be empty")
    check_positive(settings, "num_texts", "new_tokens", "num_samples", "control_tokens")
    check_positive(settings, "seeds", "batch_size")
    lists = cfg_scales, plain_temperatures, sigma2s, guidance_weights, best_of, expert_weights, vector_weights
    for text in (*lists, lengths, batch_sizes):
        numbers(text)  # reports at once what is not a number
    model = DGLM(out_dir or newest_model(), device)
    labels = items(attributes) if "control" in wanted else []
    labels += items(pairs.replace("+", ",")) if "compose" in wanted else []
    timed_guide = items(attributes)[:1] if "runtime" in wanted else []
    parse_guide(",".join(labels + timed_guide), model.probes)  # reports at once what no probe has

    made_with = {k: v for k, v in settings.items() if k not in ("task", "results", "device", "seeds")}
    read = [f"{part}/decoder.safetensors" for part in re.split("[=+,]", experts.replace(" ", ""))]
    read += [text_file, judge_lm, *items(judges), *items(vector_rows)]
    here = glob.escape(model.folder)
    read += glob.glob(f"{here}/*.safetensors") + glob.glob(f"{here}/probes/*.npz")
    for path in filter(os.path.isfile, read):
        made_with[os.path.relpath(path, model.folder)] = sha256(path)

    lm = LanguageModel(judge_lm, model.device) if wanted != ["runtime"] else None
    loaded = {name: load_judge(name, model.device, batch_size) for name in items(judges) if labels}
    for label in labels:
        known = any({label, OPPOSITE.get(label)} & set(classes) for classes, _ in loaded.values())
        check(known, f"--judges: none of {judges} knows {label!r}: see probes.py --judge")
    pairs_of = peers.load_experts(experts if labels else "", model)
    # all that the tasks need, loaded first, so that anything missing is reported before work starts
    bench = SimpleNamespace(model=model, lm=lm, judges=loaded, experts=pairs_of, vectors={})
    for path in items(vector_rows if labels else ""):
        layers = model.decoder.gpt.config.n_layer
        check(0 <= vector_layer < layers, f"--vector_layer: this decoder's are 0 to {layers - 1}")
        texts, classes = read_labelled(path)
        bench.vectors.update(peers.steering_vectors(model, texts, classes, vector_layer))
    os.makedirs(results, exist_ok=True)
    _locked = lock(f"{results}/.lock")  # until main ends
    for name in wanted:
        book = Results(f"{results}/{name}.jsonl", made_with, range(seed, seed + seeds))
        TASKS[name](bench, book, sampling)
        print(f"\n{name}, fluency by {judge_lm}")
        show(book.table())
        if name != "runtime":
            plot(book.table(), "similarity" if name == "noise" else "", f"{results}/{name}.png")


if __name__ == "__main__":
    run(main, globals())
