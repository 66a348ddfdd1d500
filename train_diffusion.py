"""Stage 2: train the diffusion that proposes what the continuation means.

A transformer predicts v = alpha eps - sigma x from z_t = alpha x + sigma eps, where x is the embedding of the
continuation. It also reads the embedding of the prefix, except in a tenth of the cases, where a learned null
vector stands in for it: this is what classifier-free guidance needs. The squared error is weighted over noise
levels, which are drawn more often where the loss is large. The sampler uses an exponential moving average
(EMA) of the weights.

    python train_diffusion.py config/toy.py
    python train_diffusion.py config/reviews.py --dataset reviews.jsonl.gz
    python train_diffusion.py                                              # the paper: c4
    torchrun --standalone --nproc_per_node=8 train_diffusion.py            # the same on 8 GPUs

The same command continues an interrupted run from its last validation. Stage 1 is not needed, but if it is
trained, validation shows proposals as text.
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
from plumbing.config import run
from plumbing.data import Data
from plumbing.devices import autocast, join_processes, pick_device, rng_at
from plumbing.errors import check
from plumbing.files import is_shipped, load_checkpoint, lock, report_resuming, save_weights, write_file
from plumbing.optim import configure_optimizers, schedule

dataset = "c4"  # what prepare.py prepared, by its name or path
out_dir = ""  # folder for the model; default out/DATASET
init_from = ""  # a trained model's folder, to start from its diffusion; default from scratch
width = 768  # width of the transformer [at least 64, a multiple of 64]
layers = 12  # blocks [at least 1]
diffusion_tokens = 64  # tokens that an embedding is cut into: a divisor of 4 times its width [at least 1]
batch_size = 256  # pairs in a forward pass, over all processes [at least 1]
gradient_accumulation = 1  # forward passes in a step [at least 1]
max_iters = 250_000  # optimizer steps [at least 1]
learning_rate = 1e-3  # at its peak [above 0]
warmup_iters = 1000  # steps of linear warm-up; then a cosine to 0 [at least 0]
decay_per_step = 1e-4  # weight decay: share of a matrix lost in a step at the peak rate [at least 0, below 1]
beta1 = 0.9  # AdamW [at least 0, below 1]
beta2 = 0.999  # AdamW [at least 0, below 1]
muon = 0.0  # Muon at this rate for linear layers, which halves the steps from scratch; 0: AdamW [at least 0]
grad_clip = 1.0  # largest norm of a gradient [above 0]
ema_decay = 0.9999  # decay of the average of the weights, after a warm-up [at least 0, at most 1]
null_probability = 0.1  # probability of hiding the prefix [at least 0, at most 1]
eval_interval = 5000  # steps between validations, each with a checkpoint [at least 1]
eval_rows = 2048  # validation pairs; proposals are sampled for an eighth of them [at least 1]
device = "auto"  # auto, cpu, cuda, cuda:1, mps
compile = False  # torch.compile
resume = True  # continue the checkpoint in out_dir, if there is one
seed = 1337  # fixes everything

INPUTS = ("cont_emb", "prefix_emb", "split")
VAL_LOG_SNR = {"low": 4.0, "middle": 0.0, "noise": -15.0}  # validation errors of v by log_snr


def main(settings):
    global device, out_dir
    device = pick_device(device)
    data = Data(dataset)
    out_dir = out_dir or f"out/{data.info['name']}"
    rank, world_size = join_processes(device, batch_size)
    check(not is_shipped(out_dir), f"{out_dir} is a shipped model: give another --out_dir")
    os.makedirs(out_dir, exist_ok=True)
    if rank == 0:
        _locked = lock(f"{out_dir}/.diffusion.lock")  # until main ends

    # ---- the network, its average, its optimizers, and where an earlier run left them ----
    torch.manual_seed(seed)
    if init_from:
        meta, _, model = load_diffusion(init_from, device)
        architecture = meta["architecture"]
        same = meta["data"]["encoder"] == data.info["encoder"]
        check(same, f"{init_from} has another encoder than {data.folder}")
    else:
        architecture = {"E": data.info["E"], "d": width, "n": layers, "M": diffusion_tokens}
        model = DiffusionTransformer(**architecture).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    bins = NoiseBins().to(device)
    optimizers = configure_optimizers(model, learning_rate, (beta1, beta2), decay_per_step, muon)
    made_with = {"data": data.info, "architecture": architecture, "optimizer": "Muon" if muon else "AdamW"}
    path = f"{out_dir}/diffusion.pt"
    start = 0
    history = []
    num_rows = data.size["train"]
    some = np.arange(0, num_rows, math.ceil(num_rows / 50_000))
    (x,) = data.rows("train", some, ("cont_emb",), "cpu")
    covariance = Covariance(*torch.linalg.eigh(x.T.cov()))  # for guides at the estimate

    def save_model():
        meta = {"data": data.info, "architecture": architecture, "settings": settings, "history": history}
        save_weights(out_dir, "diffusion", ema.state_dict() | covariance._asdict(), meta)

    if resume and os.path.exists(path):
        checkpoint = load_checkpoint(path, made_with, device)
        start = checkpoint["step"]
        history = checkpoint["history"]
        report_resuming(path, checkpoint, settings)
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        bins.load_state_dict(checkpoint["bins"])
        for optimizer, saved in zip(optimizers, checkpoint["optimizers"]):
            # keeps the rates and the decay of this command
            optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})
        if rank == 0 and not os.path.exists(f"{out_dir}/diffusion.safetensors"):
            print(f"{out_dir}/diffusion.safetensors is missing: writing it again, as it was at step {start}")
            save_model()
    decoder = None  # if stage 1 is trained, validation shows proposals as text
    if os.path.exists(f"{out_dir}/decoder.safetensors"):
        meta, decoder = load_decoder(out_dir, device)
        check(meta["data"] == data.info, f"{out_dir} has a decoder of other data: give another --out_dir")
    if compile:
        model.compile()
    net = DistributedDataParallel(model) if world_size > 1 else model
    num_weights = sum(p.numel() for p in model.parameters())
    print(f"{num_weights / 1e6:.1f} M weights, {num_rows:,} pairs, on {device}")

    # ---- training ----
    def read_batch(number):
        return data.batch(number, batch_size, seed, slice(rank, None, world_size), INPUTS, device)

    batch = read_batch(start * gradient_accumulation)
    bar = tqdm(range(start, max_iters), "diffusion", max_iters, initial=start, disable=rank > 0)
    losses = []  # since the last validation
    skipped = 0
    for step in bar:
        for optimizer, peak in zip(optimizers, (learning_rate, muon)):
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule(step, warmup_iters, max_iters)

        for number in range(step * gradient_accumulation, (step + 1) * gradient_accumulation):
            # x, x_pref: embeddings of the continuations and of the prefixes (B, E); some have no prefix
            x, x_pref, split = batch
            rng = rng_at(device, seed, 0, number, rank)
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
                save_model()
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
            losses = []
            skipped = 0
    if world_size > 1:
        torch.distributed.destroy_process_group()


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema <- decay ema + (1 - decay) model, where the decay warms up as 1 - (1 + step)^(-3/4)."""
    decay = min(decay, 1 - (1 + step) ** -0.75)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


