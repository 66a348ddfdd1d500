"""Stage 1: train the prompt generator and the decoder.

The embedding x of the true continuation is noised to z_t = alpha x + sigma eps, at t ~ U(0, 1) of a cosine
schedule that is shifted towards low noise. The prompt generator turns (z_t, alpha^2) into 8 soft tokens. They
go between prefix and continuation, and the loss is the cross-entropy of all real tokens. So the decoder
learns to follow a proposal as far as it can be trusted.

With --freeze only the prompt generator learns. Its soft tokens go in front, and only the continuation carries
loss.

    python train_decoder.py config/toy.py
    python train_decoder.py config/reviews.py --dataset reviews.jsonl.gz
    python train_decoder.py                                              # the paper: gpt2-large on c4
    torchrun --standalone --nproc_per_node=8 train_decoder.py            # the same on 8 GPUs

The same command continues an interrupted run from its last validation.
"""

import math
import os
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import GPT, Decoder, GPTConfig, PromptGenerator, Sampling, cosine_log_snr, diffuse, load_decoder
from plumbing.config import run
from plumbing.convert import source_sha256
from plumbing.data import Data
from plumbing.devices import autocast, join_processes, pick_device, precision, rng_at
from plumbing.errors import check
from plumbing.files import is_shipped, load_checkpoint, lock, report_resuming, save_weights, write_file
from plumbing.optim import configure_optimizers, schedule

dataset = "c4"  # what prepare.py prepared, by its name or path
out_dir = ""  # folder for the model; default out/DATASET
init_from = "gpt2-large"  # a GPT-2 or Llama: hub name, folder, .gguf, smollm2; a model's folder; or scratch
freeze = False  # train only the prompt generator, for a pretrained decoder
n_layer = 6  # decoder from scratch: blocks [at least 1]
n_head = 6  # decoder from scratch: attention heads [at least 1]
n_embd = 384  # decoder from scratch: width, a multiple of n_head [at least 1]
generator_width = 768  # prompt generator: width [at least 64, a multiple of 64]
generator_layers = 6  # prompt generator: blocks [at least 1]
soft_tokens = 8  # prompt generator: its outputs, a divisor of 4 times an embedding's width [at least 1]
noise_scale = 3.0  # the noise schedule's log-SNR is raised by 2 ln of this [above 0]
batch_size = 64  # windows in a forward pass, over all processes [at least 1]
gradient_accumulation = 1  # forward passes in a step [at least 1]
max_iters = 250_000  # optimizer steps [at least 1]
learning_rate = 5e-6  # at its peak [above 0]
warmup_iters = 5000  # steps of linear warm-up; then a cosine to 0 [at least 0]
decay_per_step = 1e-7  # weight decay: share of a matrix lost in a step at the peak rate [at least 0, below 1]
beta1 = 0.9  # AdamW [at least 0, below 1]
beta2 = 0.99  # AdamW [at least 0, below 1]
muon = 0.0  # Muon at this rate for linear layers, which halves the steps from scratch; 0: AdamW [at least 0]
grad_clip = 1.0  # largest norm of a gradient [above 0]
eval_interval = 5000  # steps between validations, each with a checkpoint [at least 1]
eval_rows = 2048  # validation windows [at least 1]
device = "auto"  # auto, cpu, cuda, cuda:1, mps
compile = False  # torch.compile
resume = True  # continue the checkpoint in out_dir, if there is one
seed = 1337  # fixes everything

INPUTS = ("tokens", "length", "split", "cont_emb")
VAL_SIGMA2 = {"low": 0.05, "middle": 0.5, "noise": 1.0}  # validation losses by sigma^2


