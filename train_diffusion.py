"""Stage 2: train the diffusion that proposes what the continuation means.

A transformer predicts v = alpha eps - sigma x from z_t = alpha x + sigma eps, where x is the embedding of the
continuation, given that of the prefix. The squared error is weighted over noise levels, which are drawn where
the loss is large. A null vector replaces a tenth of the prefixes, for classifier-free guidance. The sampler
uses an exponential moving average (EMA) of the weights.

    python train_diffusion.py config/toy.py
    python train_diffusion.py config/reviews.py --dataset reviews.jsonl.gz
    python train_diffusion.py                                              # the paper: c4
    torchrun --standalone --nproc_per_node=8 train_diffusion.py            # the same on 8 GPUs

The same command again continues an interrupted run from its last validation. No stage 1 is needed.
"""

import copy
import math
import os
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import (
    MAX_LOG_SNR,
    Covariance,
    DiffusionTransformer,
    NoiseBins,
    Sampling,
    diffuse,
    load_decoder,
    load_diffusion,
    loss_weight,
    sample,
    velocity,
)
from plumbing.config import check, check_positive, run
from plumbing.data import Data
from plumbing.devices import autocast, generator_at, join_processes, pick_device
from plumbing.files import is_shipped, load_checkpoint, lock, report_resuming, save_weights, write_file
from plumbing.optim import configure_optimizers, schedule

dataset = "c4"  # what prepare.py prepared, by its name or path
out_dir = ""  # folder for the model; default out/DATASET
init_from = ""  # a trained model's folder, to start from its diffusion; default from scratch
width = 768  # width of the transformer, a multiple of 64
layers = 12  # blocks
diffusion_tokens = 64  # tokens that an embedding is cut into: a divisor of 4 times its width
batch_size = 256  # pairs in a forward pass, over all processes
gradient_accumulation = 1  # forward passes in a step
max_iters = 250_000  # optimizer steps
learning_rate = 1e-3  # at its peak
warmup_iters = 1000  # steps of linear warm-up; then a cosine to 0
decay_per_step = 1e-4  # weight decay: a step at the peak rate multiplies the matrices by 1 - this
beta1 = 0.9  # AdamW
beta2 = 0.999  # AdamW
muon = 0.0  # above 0: Muon, at this rate, for the matrices of linear layers; halves the steps from scratch
grad_clip = 1.0  # largest norm of a gradient
ema_decay = 0.9999  # decay of the average of the weights, after a warm-up
null_probability = 0.1  # probability of hiding the prefix
eval_interval = 5000  # steps between validations, each with a checkpoint
eval_rows = 2048  # validation pairs; proposals are sampled for an eighth of them
device = "auto"  # auto, cpu, cuda, cuda:1, mps
compile = False  # torch.compile
resume = True  # continue the checkpoint in out_dir, if there is one
seed = 1337  # fixes everything

INPUTS = ("cont_emb", "prefix_emb", "split")
VAL_LOG_SNR = {"low": 4.0, "middle": 0.0, "noise": -15.0}  # validation errors of v by log_snr


