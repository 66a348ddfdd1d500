"""Stage 4: write, steered or not.

    python sample.py --prefix "The food was" --guide negative
    python sample.py --prefix "The food was" --guide negative:30,sports:10 --num_samples 5
    python sample.py --prefix FILE:prefixes.txt --guide sentiment=positive --out texts.jsonl
    python sample.py                                                no prefix: about anything

The texts go to standard output, a line each; notes to standard error.
"""

import json
import os
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import check, newest_model, read_lines, run, write_file
from model import DGLM, check_decoding, check_sampling

prefix = ""  # text to continue, or FILE:path with one a line
guide = "none"  # none, or classes of the probes: negative (with its probe's weight), negative:30,sports:10
num_samples = 1  # texts for each prefix
max_new_tokens = 32  # of each text
out_dir = ""  # the model's folder; default the newest in out/, else pretrained/reviews
steps = 5  # of the diffusion; more make proposals for one prefix more varied; the paper: 250
sampler = "dpm++"  # dpm++, ddim or ddpm; the paper: ddpm
cfg_scale = 2.5  # classifier-free guidance: above 1 follows the prefix more closely; the paper's control: 1
sigma2 = 0.05  # noise on the proposal: 0 obeys it, 1 ignores it
top_p = 0.9  # the likeliest tokens that make up this probability
temperature = 0.7  # 0 takes the likeliest token; the paper: 1
repetition_penalty = 1.1  # above 1 avoids tokens already there; the paper: 1.2
batch_size = 64  # texts at a time
out = ""  # a JSON-lines file for the texts and what the probes say of them
device = "auto"  # auto, cpu, cuda, cuda:1, mps
compile = False  # torch.compile: a minute first, then faster; for many texts on a GPU
seed = 1337  # fixes everything


def main(settings):
    for name in ("num_samples", "max_new_tokens", "batch_size"):
        check(settings[name] >= 1, f"{name}={settings[name]}: must be at least 1")
    check_sampling(steps, sampler)
    check_decoding(sigma2, temperature, top_p, repetition_penalty)
    folder_of_out = os.path.dirname(out) or "."
    check(os.path.isdir(folder_of_out), f"cannot write {out}: there is no folder {folder_of_out}")
    check(not os.path.isdir(out), f"cannot write {out}: it is a folder")
    if os.path.exists(prefix):
        print(f"note: {prefix} is a file; to continue its lines, say FILE:{prefix}", file=sys.stderr)
    prefixes = read_lines(prefix[5:]) if prefix.startswith("FILE:") else [prefix]
    prefixes = [p.encode("utf-8", "replace").decode().rstrip() for p in prefixes]
    folder = out_dir or newest_model()
    model = DGLM(folder, device, compile)
    print(f"model {folder}, guide {guide}, seed {seed}", file=sys.stderr)
    options = {"steps": steps, "sampler": sampler, "cfg_scale": cfg_scale, "sigma2": sigma2, "top_p": top_p}
    options |= {"temperature": temperature, "repetition_penalty": repetition_penalty}
    options["progress"] = lambda levels: tqdm(levels, desc="diffuse", leave=False)
    texts = model.generate(prefixes, guide, num_samples, max_new_tokens, seed, batch_size, **options)
    rows = [p for p in prefixes for _ in range(num_samples)]
    written, proposals = [], []
    for before, (text, proposal) in zip(rows, texts):
        print(" ".join((before + text).split()), flush=True)
        written.append(text)
        proposals.append(proposal)
    if out:
        x = model.encode(written)  # read back, to see what became of the proposal
        similarity = F.cosine_similarity(x, torch.stack(proposals)).tolist()
        says = {probe.name: (probe.classes, probe.log_prob(x).exp().tolist()) for probe in model.probes}
        lines = []
        for i, (before, text) in enumerate(zip(rows, written)):
            record = {"prefix": before, "continuation": text, "guide": guide, "seed": seed}
            record["similarity"] = similarity[i]  # of the text to its proposal
            record["probes"] = {name: dict(zip(classes, p[i])) for name, (classes, p) in says.items()}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        write_file(out, "".join(lines))


if __name__ == "__main__":
    run(main, globals())
