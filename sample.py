"""Stage 4: write, steered or not.

    python sample.py --prefix "The food was" --guide negative
    python sample.py --prefix "The food was" --guide negative:30,sports:10 --num_samples 5
    python sample.py --prefix FILE:prefixes.txt --guide sentiment=positive --out texts.jsonl
    python sample.py                                                no prefix: about anything

The texts go to standard output, a line each; notes to standard error.
"""

import json
import sys

import torch.nn.functional as F
from tqdm import tqdm

from configurator import InputError, check, run, write_file
from model import DGLM, newest_model

prefix = ""  # text to continue, or FILE:path with one a line
guide = "none"  # none, or classes of the probes with weights: negative, negative:30,sports:10
num_samples = 1  # texts for each prefix
max_new_tokens = 32  # of each text
out_dir = ""  # the model's folder; default the newest in out/, else pretrained/reviews
steps = 20  # of the diffusion; the paper: 250
sampler = "dpm++"  # dpm++, ddim or ddpm; the paper: ddpm
cfg_scale = 1.0  # classifier-free guidance: above 1 follows the prefix more closely
sigma2 = 0.05  # noise on the proposal: 0 obeys it, 1 ignores it
top_p = 0.9  # the likeliest tokens that make up this probability
temperature = 1.0  # 0 takes the likeliest token
repetition_penalty = 1.2  # above 1 avoids tokens already there
batch_size = 64  # texts at a time
out = ""  # a JSON-lines file for the texts and what the probes say of them
device = "auto"  # auto, cpu, cuda, cuda:1, mps
seed = 1337  # fixes everything


def read_prefixes(text):
    """--prefix -> a list of prefixes."""
    if not text.startswith("FILE:"):
        return [text]
    try:
        with open(text[5:], encoding="utf-8-sig") as f:
            lines = [line.strip() for line in f if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read the prefixes: {e}") from None
    check(lines, f"{text[5:]} holds no prefix")
    return lines


def main(settings):
    check(
        min(num_samples, max_new_tokens, batch_size) >= 1,
        "num_samples, max_new_tokens and batch_size must be at least 1",
    )
    check(
        0 < top_p <= 1 and temperature >= 0 and repetition_penalty > 0,
        "top_p must be in (0, 1], temperature 0 or more, repetition_penalty above 0",
    )
    prefixes = read_prefixes(prefix)
    folder = out_dir or newest_model()
    model = DGLM(folder, device)
    print(f"model {folder}, guide {guide}, seed {seed}", file=sys.stderr)
    options = {"steps": steps, "sampler": sampler, "cfg_scale": cfg_scale, "sigma2": sigma2, "top_p": top_p}
    options |= {"temperature": temperature, "repetition_penalty": repetition_penalty}
    options["progress"] = lambda levels: tqdm(levels, desc="diffuse", leave=False)
    texts = model.generate(prefixes, guide, num_samples, max_new_tokens, seed, batch_size, **options)
    rows = [p.rstrip() for p in prefixes for _ in range(num_samples)]
    records = []
    for before, (text, proposal) in zip(rows, texts):
        print(before + text, flush=True)
        if out:
            records.append(
                {"prefix": before, "continuation": text, "guide": guide, "seed": seed, "proposal": proposal}
            )
    if out:
        read_back = model.encode([r["continuation"] for r in records])
        for record, x in zip(records, read_back):
            record["similarity"] = round(F.cosine_similarity(x, record.pop("proposal"), dim=0).item(), 4)
            for probe in model.probes:
                p = probe.log_prob(x).exp().tolist()
                record[probe.name] = {c: round(v, 4) for c, v in zip(probe.classes, p)}
        write_file(out, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


if __name__ == "__main__":
    run(main, globals())
