"""Stage 4: write, steered or not.

    python sample.py --prefix "The food was" --guide negative
    python sample.py --prefix "The food was" --guide negative:30,sports:10 --num_samples 5
    python sample.py --prefix FILE:prefixes.txt --guide sentiment=positive --out texts.jsonl
    python sample.py --prefix "The food was" --guide negative --steps 10 --watch

The texts go to standard output, notes to standard error.
"""

import json
import os
import sys
from dataclasses import asdict

import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import check, run
from model import DGLM, Sampling, parse_guide
from storage import newest_model, write_file

prefix = ""  # text to continue, or FILE:path with one a line; none: about anything
guide = "none"  # none, or classes of the probes: negative (with its probe's weight), negative:30,sports:10
num_samples = 1  # texts for each prefix
max_new_tokens = 32  # of each text
out_dir = ""  # the model's folder; default the newest in out/, else pretrained/reviews
steps = Sampling.steps  # of the diffusion: 4 for dpm++, many for ddim and ddpm; the paper: 250
sampler = Sampling.sampler  # dpm++, ddim or ddpm; the paper: ddpm
cfg_scale = Sampling.cfg_scale  # classifier-free guidance: above 1 follows the prefix more; the paper: 1
guide_through = Sampling.guide_through  # estimate, or network: through the diffusion too; the paper's
sigma2 = Sampling.sigma2  # noise on the proposal: 0 obeys it, 1 ignores it
temperature = Sampling.temperature  # 0 takes the likeliest token; the paper: 1
top_k = Sampling.top_k  # so many likeliest tokens; 0 takes all
top_p = Sampling.top_p  # of these, the likeliest that make up this probability
repetition_penalty = Sampling.repetition_penalty  # above 1 avoids what was just written; the paper: 1.2
may_end = Sampling.may_end  # whether a text may end before max_new_tokens
watch = False  # show each step, of each batch's first text: lambda, p(guided class), the words predicted
batch_size = 64  # texts at a time
out = ""  # a JSON-lines file for the texts and what the probes say of them
device = "auto"  # auto, cpu, cuda, cuda:1, mps
seed = 1337  # fixes everything


def main(settings):
    for key in ("num_samples", "max_new_tokens", "batch_size"):
        check(settings[key] >= 1, f"{key}={settings[key]}: must be at least 1")
    sampling = asdict(Sampling(**{key: settings[key] for key in asdict(Sampling())}))  # checked at once
    check(os.path.isdir(os.path.dirname(out) or "."), f"cannot write {out}: there is no such folder")
    prefixes = [prefix]
    if prefix.startswith("FILE:"):
        with open(prefix[5:], encoding="utf-8-sig") as f:
            prefixes = [line.strip() for line in f if line.strip()]
        check(prefixes, f"{prefix[5:]} holds no line of text")
    folder = out_dir or newest_model()
    model = DGLM(folder, device)
    print(f"model {folder}, guide {guide}, seed {seed}", file=sys.stderr)
    rows = [p.rstrip() for p in prefixes for _ in range(num_samples)]

    def on_step(batch, log_snr, x):
        """x (B, E): the proposals predicted at this step, for the prefixes of a batch."""
        bar.update()
        if watch:  # with random numbers of its own, so that the text is the same
            parsed = parse_guide(guide, model.probes)
            guided = [(probe.classes[i], probe.log_prob(x[0])[i].exp()) for probe, i, _ in parsed]
            rng = torch.Generator(model.device).manual_seed(seed + 1)
            (words,) = model.write(batch[:1], x[:1], max_new_tokens, Sampling(temperature=0), rng)
            shares = "".join(f"  {label} {p:.2f}" for label, p in guided)
            print(f"lambda {log_snr:6.1f}{shares}  {' '.join((batch[0] + words).split())}")

    options = sampling | {"batch_size": batch_size, "on_step": on_step}
    texts = model.generate(prefixes, guide, num_samples, max_new_tokens, seed, **options)
    written, proposals = [], []
    with tqdm(total=steps * -(-len(rows) // batch_size), leave=False, disable=watch or steps < 50) as bar:
        for before, (text, proposal) in zip(rows, texts):
            bar.write(" ".join((before + text).split()))
            written.append(text)
            proposals.append(proposal)
    if out:
        x = model.encode(written)  # read back, to see what became of the proposal
        similarity = F.cosine_similarity(x, torch.stack(proposals)).tolist()
        lines = []
        for i, (before, text) in enumerate(zip(rows, written)):
            record = {
                "prefix": before,
                "continuation": text,
                "guide": guide,
                "seed": seed,
                "similarity": similarity[i],  # of the text to its proposal
                "probes": {
                    p.name: dict(zip(p.classes, p.log_prob(x[i]).exp().tolist())) for p in model.probes
                },
            }
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        write_file(out, "".join(lines))


if __name__ == "__main__":
    run(main, globals())