def main(settings):
    global device, out_dir
    device = pick_device(device)
    data = Data(dataset)
    out_dir = out_dir or f"out/{data.info['name']}"
    rank, world_size = join_processes(device, batch_size)
    check(not is_shipped(out_dir), f"{out_dir} is a shipped model: give another --out_dir")
    os.makedirs(out_dir, exist_ok=True)
    if rank == 0:
        _locked = lock(f"{out_dir}/.decoder.lock")  # until main ends

    # ---- the networks, their optimizers, and where an earlier run left them ----
    torch.manual_seed(seed)
    decoder, architecture = make_decoder(data)
    trained = decoder.generator if freeze else decoder
    optimizers = configure_optimizers(trained, learning_rate, (beta1, beta2), decay_per_step, muon)
    made_with = {"data": data.info, "architecture": architecture, "optimizer": "Muon" if muon else "AdamW"}
    path = f"{out_dir}/decoder.pt"
    start = 0
    history = []

    def save_model():
        with open(f"{data.folder}/tokenizer.tiktoken", "rb") as f:
            write_file(f"{out_dir}/tokenizer.tiktoken", f.read())
        meta = {"data": data.info, "architecture": architecture, "settings": settings, "history": history}
        save_weights(out_dir, "decoder", trained.state_dict(), meta)

    if resume and os.path.exists(path):
        checkpoint = load_checkpoint(path, made_with, device)
        start = checkpoint["step"]
        history = checkpoint["history"]
        report_resuming(path, checkpoint, settings)
        trained.load_state_dict(checkpoint["model"])
        for optimizer, saved in zip(optimizers, checkpoint["optimizers"]):
            # keeps the rates and the decay of this command
            optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})
        if rank == 0 and not os.path.exists(f"{out_dir}/decoder.safetensors"):
            print(f"{out_dir}/decoder.safetensors is missing: writing it again, as it was at step {start}")
            save_model()
    if compile:
        decoder.compile()
    net = DistributedDataParallel(decoder) if world_size > 1 else decoder
    num_weights = sum(p.numel() for p in trained.parameters())
    print(f"{num_weights / 1e6:.1f} M weights to train, on {device}")
    print(f"{data.size['train']:,} windows of up to {data.info['block_size']} tokens from {data.folder}")

    # ---- training ----
    def read_batch(number):
        return data.batch(number, batch_size, seed, slice(rank, None, world_size), INPUTS, device)

    batch = read_batch(start * gradient_accumulation)
    bar = tqdm(range(start, max_iters), "decoder", max_iters, initial=start, disable=rank > 0)
    losses = []  # since the last validation
    skipped = 0
    for step in bar:
        for optimizer, peak in zip(optimizers, (learning_rate, muon)):
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule(step, warmup_iters, max_iters)

        for number in range(step * gradient_accumulation, (step + 1) * gradient_accumulation):
            # x: embeddings of the continuations (B, E), noised to a random level
            tokens, length, split, x = batch
            rng = rng_at(device, seed, 0, number, rank)
            t = torch.rand(len(x), generator=rng, device=device)
            log_snr = cosine_log_snr(t, noise_scale)
            eps = torch.randn(x.shape, generator=rng, device=device)
            z_t = diffuse(x, eps, log_snr)
            with autocast(device):
                loss = net(tokens, length, split, z_t, log_snr.sigmoid())  # cross-entropy, nats a token
            (loss / gradient_accumulation).backward()
            batch = read_batch(number + 1)  # while the GPU is busy
            losses.append(loss.item())

        # take the step, unless the gradient overflowed
        if torch.nn.utils.clip_grad_norm_(trained.parameters(), grad_clip).isfinite():
            for optimizer in optimizers:
                optimizer.step()
        else:
            skipped += 1
        trained.zero_grad(set_to_none=True)

        if step % 10 == 0:
            rate = optimizers[0].param_groups[0]["lr"]
            bar.set_postfix_str(f"loss {np.mean(losses):.4f}, rate {rate:.1e}, skipped {skipped}")
        due = (step + 1) % eval_interval == 0 or step + 1 == max_iters
        if due and rank == 0:
            record = {"step": step + 1, "train": float(np.mean(losses)), "skipped": skipped}
            record |= evaluate(decoder, data)
            bar.write("  ".join(f"{key} {value:.4g}" for key, value in record.items()))
            history.append(record)
            if record["loss"] == min(past["loss"] for past in history):
                save_model()
            checkpoint = {
                "made_with": made_with,
                "settings": settings,
                "step": step + 1,
                "history": history,
                "model": trained.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            write_file(path, partial(torch.save, checkpoint))
        if due:
            losses = []
            skipped = 0
    if world_size > 1:
        torch.distributed.destroy_process_group()


def make_decoder(data):
    """-> the Decoder to train, as `init_from` says, on the device, and what it takes to build it again."""
    info = data.info
    if os.path.exists(f"{init_from}/decoder.safetensors"):  # a model of this project
        meta, decoder = load_decoder(init_from, "cpu")
        architecture = meta["architecture"]
        for key in ("E", "encoder", "tokenizer"):
            check(meta["data"][key] == info[key], f"{init_from} has another {key} than {data.folder}")
    else:
        if init_from == "scratch":
            n_positions = info["block_size"] + soft_tokens
            gpt = GPT(GPTConfig(info["vocab_size"], n_positions, n_layer, n_head, n_embd))
        else:
            gpt = GPT.from_pretrained(init_from)
        sizes = {"n_embd": gpt.config.n_embd, "d": generator_width, "n": generator_layers, "K": soft_tokens}
        generator = {"E": info["E"], **sizes, "frozen": freeze}
        decoder = Decoder(gpt, PromptGenerator(**generator))
        architecture = {"gpt": asdict(gpt.config), "generator": generator}

    config = decoder.gpt.config
    room = info["block_size"] + decoder.generator.K
    fits = config.vocab_size == info["vocab_size"] and config.n_positions >= room
    check(fits, f"{init_from} does not fit the vocabulary or the windows of {data.folder}")
    decoder.requires_grad_(True).to(device)

    source = architecture.pop("frozen", {"name": init_from})["name"]
    if freeze:  # the GPT is not saved, only where it comes from and which one it is
        elsewhere = source != "scratch" and not os.path.exists(f"{source}/decoder.safetensors")
        check(elsewhere, f"--freeze is for a decoder that was trained elsewhere, and {source} was not")
        decoder.gpt.requires_grad_(False).to(precision(device))
        architecture["frozen"] = {"name": source, "sha256": source_sha256(source)}
    return decoder, architecture


@torch.no_grad()
def evaluate(decoder, data):
    """-> the losses of held-out continuations, and prints two texts.

    low, middle, noise: given the continuation's embedding at this noise level. shuffled: given that of
    another row. plain: those of a frozen decoder without soft tokens, which `noise` should come down to.
    """
    num_rows = data.size["val"]
    rows = np.linspace(0, num_rows - 1, min(eval_rows, num_rows)).astype(int)
    others = np.roll(rows, len(rows) // 2)  # from another document
    levels = [*VAL_SIGMA2, "shuffled"]
    if freeze:
        levels.append("plain")
    totals = dict.fromkeys(levels, 0.0)
    num_batches = math.ceil(len(rows) / batch_size)
    for number, places in enumerate(np.array_split(np.arange(len(rows)), num_batches)):
        tokens, length, split, x = data.rows("val", rows[places], INPUTS, device)
        (x_other,) = data.rows("val", others[places], ("cont_emb",), device)
        eps = torch.randn(x.shape, generator=rng_at(device, seed, 1, number), device=device)
        for level in levels:
            sigma2 = VAL_SIGMA2.get(level, VAL_SIGMA2["low"])
            log_snr = torch.full((len(x),), 1 - sigma2, device=device).logit()
            if level == "plain":
                z = None
            else:
                z = diffuse(x_other if level == "shuffled" else x, eps, log_snr)
            with autocast(device):
                loss = decoder(tokens, length, split, z, log_snr.sigmoid(), continuation_only=True)
            totals[level] += loss.item() * len(places) / len(rows)
    check(math.isfinite(sum(totals.values())), "the loss is not finite: lower --learning_rate")

    tokens, length, split, x = data.rows("val", rows[[0, -1]], INPUTS, device)
    prompts = [row[:at].tolist() for row, at in zip(tokens, split)]
    max_new_tokens = min(32, data.info["block_size"] // 2)
    written = decoder.write(prompts, x, max_new_tokens, Sampling(), rng=rng_at(device, seed, 2))
    decode = data.tokenizer.decode
    for row, end, at, new in zip(tokens.tolist(), length, split, written):
        print(f"\n  prefix  {decode(row[:at])!r}")
        print(f"  true    {decode(row[at:end])!r}")
        print(f"  written {decode(new)!r}")
    mean = sum(totals[level] for level in VAL_SIGMA2) / len(VAL_SIGMA2)
    return {"loss": mean, **totals, "listens": totals["shuffled"] - totals["low"]}


if __name__ == "__main__":
    run(main, globals())
