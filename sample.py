"""Stage 4: write, steered or not.

    python sample.py --prefix "The food was" --guide negative
    python sample.py --prefix "The food was" --guide negative:30,sports:10 --num_samples 5
    python sample.py --prefix FILE:prefixes.txt --guide sentiment=positive --out texts.jsonl
    python sample.py --prefix "The food was" --guide negative --steps 10 --watch

Texts go to standard output, notes to standard error.
"""

import json
import sys
from dataclasses import asdict

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import DGLM, Sampling, parse_guide
from plumbing.config import run
from plumbing.errors import check
from plumbing.files import check_writable, pick_model, write_file
from plumbing.text import clean

prefix = ""  # text to continue, or FILE:path for a file with one a line; empty: about anything
guide = "none"  # none, or classes of probes: negative (with its own weight), negative:30,not-sports:40
num_samples = 1  # texts for each prefix [at least 1]
max_new_tokens = 32  # longest text [at least 1]
proposal_tokens = 0  # a longer text gets a new proposal after so many; 0: 2/3 of a window [at least 0]
out_dir = ""  # the model: a folder, or owner/model of the hub; default pretrained/english
steps = Sampling.steps  # diffusion steps: 4 for dpm++, many for ddim and ddpm; the paper: 250
sampler = Sampling.sampler  # dpm++, ddim or ddpm; the paper: ddpm
cfg_scale = Sampling.cfg_scale  # classifier-free guidance: above 1 follows the prefix more; the paper: 1
guide_through = (
    Sampling.guide_through
)  # estimate, or network: also backpropagate through the diffusion, as the paper
sigma2 = Sampling.sigma2  # noise on the proposal, from 0 (obey it) to 1 (ignore it)
temperature = Sampling.temperature  # 0 takes the likeliest token; the paper: 1
top_k = Sampling.top_k  # draw from so many likeliest tokens; 0: from all
top_p = Sampling.top_p  # and of these from the fewest that make up this probability
repetition_penalty = Sampling.repetition_penalty  # above 1 avoids tokens of the new text; the paper: 1.2
may_end = Sampling.may_end  # whether a text may end before max_new_tokens
watch = False  # show every step for the first text of each batch: lambda, p(guided class), predicted words
batch_size = 64  # texts at a time [at least 1]
out = ""  # a JSON-lines file for the texts and what the probes say about them
device = "auto"  # auto, cpu, cuda, cuda:1, mps
seed = 1337  # fixes everything: a text does not depend on what else is written


def main(settings):
    sampling = asdict(Sampling(**{key: settings[key] for key in asdict(Sampling())}))  # checks them at once
    if out:
        check_writable(out, inputs=[prefix.removeprefix("FILE:")])
    prefixes = read_prefixes()
    folder, which = pick_model(out_dir)
    model = DGLM(folder, device)
    print(f"{which}, guide {guide}, seed {seed}", file=sys.stderr)

    befores = [before.rstrip() for before in prefixes for _ in range(num_samples)]
    num_parts = -(-max_new_tokens // (proposal_tokens or model.proposal_tokens))
    num_batches = -(-len(befores) // batch_size)
    quick = steps < 50
    progress = tqdm(total=steps * num_parts * num_batches, leave=False, disable=watch or quick)

    def on_step(batch, log_snr, e):
        progress.update()
        if watch:
            print_step(model, batch[0], log_snr, e[:1])

    options = {"batch_size": batch_size, "proposal_tokens": proposal_tokens, "on_step": on_step}
    texts = model.generate(prefixes, guide, num_samples, max_new_tokens, seed, **options, **sampling)
    written = []
    try:
        for before, (text, proposal) in zip(befores, texts):
            written.append((text, proposal))
            progress.write(" ".join((before + text).split()))
    finally:  # interrupted, it keeps what is written so far
        progress.close()
        if out and written:
            write_file(out, "".join(json_lines(model, befores, written)))


def read_prefixes():
    if not prefix.startswith("FILE:"):
        return [clean(prefix)]
    path = prefix.removeprefix("FILE:")
    with open(path, encoding="utf-8-sig") as f:
        prefixes = [line.strip() for line in f if line.strip()]
    check(prefixes, f"{path} holds no line of text")
    return prefixes


def print_step(model, before, log_snr, e):
    """One line for the proposal e (1, E) predicted at a step, with the decoder's likeliest words for it."""
    rng = torch.Generator(model.device).manual_seed(seed + 1)  # its own, so that the text stays the same
    num_tokens = min(max_new_tokens, proposal_tokens or model.proposal_tokens)
    (words,) = model.write([before], e, num_tokens, Sampling(temperature=0), rng)
    shares = ""
    for direction in parse_guide(guide, model.probes):
        shares += f"  {direction.name} {direction.log_prob(e[0]).exp():.2f}"
    print(f"lambda {log_snr:6.1f}{shares}  {' '.join((before + words).split())}")


def json_lines(model, befores, written):
    """Yields a line for each prefix and its pair (text, proposal)."""
    texts, proposals = zip(*written)
    e = model.encode(texts)  # read back, to see what became of the proposals
    similarity = F.cosine_similarity(e, torch.stack(proposals)).tolist()
    for i, (before, text) in enumerate(zip(befores, texts)):
        shares = {}
        for probe in model.probes:
            p = probe.log_prob(e[i]).exp().tolist()
            shares[probe.name] = dict(zip(probe.classes, p))
        record = {
            "prefix": before,
            "continuation": text,
            "guide": guide,
            "seed": seed,
            "similarity": similarity[i],
            "probes": shares,
        }
        yield json.dumps(record, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    run(main, globals())
