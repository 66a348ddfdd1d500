"""Stage 1: train the prompt generator and the decoder.

The true continuation's embedding x is noised to z_t = alpha x + sigma eps, at t ~ U(0, 1) of a cosine
schedule shifted towards low noise; the prompt generator turns (z_t, alpha^2) into 8 soft tokens between
prefix and continuation; the loss is the cross-entropy of all real tokens. So the decoder learns to obey a
proposal as far as it can be trusted.

    python train_decoder.py config/toy.py
    python train_decoder.py config/reviews.py --dataset reviews.jsonl.gz
    python train_decoder.py                                              # the paper: gpt2-large on c4

The same command again continues an interrupted run.
"""

import math
from dataclasses import asdict

import numpy as np
import torch

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
    summed,
    train,
    write_ranks,
)
from model import GPT, Decoder, GPTConfig, PromptGenerator, cosine_log_snr, diffuse, make_tokenizer, write

dataset = "c4"  # what prepare.py prepared, by its name or path
out_dir = ""  # where the model goes; default out/DATASET
init_from = "gpt2-large"  # gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder of that format, or scratch
n_layer = 6  # decoder from scratch: blocks
n_head = 6  # decoder from scratch: attention heads
n_embd = 384  # decoder from scratch: width
generator_width = 768  # prompt generator: width, a multiple of 64
generator_layers = 6  # prompt generator: blocks
soft_tokens = 8  # prompt generator: tokens that it writes
noise_scale = 3.0  # the noise schedule's log-SNR is raised by 2 ln of this
batch_size = 64  # windows in a forward pass
gradient_accumulation = 1  # forward passes in a step
max_iters = 250_000  # optimizer steps
learning_rate = 5e-6  # at its peak
warmup_iters = 5000  # steps of linear warm-up; then a cosine to 0
weight_decay = 1e-7  # shrinkage of the matrices a step at the peak rate, whatever that is
beta1 = 0.9  # AdamW
beta2 = 0.99  # AdamW
muon = 0.0  # above 0: Muon, at this rate, for the linear layers' matrices; halves the steps from scratch
grad_clip = 1.0  # largest norm of the gradient
eval_interval = 5000  # steps between validations, each with a checkpoint
eval_rows = 2048  # validation windows
device = "auto"  # auto, cpu, cuda, cuda:1, mps
compile = False  # torch.compile
resume = True  # continue the checkpoint in out_dir, if there is one
seed = 1337  # fixes everything

READ = ("tokens", "length", "split", "cont_emb")
NOISE_LEVELS = {"low": 0.05, "middle": 0.5, "noise": 1.0}  # sigma^2 of the validation


def main(settings):
    check(0 < noise_scale < math.inf, f"noise_scale={noise_scale}: must be above 0")
    place = pick_device(device)
    data = Data(dataset)
    folder = out_dir or f"out/{data_name(dataset)}"
    torch.manual_seed(seed)
    if init_from == "scratch":
        sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
        positions = data.meta["block_size"] + soft_tokens
        gpt = GPT(GPTConfig(vocab_size=data.meta["vocab_size"], n_positions=positions, **sizes))
    else:
        gpt = GPT.from_pretrained(init_from)
        vocab, positions = gpt.config.vocab_size, gpt.config.n_positions
        here = data.meta["vocab_size"]
        check(
            vocab == here,
            f"{data.folder} has a vocabulary of {here}, {init_from} of {vocab}: prepare it anew",
        )
        longest = data.meta["block_size"] + soft_tokens
        check(longest <= positions, f"{init_from} has only {positions} positions, {longest} are needed")
    E = data.meta["E"]
    generator = dict(E=E, n_embd=gpt.config.n_embd, d=generator_width, n=generator_layers, K=soft_tokens)
    network = {"gpt": asdict(gpt.config), "generator": generator}
    decoder = Decoder(gpt, PromptGenerator(**generator)).to(place)
    tokenizer = make_tokenizer(data.ranks())
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (decoder.gpt, decoder.generator)]
    print(f"decoder {counts[0]:.1f} M weights, prompt generator {counts[1]:.1f} M, on {place}")
    print(f"{data.size('train'):,} windows of up to {data.meta['block_size']} tokens from {data.folder}")

    def loss(net, rows, rng):
        tokens, length, split, x = rows
        n = len(x) * PROCESSES  # all processes draw alike, and each keeps its share
        log_snr = cosine_log_snr(share(torch.rand(n, generator=rng, device=place)), noise_scale)
        z = diffuse(x, share(torch.randn((n, E), generator=rng, device=place)), log_snr)
        value = net(tokens, length, split, z, log_snr.sigmoid())
        if PROCESSES > 1:  # a mean over tokens, of which the processes do not have equally many
            count = (length - (split > 0).long()).sum()
            value = value * count * PROCESSES / summed(count.clone())
        return value, value

    @torch.no_grad()
    def evaluate():
        """Losses of the continuations, told their own proposals and those of other rows; prints two texts."""
        rows = np.arange(min(eval_rows, data.size("val")))
        totals = dict.fromkeys((*NOISE_LEVELS, "shuffled"), 0.0)
        for batch, index in enumerate(np.array_split(rows, -(-len(rows) // batch_size))):
            tokens, length, split, x = data.rows("val", index, READ, place)
            other = x.roll(len(x) // 2, 0)  # far enough to be of another document
            eps = torch.randn(x.shape, generator=generator_at(place, seed, 1, batch), device=place)
            for level in totals:
                sigma2 = NOISE_LEVELS.get(level, NOISE_LEVELS["low"])
                alpha2 = torch.full((len(x),), 1 - sigma2, device=place)
                z = (1 - sigma2) ** 0.5 * (other if level == "shuffled" else x) + sigma2**0.5 * eps
                with autocast(place):
                    value = decoder(tokens, length, split, z, alpha2, continuation_only=True)
                totals[level] += value.item() * len(index) / len(rows)
        check(math.isfinite(sum(totals.values())), "the loss is not finite")
        index = rows[:2]
        tokens, length, split, x = data.rows("val", index, READ, place)
        prompts = [row[:n].tolist() for row, n in zip(tokens, split)]
        room = positions - soft_tokens - max(map(len, prompts))
        options = {"generator": generator_at(place, seed, 2), "top_p": 0.9}
        texts = write(decoder, tokenizer, prompts, x, min(32, room), **options)
        for row, end, n, text in zip(tokens, length, split, texts):
            print(f"\n  prefix  {tokenizer.decode(row[:n].tolist())!r}")
            print(f"  true    {tokenizer.decode(row[n:end].tolist())!r}\n  written {text!r}")
        mean = sum(totals[level] for level in NOISE_LEVELS) / len(NOISE_LEVELS)
        return {"loss": mean, **totals, "listens": totals["shuffled"] - totals["low"]}

    def weights():
        write_ranks(f"{folder}/tokenizer.tiktoken", data.ranks())
        return decoder.state_dict()

    with alone(f"{folder}/decoder"):
        train("decoder", folder, settings, data, READ, decoder, network, {}, weights, loss, evaluate)


if __name__ == "__main__":
    run(main, globals())