@torch.no_grad()
def evaluate(ema, decoder, data):
    """-> the validation's results: the weighted loss; the error of v at fixed noise levels; the cosine of
    proposals with their true continuations, and with those of other rows. Prints two texts.
    """
    num_rows = data.size["val"]
    rows = np.linspace(0, num_rows - 1, min(eval_rows, num_rows)).astype(int)
    totals = dict.fromkeys(("loss", *VAL_LOG_SNR), 0.0)
    num_batches = math.ceil(len(rows) / batch_size)
    for number, index in enumerate(np.array_split(rows, num_batches)):
        x, x_pref, split = data.rows("val", index, INPUTS, device)
        eps = torch.randn(x.shape, generator=rng_at(device, seed, 1, number), device=device)
        for level in totals:
            if level == "loss":  # evenly spread
                log_snr = ((torch.arange(len(x), device=device) + 0.5) / len(x) - 0.5) * 2 * MAX_LOG_SNR
                weight = loss_weight(log_snr)
            else:
                log_snr = torch.full((len(x),), VAL_LOG_SNR[level], device=device)
                weight = 1.0
            with autocast(device):
                v = ema(diffuse(x, eps, log_snr), x_pref, log_snr.sigmoid(), split == 0)
            error = (v.float() - velocity(x, eps, log_snr)).square().mean(-1)
            totals[level] += (weight * error).mean().item() * len(index) / len(rows)
    check(math.isfinite(sum(totals.values())), "the loss is not finite: lower --learning_rate")

    num_proposals = max(2, len(rows) // 8)
    index = rows[:: max(1, len(rows) // num_proposals)]
    rng = rng_at(device, seed, 2)
    x, x_pref, split, tokens = data.rows("val", index, (*INPUTS, "tokens"), device)
    proposed = sample(ema, x_pref, split == 0, Sampling(steps=20, cfg_scale=1), rng=rng)
    others = x.roll(len(x) // 2, 0)
    e_proposed, e_true, e_other = (each.cpu() * data.std + data.mean for each in (proposed, x, others))
    cosine = F.cosine_similarity(e_proposed, e_true).mean().item()
    cosine_shuffled = F.cosine_similarity(e_proposed, e_other).mean().item()
    if decoder is not None:
        prompts = [row[:at].tolist() for row, at in zip(tokens[:2], split[:2])]
        room = data.info["block_size"] - max(map(len, prompts))
        written = decoder.write(prompts, proposed[:2], min(32, room), Sampling(), rng=rng)
        decode = data.tokenizer.decode
        for prompt, new in zip(prompts, written):
            print(f"\n  prefix  {decode(prompt)!r}")
            print(f"  written {decode(new)!r}")
    return {**totals, "cosine": cosine, "cosine_shuffled": cosine_shuffled}


if __name__ == "__main__":
    run(main, globals())