def main(settings):
    global device, out_dir
    device, data = pick_device(device), Data(dataset)
    out_dir = out_dir or f"out/{data.meta['name']}"
    check_positive(settings, "batch_size", "gradient_accumulation", "max_iters", "eval_interval", "eval_rows")
    check_positive(settings, "learning_rate", "grad_clip")
    for key in ("null_probability", "ema_decay"):
        check(0 <= settings[key] <= 1, f"{key}={settings[key]}: must be from 0 to 1")
    rank, world_size = join_processes(device, batch_size)
    check(not is_shipped(out_dir), f"{out_dir} is a shipped model: give another --out_dir")
    os.makedirs(out_dir, exist_ok=True)
    if rank == 0:
        _locked = lock(f"{out_dir}/.diffusion.lock")  # until main ends

    # ---- the network, its average, its optimizers, and where an earlier run left them ----
    torch.manual_seed(seed)
    architecture = {"E": data.meta["E"], "d": width, "n": layers, "M": diffusion_tokens}
    if init_from:
        meta, _, model = load_diffusion(init_from, device)
        architecture, encoder = meta["architecture"], meta["data"]["encoder"]
        check(encoder == data.meta["encoder"], f"{init_from} has another encoder than {data.folder}")
    else:
        model = DiffusionTransformer(**architecture).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    bins = NoiseBins().to(device)
    optimizers = configure_optimizers(model, learning_rate, (beta1, beta2), decay_per_step, muon)
    made_with = {"data": data.meta, "architecture": architecture, "optimizer": "Muon" if muon else "AdamW"}
    path = f"{out_dir}/diffusion.pt"
    start, history = 0, []
    if resume and os.path.exists(path):
        checkpoint = load_checkpoint(path, made_with, device)
        start, history = checkpoint["step"], checkpoint["history"]
        report_resuming(path, checkpoint, settings)
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        bins.load_state_dict(checkpoint["bins"])
        for optimizer, saved in zip(optimizers, checkpoint["optimizers"]):
            # keeps the rates and the decay of this command
            optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})
    decoder = None  # if stage 1 is trained, validation shows proposals as text
    if os.path.exists(f"{out_dir}/decoder.safetensors"):
        meta, decoder = load_decoder(out_dir, device)
        check(meta["data"] == data.meta, f"{out_dir} has a decoder of other data: give another --out_dir")
    if compile:
        model.compile()
    net = DistributedDataParallel(model) if world_size > 1 else model
    n = data.size["train"]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights, {n:,} pairs, on {device}")
    (x,) = data.rows("train", np.arange(0, n, -(-n // 50_000)), ("cont_emb",), "cpu")
    covariance = Covariance(*torch.linalg.eigh(x.T.cov()))  # for guides at the estimate

    # ---- training ----
    def read_batch(number):
        return data.batch(number, batch_size, seed, slice(rank, None, world_size), INPUTS, device)

    batch = read_batch(start * gradient_accumulation)
    bar = tqdm(range(start, max_iters), "diffusion", max_iters, initial=start, disable=rank > 0)
    losses, skipped = [], 0  # since the last validation
    for step in bar:
        for optimizer, peak in zip(optimizers, (learning_rate, muon)):
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule(step, warmup_iters, max_iters)

        for number in range(step * gradient_accumulation, (step + 1) * gradient_accumulation):
            # x, x_pref: embeddings of the continuations and of the prefixes (B, E); some have no prefix
            x, x_pref, split = batch
            rng = generator_at(device, seed, 0, number, rank)
            no_prefix = (split == 0) | (torch.rand(len(x), generator=rng, device=device) < null_probability)
            log_snr, bin_value = bins.sample(len(x), rng)  # (B,) each
            eps = torch.randn(x.shape, generator=rng, device=device)
            z_t = diffuse(x, eps, log_snr)
            with autocast(device):
                v = net(z_t, x_pref, log_snr.sigmoid(), no_prefix)
            error = (v.float() - velocity(x, eps, log_snr)).square().mean(-1)  # (B,)
            weighted = loss_weight(log_snr) * error
            loss = (weighted / bin_value).mean()
            (loss / gradient_accumulation).backward()
            batch = read_batch(number + 1)  # while the GPU is busy
            losses.append((loss * bins.value.mean()).item())  # mean weighted error over evenly spread log_snr
            bins.update(log_snr, weighted.detach())

        if world_size > 1:  # every process draws from the mean of all bins
            torch.distributed.all_reduce(bins.value)
            bins.value /= world_size

        # take the step, unless the gradient overflowed
        if torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip).isfinite():
            for optimizer in optimizers:
                optimizer.step()
        else:
            skipped += 1
        model.zero_grad(set_to_none=True)
        update_ema(ema, model, step, ema_decay)

        if step % 10 == 0:
            rate = optimizers[0].param_groups[0]["lr"]
            bar.set_postfix_str(f"loss {np.mean(losses):.4f}, rate {rate:.1e}, skipped {skipped}")
        due = (step + 1) % eval_interval == 0 or step + 1 == max_iters
        if due and rank == 0:
            record = {"step": step + 1, "train": float(np.mean(losses)), "skipped": skipped}
            record |= evaluate(ema, decoder, data)
            bar.write("  ".join(f"{key} {value:.4g}" for key, value in record.items()))
            history.append(record)
            if record["loss"] == min(past["loss"] for past in history):
                meta = {"data": data.meta, "architecture": architecture}
                meta |= {"settings": settings, "history": history}
                save_weights(out_dir, "diffusion", ema.state_dict() | covariance._asdict(), meta)
            checkpoint = {
                "made_with": made_with,
                "settings": settings,
                "step": step + 1,
                "history": history,
                "model": model.state_dict(),
                "ema": ema.state_dict(),
                "bins": bins.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            write_file(path, partial(torch.save, checkpoint))
        if due:
            losses, skipped = [], 0
    if world_size > 1:
        torch.distributed.destroy_process_group()


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema <- decay ema + (1 - decay) model, where the decay warms up as 1 - (1 + step)^(-3/4)."""
    decay = min(decay, 1 - (1 + step) ** -0.75)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


@torch.no_grad()
def evaluate(ema, decoder, data):
    """Weighted loss, error of v at fixed levels, how close proposals come to the truth; prints two texts."""
    n = data.size["val"]
    rows = np.linspace(0, n - 1, min(eval_rows, n)).astype(int)
    totals = dict.fromkeys(("loss", *VAL_LOG_SNR), 0.0)
    for number, index in enumerate(np.array_split(rows, -(-len(rows) // batch_size))):
        x, x_pref, split = data.rows("val", index, INPUTS, device)
        eps = torch.randn(x.shape, generator=generator_at(device, seed, 1, number), device=device)
        for level in totals:
            even = ((torch.arange(len(x), device=device) + 0.5) / len(x) - 0.5) * 2 * MAX_LOG_SNR
            log_snr = even if level == "loss" else torch.full_like(even, VAL_LOG_SNR[level])
            with autocast(device):
                v = ema(diffuse(x, eps, log_snr), x_pref, log_snr.sigmoid(), split == 0)
            error = (v.float() - velocity(x, eps, log_snr)).square().mean(-1)
            factor = loss_weight(log_snr) if level == "loss" else 1.0
            totals[level] += (factor * error).mean().item() * len(index) / len(rows)
    check(math.isfinite(sum(totals.values())), "the loss is not finite: lower --learning_rate")

    index = rows[:: max(1, len(rows) // max(2, len(rows) // 8))]
    rng = generator_at(device, seed, 2)
    x, x_pref, split, tokens = data.rows("val", index, (*INPUTS, "tokens"), device)
    proposed = sample(ema, x_pref, split == 0, Sampling(steps=20, cfg_scale=1), rng=rng)
    shown = (proposed, x, x.roll(len(x) // 2, 0))
    proposals, truths, others = (y.cpu() * data.std + data.mean for y in shown)
    true, other = (F.cosine_similarity(proposals, y).mean().item() for y in (truths, others))
    if decoder is not None:
        prompts = [row[:n].tolist() for row, n in zip(tokens[:2], split[:2])]
        room = data.meta["block_size"] - max(map(len, prompts))
        written = decoder.write(prompts, proposed[:2], min(32, room), Sampling(), rng)
        for prompt, new in zip(prompts, written):
            print(f"\n  prefix  {data.tokenizer.decode(prompt)!r}\n  written {data.tokenizer.decode(new)!r}")
    return {**totals, "cosine": true, "cosine_shuffled": other}


if __name__ == "__main__":
    run(main, globals())
