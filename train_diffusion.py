"""Stage 2: train the diffusion that proposes what the continuation means.

A transformer predicts v = alpha eps - sigma x from z_t = alpha x + sigma eps, where x is the continuation's
embedding, given the prefix's. Squared error, weighted over noise levels, which are drawn where the loss is
large. A tenth of the prefixes is replaced by a null vector, for classifier-free guidance. An exponential
average of the weights is what samples.

    python train_diffusion.py config/toy.py
    python train_diffusion.py config/reviews.py --dataset reviews.jsonl.gz
    python train_diffusion.py                                              # the paper: c4

The same command again continues an interrupted run. Stages 1 and 2 do not depend on each other.
"""

import copy
import math
import os

import numpy as np
import torch
import torch.nn.functional as F

from configurator import (
    PROCESSES,
    Data,
    alone,
    autocast,
    check,
    data_name,
    generator_at,
    pick_device,
    run,
    share,
    train,
)
from model import (
    AdaptiveNoise,
    DiffusionTransformer,
    diffuse,
    diffusion_loss,
    load_decoder,
    loss_weight,
    make_tokenizer,
    sample,
    update_ema,
    velocity,
    write,
)

dataset = "c4"  # what prepare.py prepared, by its name or path
out_dir = ""  # where the model goes; default out/DATASET
width = 768  # of the transformer, a multiple of 64
layers = 12  # blocks, an even number
diffusion_tokens = 64  # tokens that an embedding is cut into
batch_size = 256  # pairs in a forward pass
gradient_accumulation = 1  # forward passes in a step
max_iters = 250_000  # optimizer steps
learning_rate = 1e-3  # at its peak
warmup_iters = 1000  # steps of linear warm-up; then a cosine to 0
weight_decay = 1e-4  # shrinkage of the matrices a step at the peak rate, whatever that is
beta1 = 0.9  # AdamW
beta2 = 0.999  # AdamW
muon = 0.0  # above 0: Muon, at this rate, for the linear layers' matrices; halves the steps from scratch
grad_clip = 1.0  # largest norm of the gradient
ema_decay = 0.9999  # of the average of the weights, after a warm-up
null_probability = 0.1  # of hiding the prefix
eval_interval = 5000  # steps between validations, each with a checkpoint
eval_rows = 2048  # validation pairs; an eighth of them is sampled
eval_steps = 20  # DPM-Solver++ steps of those samples
device = "auto"  # auto, cpu, cuda, cuda:1, mps
compile = False  # torch.compile
resume = True  # continue the checkpoint in out_dir, if there is one
seed = 1337  # fixes everything

READ = ("cont_emb", "prefix_emb", "split")
NOISE_LEVELS = {"low": 4.0, "middle": 0.0, "noise": -15.0}  # log-SNR of the validation


def main(settings):
    check(1 <= eval_steps <= 1000, f"eval_steps={eval_steps}: must be from 1 to 1000")
    for key in ("null_probability", "ema_decay"):
        check(0 <= settings[key] <= 1, f"{key}={settings[key]}: must be from 0 to 1")
    place = pick_device(device)
    data = Data(dataset)
    folder = out_dir or f"out/{data_name(dataset)}"
    torch.manual_seed(seed)
    network = {"E": data.meta["E"], "d": width, "n": layers, "M": diffusion_tokens}
    model = DiffusionTransformer(**network).to(place)
    ema = copy.deepcopy(model).requires_grad_(False)
    noise = AdaptiveNoise(place)
    print(f"diffusion {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights, on {place}")
    print(f"{data.size('train'):,} pairs of embeddings from {data.folder}")

    decoder = None  # stage 1, where it is there, puts the proposals into words
    if os.path.exists(f"{folder}/decoder.json"):
        meta, decoder = load_decoder(folder, place)
        same = meta["data"] == data.identity()
        check(same, f"{folder}/decoder.json was trained on other data than {data.folder}: change --out_dir")
    else:
        print(f"{folder} has no decoder yet: no samples in words on the way")
    tokenizer = make_tokenizer(data.ranks())

    def loss(net, rows, rng):
        x, x_pref, split = rows
        hidden = torch.rand(len(x) * PROCESSES, generator=rng, device=place) < null_probability
        return diffusion_loss(net, x, x_pref, (split == 0) | share(hidden), noise, rng)

    @torch.no_grad()
    def evaluate():
        """Of the averaged weights: weighted loss, error of v at fixed levels, how near the samples come."""
        rows = np.arange(min(eval_rows, data.size("val")))
        totals = dict.fromkeys(("loss", *NOISE_LEVELS), 0.0)
        for batch, index in enumerate(np.array_split(rows, -(-len(rows) // batch_size))):
            x, x_pref, split = data.rows("val", index, READ, place)
            eps = torch.randn(x.shape, generator=generator_at(place, seed, 1, batch), device=place)
            for level in totals:
                even = (torch.arange(len(x), device=place) + 0.5) / len(x) * 30 - 15
                log_snr = even if level == "loss" else torch.full_like(even, NOISE_LEVELS[level])
                with autocast(place):
                    v = ema(diffuse(x, eps, log_snr), x_pref, log_snr.sigmoid(), split == 0)
                error = (v.float() - velocity(x, eps, log_snr)).square().mean(-1)
                weight = loss_weight(log_snr) if level == "loss" else 1.0
                totals[level] += (weight * error).mean().item() * len(index) / len(rows)

        check(math.isfinite(totals["loss"]), "the loss is not finite")
        index = rows[: max(2, len(rows) // 8)]
        x, x_pref, split, tokens = data.rows("val", index, (*READ, "tokens"), place)
        options = {"steps": eval_steps, "sampler": "dpm++", "generator": generator_at(place, seed, 2)}
        proposed = sample(ema, x_pref, split == 0, **options)
        std, mean = data.std.to(place), data.mean.to(place)
        proposals, *targets = (y * std + mean for y in (proposed, x, x.roll(len(x) // 2, 0)))
        true, other = (F.cosine_similarity(proposals, target).mean().item() for target in targets)
        if decoder is not None:
            prompts = [row[:n].tolist() for row, n in zip(tokens[:2], split[:2])]
            room = decoder.gpt.config.n_positions - decoder.generator.K - max(map(len, prompts))
            options = {"generator": generator_at(place, seed, 2), "top_p": 0.9}
            texts = write(decoder, tokenizer, prompts, proposed[:2], min(32, room), **options)
            for prompt, text in zip(prompts, texts):
                print(f"\n  prefix  {tokenizer.decode(prompt)!r}\n  written {text!r}")
        return {**totals, "cosine": true, "cosine_shuffled": other}

    def average(step):
        update_ema(ema, model, step, ema_decay)

    live = {f"ema.{k}": v for k, v in ema.state_dict().items()} | {"noise": noise.value}
    weights = ema.state_dict
    with alone(f"{folder}/diffusion"):
        train(
            "diffusion", folder, settings, data, READ, model, network, live, weights, loss, evaluate, average
        )


if __name__ == "__main__":
    run(main, globals())
