"""nanoDGLM: every network and all the mathematics of Diffusion Guided Language Modeling, in one file.

    prefix --encoder--> x_pref --diffusion (+ probe gradients)--> x_cont --prompt generator--> 8 soft tokens
                                                                                   |
    prefix tokens ------------------------------------------------------------> GPT decoder --> continuation

Read it from the top. `DGLM`, at the end, puts a trained folder together and writes with it.

Symbols, as in the papers: e is an embedding as the encoder gives it, of length 1; x is the same embedding,
standardised; z_t = alpha x + sigma eps is noisy, with alpha^2 + sigma^2 = 1 and log_snr = lambda =
log(alpha^2 / sigma^2). B is the batch, E the width of an embedding, d that of a network, K the number of soft
tokens, M of diffusion tokens.

[DGLM]  Lovelace et al. 2024, Diffusion Guided Language Modeling. arXiv 2408.04220
[VDM]   Kingma et al. 2021, Variational Diffusion Models. arXiv 2107.00630
[v]     Salimans & Ho 2022, Progressive Distillation. arXiv 2202.00512
[KG]    Kingma & Gao 2023, Understanding Diffusion Objectives as the ELBO. arXiv 2303.00848
[DPM++] Lu et al. 2022, DPM-Solver++. arXiv 2211.01095
[LGD]   Song et al. 2023, Loss-Guided Diffusion Models. ICML
"""

import glob
import math
import os
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing.autoregression import Reader, draw_tokens
from plumbing.convert import read_pretrained, source_sha256
from plumbing.devices import attend, autocast, normal, pick_device, precision, rng_at
from plumbing.errors import check, check_range, reported_as
from plumbing.files import load_weights, model_folder, write_file
from plumbing.text import GPT2_PATTERN, Encoder, Tokenizer, clean, read_ranks

# ---------- The diffusion mathematics: log_snr (B,), alpha and sigma (B, 1), to multiply (B, E) -------------

MAX_LOG_SNR = 15.0  # training covers log_snr in [-15, 15]


def cosine_log_snr(t, scale=1.0):
    """log_snr at t in [0, 1] for alpha^2 = cos^2(pi t / 2), clamped to +-20, then shifted by 2 ln(scale)."""
    return torch.cos(math.pi / 2 * t).square().logit().clamp(-20, 20) + 2 * math.log(scale)


def alpha_sigma(log_snr):
    """(B,) -> alpha, sigma, each (B, 1)."""
    alpha = log_snr.sigmoid().sqrt()
    sigma = (-log_snr).sigmoid().sqrt()
    return alpha[..., None], sigma[..., None]


def diffuse(x, eps, log_snr):
    """z_t = alpha x + sigma eps."""
    alpha, sigma = alpha_sigma(log_snr)
    return alpha * x + sigma * eps


def velocity(x, eps, log_snr):
    """v = alpha eps - sigma x: what the network predicts [v]."""
    alpha, sigma = alpha_sigma(log_snr)
    return alpha * eps - sigma * x


def x_and_eps(z_t, v, log_snr):
    """The inverse: x = alpha z_t - sigma v and eps = sigma z_t + alpha v."""
    alpha, sigma = alpha_sigma(log_snr)
    x = alpha * z_t - sigma * v
    eps = sigma * z_t + alpha * v
    return x, eps


def loss_weight(log_snr):
    """The weight of the squared error of v at each log_snr [DGLM]: a Cauchy below 0, a Gaussian above."""
    u = log_snr / 2.4
    return torch.where(log_snr < 0, 1 / (1 + u**2), torch.exp(-(u**2) / 2))


class NoiseBins(nn.Module):
    """Draws noise levels where the weighted loss is large, which makes its estimate less noisy [KG].

    100 equal bins of log_snr hold a moving average (0.9) of the weighted loss. A level is drawn with density
    p = value of its bin / (30 * mean(values)), and its loss is divided by that value. This is importance
    sampling: mean(loss / value) * mean(values) estimates the mean loss over evenly spread log_snr.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("value", torch.ones(100))

    def sample(self, B, rng=None):
        """-> log_snr (B,) and the values of their bins (B,)."""
        index = torch.multinomial(self.value, B, replacement=True, generator=rng)
        within = torch.rand(B, generator=rng, device=self.value.device)
        log_snr = ((index + within) / len(self.value) - 0.5) * (2 * MAX_LOG_SNR)
        return log_snr, self.value[index]

    def update(self, log_snr, loss):
        """Moves the bins that the batch touched towards the mean of its weighted losses there."""
        num_bins = len(self.value)
        share = log_snr / (2 * MAX_LOG_SNR) + 0.5  # from 0 to 1
        index = (share * num_bins).long().clamp(0, num_bins - 1)
        finite = loss.isfinite()  # the optimizer skips a step that overflowed, too
        mean = self.value.scatter_reduce(0, index[finite], loss[finite], "mean", include_self=False)
        self.value.lerp_(mean, 0.1)  # other bins are their own mean


# ---------- The transformer of prompt generator and diffusion: not causal, conditioned on the noise level ---

HEAD = 64  # width of an attention head, in both


def modulate(h, scale_shift):
    """h (B, T, d), scale_shift (B, 2d) -> h * (1 + scale) + shift."""
    scale, shift = scale_shift[:, None].chunk(2, dim=-1)
    return torch.addcmul(shift, h, 1 + scale)


class RMSNorm(nn.RMSNorm):
    """h / rms(h) * weight, in fp32."""

    def __init__(self, d):
        super().__init__(d, eps=1e-12)

    def forward(self, h):
        return super().forward(h.float())


class TimeEmbedding(nn.Module):
    """alpha^2 (B,) -> (B, d / 2): sinusoids of 1000 alpha^2, frequencies 1 to 1/10000, then an MLP."""

    def __init__(self, d):
        super().__init__()
        self.register_buffer("frequency", torch.logspace(0, -4, d // 2), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(d, d // 2), nn.SiLU(), nn.Linear(d // 2, d // 2))

    def forward(self, alpha2):
        angle = 1000 * alpha2[:, None] * self.frequency
        return self.mlp(torch.cat((angle.sin(), angle.cos()), dim=-1))


class Block(nn.Module):
    """Attention and a gated feed-forward, each on an input that is normalised, then modulated by the time.

    h (B, T, d), time (B, d / 2): the time embedding after SiLU -> (B, T, d).
    """

    def __init__(self, d):
        super().__init__()
        hidden = int(d * 4 * 2 / 3)
        self.norm_1 = RMSNorm(d)
        self.time_1 = nn.Linear(d // 2, 2 * d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.proj = nn.Linear(d, d, bias=False)
        self.q_norm = RMSNorm(HEAD)
        self.k_norm = RMSNorm(HEAD)
        self.norm_2 = RMSNorm(d)
        self.time_2 = nn.Linear(d // 2, 2 * d)
        self.ff_in = nn.Linear(d, 2 * hidden)
        self.ff_out = nn.Linear(hidden, d)
        for linear in (self.time_1, self.time_2):  # starts as if there were no conditioning
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, h, time):
        B, T, d = h.shape
        qkv = self.qkv(modulate(self.norm_1(h), self.time_1(time)))
        q, k, v = (part.view(B, T, -1, HEAD) for part in qkv.chunk(3, dim=-1))
        q = self.q_norm(q).type_as(v)
        k = self.k_norm(k).type_as(v)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, heads, T, HEAD)
        h = h + self.proj(y.transpose(1, 2).reshape(B, T, d))

        a, gate = self.ff_in(modulate(self.norm_2(h), self.time_2(time))).chunk(2, dim=-1)
        return h + self.ff_out(a * F.silu(gate))


class Transformer(nn.Module):
    """n blocks over (B, length, d). With skips, late blocks also see the inputs of early ones."""

    def __init__(self, d, n, length, skips=False):
        super().__init__()
        self.time = TimeEmbedding(d)
        self.positions = nn.Parameter(torch.randn(length, d))
        self.blocks = nn.ModuleList(Block(d) for _ in range(n))
        count = n // 2 if skips else 0
        self.skips = nn.ModuleList(nn.Linear(2 * d, d) for _ in range(count))
        self.norm = RMSNorm(d)

    def forward(self, h, alpha2):
        time = F.silu(self.time(alpha2))
        h = h + self.positions * h.shape[-1] ** -0.5
        stored = []  # inputs of early blocks; the last one goes to the first late block
        for i, block in enumerate(self.blocks):
            if i < len(self.skips):
                stored.append(h)
            elif stored:
                h = self.skips[i - len(self.skips)](torch.cat((h, stored.pop()), dim=-1))
            h = block(h, time)
        return self.norm(h)


class PromptGenerator(nn.Module):
    """Stage 1: a noisy embedding z (B, E) and its alpha^2 (B,) -> soft tokens (B, K, n_embd)."""

    def __init__(self, E=768, n_embd=1280, d=768, n=6, K=8, frozen=False):
        super().__init__()
        check(
            4 * E % K == 0, f"soft_tokens={K}: must be a divisor of {4 * E}, four times an embedding's width"
        )
        self.K = K
        self.widen = nn.Linear(E, 4 * E)
        self.inp = nn.Linear(4 * E // K, d)
        self.transformer = Transformer(d, n, K)
        self.out = nn.Linear(d, n_embd)
        # a frozen decoder would rarely end a text: this is added to its output row of <|endoftext|>
        self.eot_row = nn.Parameter(torch.zeros(n_embd)) if frozen else None

    def forward(self, z, alpha2):
        h = self.inp(self.widen(z).view(len(z), self.K, -1))  # (B, K, d)
        return self.out(self.transformer(h, alpha2))


class DiffusionTransformer(nn.Module):
    """Stage 2: z_t (B, E), x_pref (B, E), alpha^2 (B,) -> v (B, E), over M tokens.

    no_prefix: (B,) bool; where True, a learned null vector replaces x_pref.
    """

    def __init__(self, E=768, d=768, n=12, M=64):
        super().__init__()
        check(4 * E % M == 0, f"diffusion_tokens={M}: must divide {4 * E}, four times an embedding's width")
        self.M = M
        self.null = nn.Parameter(torch.randn(E))
        self.widen_z = nn.Linear(E, 8 * E)
        self.inp_z = nn.Linear(8 * E // M, d // 2)
        self.widen_pref = nn.Linear(E, 4 * E)
        self.inp_pref = nn.Linear(4 * E // M, d // 2)
        self.join = nn.Linear(d, d)
        self.transformer = Transformer(d, n, M, skips=True)
        self.out = nn.Linear(d, 8 * E // M)
        self.narrow = nn.Linear(8 * E, E)

    def forward(self, z_t, x_pref, alpha2, no_prefix):
        B = len(z_t)
        x_pref = torch.where(no_prefix[:, None], self.null, x_pref)
        h_z = self.inp_z(self.widen_z(z_t).view(B, self.M, -1))  # (B, M, d / 2)
        h_pref = self.inp_pref(self.widen_pref(x_pref).view(B, self.M, -1))
        h = self.transformer(self.join(torch.cat((h_z, h_pref), dim=-1)), alpha2)  # (B, M, d)
        return self.narrow(self.out(h).reshape(B, -1))


# ---------- GPT: GPT-2 or Llama, whose inputs are embeddings, so that soft tokens can be among them ---------


@dataclass
class GPTConfig:
    """GPT-2's sizes; with rope_theta above 0 the network is a Llama, and the rest belongs to it."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    rope_theta: float = 0.0  # the base of the wavelengths of rotary positions
    n_kv_head: int = 0  # heads of keys and values, each shared by n_head / n_kv_head heads of queries
    n_hidden: int = 0  # width of the feed-forward
    norm_eps: float = 1e-5
    tied: bool = True  # the output layer is the embedding


def rotary(positions, d, theta):
    """Positions (..., T) -> cos and sin (..., 1, T, d / 2) of their angles, at d / 2 wavelengths."""
    frequency = theta ** (-torch.arange(0, d, 2, device=positions.device) / d)
    angle = (positions[..., None] * frequency)[..., None, :, :]
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotates each pair (x_i, x_{i + d/2}) of x (B, heads, T, d) by its angle (Su et al. 2021)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class CausalSelfAttention(nn.Module):
    """Llama rotates queries and keys by position, and has fewer heads of keys and values than of queries
    (Ainslie et al. 2023). GPT-2 has as many of each, and biases.
    """

    def __init__(self, config):
        super().__init__()
        width = f"n_embd={config.n_embd}"
        check(config.n_embd % config.n_head == 0, f"{width}: must be a multiple of n_head={config.n_head}")
        gpt2 = not config.rope_theta
        self.n_kv_head = config.n_kv_head or config.n_head
        self.head = config.n_embd // config.n_head  # width of a head
        self.groups = config.n_head // self.n_kv_head  # heads of queries to one of keys
        self.sizes = [config.n_embd, self.n_kv_head * self.head, self.n_kv_head * self.head]  # of q, k, v
        self.c_attn = nn.Linear(config.n_embd, sum(self.sizes), bias=gpt2)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=gpt2)

    def forward(self, h, rotation, mask, kv, filled):
        B, T, C = h.shape
        qkv = self.c_attn(h).split(self.sizes, dim=-1)
        q, k, v = (part.view(B, T, -1, self.head).transpose(1, 2) for part in qkv)
        if rotation:
            cos, sin = rotation
            q = rotate(q, cos, sin)
            k = rotate(k, cos, sin)
        if kv is not None:  # the cache (2, B, n_kv_head, longest, head): write T columns, read all so far
            kv[:, :, :, filled - T : filled] = torch.stack((k, v))
            k, v = kv[:, :, :, :filled]
        if self.groups > 1 and T == 1:  # the queries of a group as rows, so that the cache is not copied
            y = attend(q.reshape(B, -1, self.groups, self.head), k, v, mask).reshape(B, -1, 1, self.head)
        else:
            if self.groups > 1:
                k, v = (part.repeat_interleave(self.groups, dim=1) for part in (k, v))
            y = attend(q, k, v, mask, causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """GPT-2's: GELU(W h). Llama's, gated (Shazeer 2020): SiLU(W_1 h) * W_2 h, both in c_fc."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.rope_theta > 0
        hidden = config.n_hidden or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, 2 * hidden if self.gated else hidden, bias=not self.gated)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=not self.gated)

    def forward(self, h):
        if not self.gated:
            return self.c_proj(F.gelu(self.c_fc(h), approximate="tanh"))
        gate, h = self.c_fc(h).chunk(2, dim=-1)
        return self.c_proj(F.silu(gate) * h)


class GPTBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        norm = nn.RMSNorm if config.rope_theta else nn.LayerNorm
        self.ln_1 = norm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = norm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, h, rotation, mask, kv, filled):
        h = h + self.attn(self.ln_1(h), rotation, mask, kv, filled)
        return h + self.mlp(self.ln_2(h))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019), or Llama (Touvron et al. 2023) under GPT-2's names. No dropout."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        V = config.vocab_size
        P = config.n_positions
        C = config.n_embd
        self.wte = nn.Embedding(V, C, _weight=torch.empty(V, C))  # initialised below
        if not config.rope_theta:
            self.wpe = nn.Embedding(P, C, _weight=torch.empty(P, C))
        self.h = nn.ModuleList(GPTBlock(config) for _ in range(config.n_layer))
        norm = nn.RMSNorm if config.rope_theta else nn.LayerNorm
        self.ln_f = norm(C, config.norm_eps)
        if not config.tied:
            self.lm_head = nn.Linear(C, V, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2 and not p.is_meta:  # on the meta device even this no-op takes two seconds
                std = 0.02
                if name.endswith("c_proj.weight"):  # the residual stream sums 2 n_layer of these
                    std /= math.sqrt(2 * config.n_layer)
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @classmethod
    def from_pretrained(cls, name, renumber=True):
        """A GPT-2 or Llama, in fp32: a hub name (gpt2-large, HuggingFaceTB/SmolLM2-135M), a folder in that
        format, a .gguf file, or smollm2, which comes in a package. Tokens are renumbered in merge order,
        which leaves out special ones. Raises InputError if it cannot be loaded, or is of another kind.
        """
        config, weights = read_pretrained(name, renumber)
        with torch.device("meta"):
            model = cls(GPTConfig(**config))
        model.load_state_dict(weights, assign=True)
        return model

    def forward(self, h, positions=None, mask=None, cache=None, filled=None, keep=None, eot_row=None):
        """Embeddings h (B, T, n_embd) of tokens and soft tokens -> logits (B, T, vocab_size).

        positions: (B, T), default 0 ... T - 1. mask: (B, 1, T, filled) bool; without a cache it may be left
        out, for a causal one. cache: for each layer (2, B, n_kv_head, longest, head), whose first `filled`
        columns end with these T. keep: (B, T) bool, where logits are wanted; they come as (n, vocab_size).
        eot_row: (n_embd,), added to the output layer's row of <|endoftext|>.
        """
        config = self.config
        if positions is None:
            positions = torch.arange(h.shape[1], device=h.device)
        rotation = None
        if config.rope_theta:
            rotation = rotary(positions, config.n_embd // config.n_head, config.rope_theta)
        else:
            h = h + self.wpe(positions)

        for i, block in enumerate(self.h):
            kv = None if cache is None else cache[i]
            h = block(h, rotation, mask, kv, filled)
        if keep is not None:
            h = h[keep]
        h = self.ln_f(h)

        head = self.wte if config.tied else self.lm_head
        logits = F.linear(h, head.weight)
        if eot_row is not None:
            logits[..., -1] += h @ eot_row.to(h)
        return logits

    def generate(self, prompts, max_new_tokens, sampling, stop=None, rng=None, earlier=(), **soft):
        """Continues lists of tokens -> the new tokens of each. See `draw_tokens`, and for soft `Reader`."""
        reader = Reader(self, prompts, max_new_tokens, **soft)
        return draw_tokens(reader, max_new_tokens, sampling, stop, rng, earlier)


# ---------- Stage 1's model ---------------------------------------------------------------------------------


def insert(rows, block, at):
    """rows (B, T, ...), block (B, K, ...) -> (B, T + K, ...): row i with its block before element at[i].

    [a b c] and [s s] at 2 -> [a b s s c].
    """
    T = rows.shape[1]
    K = block.shape[1]
    column = torch.arange(T + K, device=rows.device)
    at = at[:, None]
    in_block = (column >= at) & (column < at + K)
    # where each element comes from, in rows followed by block
    source = torch.where(column < at, column, column - K)
    source = torch.where(in_block, T + column - at, source)
    rest = rows.shape[2:]
    source = source.view(*source.shape, *[1 for _ in rest]).expand(-1, -1, *rest)
    return torch.cat((rows, block), dim=1).gather(1, source)


class Decoder(nn.Module):
    """What stage 1 trains: the prompt generator and the GPT that reads its soft tokens.

    They come between prefix and continuation. Before a frozen GPT, which has never learnt to read across a
    gap, they come first.
    """

    def __init__(self, gpt, generator):
        super().__init__()
        self.gpt = gpt
        self.generator = generator
        self.soft_first = generator.eot_row is not None

    def forward(self, tokens, length, split, z, alpha2, continuation_only=False):
        """Mean cross-entropy of the real tokens -> scalar, nats a token.

        tokens: (B, T + 1). length: (B,) tokens of each window, T at most; the one that follows it is a target
        too. split: (B,) tokens of its prefix. z: (B, E) an embedding, standardised and noisy. alpha2: (B,).
        The prefix carries loss unless the soft tokens come first, or continuation_only. With z None,
        <|endoftext|> replaces the soft tokens: the plain decoder.
        """
        if z is None:
            soft_prompt = self.gpt.wte.weight[-1].expand(len(tokens), 1, -1)
        else:
            soft_prompt = self.generator(z, alpha2)
        h = self.gpt.wte(tokens)
        at = torch.zeros_like(split) if self.soft_first else split
        h = insert(h, soft_prompt.to(h), at)  # (B, T + 1 + K, n_embd)

        ignore = -100  # the target of positions without loss
        column = torch.arange(tokens.shape[1], device=tokens.device)
        ignored = column > length[:, None]
        if continuation_only or self.soft_first:  # soft tokens in front would betray the prefix
            ignored |= column < split[:, None]
        # soft tokens are never targets; the last one predicts the first token of the continuation
        no_target = tokens.new_full(soft_prompt.shape[:2], ignore)
        targets = insert(tokens.masked_fill(ignored, ignore), no_target, at)[:, 1:]

        keep = targets != ignore  # logits are a third of a small decoder's work: only those with a target
        logits = self.gpt(h[:, :-1], keep=keep, eot_row=self.generator.eot_row)
        return F.cross_entropy(logits.float(), targets[keep])

    @torch.no_grad()
    def write(self, prompts, x, max_new_tokens, sampling, rng=None, earlier=()):
        """Continues prompts (lists of tokens), each conditioned on its proposal x (B, E) -> lists of tokens,
        which end before <|endoftext|>. earlier: tokens of each text that the repetition penalty covers too.
        """
        log_snr = torch.full((len(x),), 1 - sampling.sigma2, device=x.device).logit()
        eps = normal(rng, x.shape, x.device)
        z = diffuse(x, eps, log_snr)
        return self.gpt.generate(
            prompts,
            max_new_tokens,
            sampling,
            stop=self.gpt.config.vocab_size - 1,
            rng=rng,
            earlier=earlier,
            soft_prompt=self.generator(z, log_snr.sigmoid()),
            soft_first=self.soft_first,
            eot_row=self.generator.eot_row,
        )


# ---------- Sampling and guidance ---------------------------------------------------------------------------


SAMPLING_RANGES = {
    "steps": "at least 1, at most 1000",
    "sigma2": "at least 0, at most 1",
    "temperature": "at least 0",
    "top_k": "at least 0",
    "top_p": "above 0, at most 1",
    "repetition_penalty": "at least 0.01, at most 100",
}


@dataclass(frozen=True)
class Sampling:
    """How a proposal is drawn and written; `python sample.py --help` explains. Raises InputError."""

    steps: int = 4
    sampler: str = "dpm++"
    cfg_scale: float = 2.5
    guide_through: str = "estimate"
    sigma2: float = 0.05
    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 0.9
    repetition_penalty: float = 1.1
    may_end: bool = True

    def __post_init__(self):
        for name, conditions in SAMPLING_RANGES.items():
            check_range(name, getattr(self, name), conditions)
        check(self.sampler in ("ddpm", "ddim", "dpm++"), f"sampler={self.sampler}: use ddpm, ddim or dpm++")
        check(self.guide_through in ("network", "estimate"), "guide_through: use network or estimate")


class Covariance(NamedTuple):
    """The covariance C of the training embeddings, standardised: its variances (E,) along its axes (E, E)."""

    variance: torch.Tensor
    axes: torch.Tensor


def predict(denoiser, z_t, log_snr, x_pref, no_prefix, sampling, directions, covariance, rng, points=32):
    """The denoiser's x and eps at z_t (B, E), after both kinds of guidance. Arguments: see `sample`."""
    alpha, sigma = alpha_sigma(log_snr)
    through_network = bool(directions) and sampling.guide_through == "network"
    with torch.set_grad_enabled(through_network):
        z_t = z_t.detach().requires_grad_(through_network)
        if sampling.cfg_scale == 1:
            v = denoiser(z_t, x_pref, log_snr.sigmoid(), no_prefix)
        else:
            v = classifier_free(denoiser, z_t, x_pref, log_snr.sigmoid(), no_prefix, sampling.cfg_scale)
        x, eps = x_and_eps(z_t, v.float(), log_snr)
    if not directions:
        return x, eps

    # p(y | z_t) is the mean of p(y | point) over points drawn from p(x | z_t), a Gaussian around x [LGD].
    # The gradient of its log goes on from x to z_t either through the network, or as if the data were
    # N(m, C): then Sigma = Cov[x | z_t] = sigma^2 C (alpha^2 C + sigma^2)^-1, and dx/dz_t is
    # alpha / sigma^2 times Sigma.
    offsets = normal(rng, (len(x), points, x.shape[1]), x.device)
    if through_network:
        offsets *= (sigma / alpha)[:, None]
    else:
        variance, axes = covariance
        spread = sigma**2 * variance / (alpha**2 * variance + sigma**2)  # (B, E), Sigma along its axes
        offsets = (offsets * spread.sqrt()[:, None]) @ axes.T
    with torch.enable_grad():
        differentiate_by = z_t if through_network else x.requires_grad_()
        cloud = x[:, None] + offsets  # (B, points, E)
        log_p = sum(weight * log_prob(cloud).logsumexp(1) for log_prob, weight in directions)  # + a constant
        (gradient,) = torch.autograd.grad(log_p.sum(), differentiate_by)
    if not through_network:
        along_axes = gradient @ axes
        gradient = (along_axes * spread * alpha / sigma**2) @ axes.T

    # eps' = eps - sigma gradient, so x' = (z_t - sigma eps') / alpha = x + sigma^2 / alpha gradient
    x = x + sigma**2 / alpha * gradient
    eps = eps - sigma * gradient
    return x.detach(), eps.detach()


def classifier_free(denoiser, z_t, x_pref, alpha2, no_prefix, scale):
    """v = scale v_cond + (1 - scale) v_null (Ho & Salimans 2022), both passes in one batch."""
    never = torch.ones_like(no_prefix)
    v = denoiser(z_t.repeat(2, 1), x_pref.repeat(2, 1), alpha2.repeat(2), torch.cat((no_prefix, never)))
    v_cond, v_null = v.chunk(2)
    return scale * v_cond + (1 - scale) * v_null


@torch.no_grad()
def sample(denoiser, x_pref, no_prefix, sampling, directions=(), covariance=None, rng=None, on_step=None):
    """Draws continuation embeddings -> x (B, E).

    denoiser: (z_t, x_pref, alpha2, no_prefix) -> v. x_pref: (B, E). no_prefix: (B,) bool. sampling: a
    `Sampling`. directions: pairs (log_prob, weight), where log_prob maps points (..., E) to log p(y | point)
    (...); the score gains weight * grad log p(y | z_t), so weight 1 aims at the posterior. covariance: a
    `Covariance`, for directions at the estimate. rng: a generator, or a list with one for each row.
    on_step(log_snr, x) gets every prediction.
    """
    B, E = x_pref.shape
    steps = sampling.steps
    device = x_pref.device
    if sampling.sampler == "dpm++":
        levels = torch.linspace(-4, 4, steps + 1, device=device)  # of log_snr, where a proposal forms
    else:  # the paper's, from the noisiest level trained
        levels = cosine_log_snr(torch.linspace(1, 0, steps + 1, device=device)).clamp(-MAX_LOG_SNR)

    z = normal(rng, (B, E), device)
    last_x = last_delta = None
    for i in range(steps):
        log_snr = levels[i].expand(B)
        log_snr_next = levels[i + 1].expand(B)
        x, eps = predict(denoiser, z, log_snr, x_pref, no_prefix, sampling, directions, covariance, rng)
        if on_step:
            on_step(levels[i].item(), x)

        alpha, sigma = alpha_sigma(log_snr)
        alpha_next, sigma_next = alpha_sigma(log_snr_next)
        delta = levels[i + 1] - levels[i]  # the step in log_snr, above 0
        if i == steps - 1:
            z = x
        elif sampling.sampler == "ddim":
            z = alpha_next * x + sigma_next * eps
        elif sampling.sampler == "ddpm":
            # q(z_next | z, x) of [VDM], with a variance between its two bounds, log-linearly
            mean = torch.exp(-delta) * (alpha_next / alpha) * z - torch.expm1(-delta) * alpha_next * x
            deviation = torch.sqrt(-torch.expm1(-delta)) * sigma_next**0.8 * sigma**0.2
            z = mean + deviation * normal(rng, (B, E), device)
        else:
            # [DPM++] (2M), algorithm 2, whose lambda = log(alpha / sigma) is half of our log_snr
            ahead = x
            if last_x is not None:
                ahead = x + (x - last_x) * delta / (2 * last_delta)
            z = sigma_next / sigma * z - alpha_next * torch.expm1(-delta / 2) * ahead
            last_x = x
            last_delta = delta
    check(z.isfinite().all(), "the diffusion diverged: lower cfg_scale or the weights of the guides")
    return z


# ---------- Probes, and guides as a person writes them ------------------------------------------------------


@dataclass
class Probe:
    """A linear classifier of embeddings from probes.py: p(class | e) = softmax(coef e + intercept)."""

    name: str
    classes: list
    coef: torch.Tensor  # (classes, E)
    intercept: torch.Tensor  # (classes,)
    encoder: str
    guidance_weights: list  # for each class, of a guide that does not say its weight

    def log_prob(self, e):
        """Unit embeddings (..., E) -> log p(class | e) (..., classes)."""
        return F.log_softmax(F.linear(e, self.coef, self.intercept), dim=-1)

    def save(self, path, **figures):
        """Writes NAME.npz. figures: how good it is, for whoever opens the file."""
        arrays = {
            "classes": self.classes,
            "coef": self.coef.cpu().numpy(),
            "intercept": self.intercept.cpu().numpy(),
            "encoder": self.encoder,
            "weight": self.guidance_weights,
        }
        write_file(path, partial(np.savez, **arrays, **figures))

    @classmethod
    def load(cls, path, device="cpu"):
        """Reads NAME.npz. Raises InputError if it is damaged, or not a probe."""
        damaged = f"{path} is damaged, or not a probe of probes.py"
        with reported_as(damaged), np.load(path, allow_pickle=False) as f:
            classes = f["classes"].tolist()
            return cls(
                name=os.path.basename(path).removesuffix(".npz"),
                classes=classes,
                coef=torch.tensor(f["coef"], device=device),
                intercept=torch.tensor(f["intercept"], device=device),
                encoder=str(f["encoder"]),
                guidance_weights=np.broadcast_to(f["weight"], len(classes)).tolist(),
            )


class Direction(NamedTuple):
    """What one item of a guide asks for: a class to steer towards, or away from, and how hard."""

    probe: Probe
    label: int
    away: bool
    weight: float

    @property
    def name(self):
        label = self.probe.classes[self.label]
        return f"not-{label}" if self.away else label

    def log_prob(self, e):
        """Unit embeddings (..., E) -> log p(class | e), or log(1 - p(class | e)) (...)."""
        log_p = self.probe.log_prob(e)
        if not self.away:
            return log_p[..., self.label]
        others = [i for i in range(len(self.probe.classes)) if i != self.label]
        return log_p[..., others].logsumexp(-1)


def parse_guide(guide, probes):
    """`negative:30,sports`, `sentiment=negative`, `not-sports:40` or `none` -> [Direction, ...].

    A weight that is not given is the probe's, for that class. Raises InputError if no probe or more than one
    has the class, or if the weight is not a number, 0 or above.
    """
    check(isinstance(guide, str), f"--guide: {guide!r} must be a text, such as none or negative:30")
    if guide.strip() in ("", "none"):
        return []
    return [parse_direction(item, probes) for item in guide.split(",")]


def parse_direction(item, probes):
    """One item of a guide, such as `negative:30` -> its Direction. Raises InputError: see `parse_guide`."""
    name, colon, number = (part.strip() for part in item.partition(":"))
    probe_name, _, label = (part.strip() for part in name.rpartition("="))
    found = []  # pairs (probe, away)
    for probe in probes:
        if probe_name in ("", probe.name):
            if label in probe.classes:  # a class may be called not-sunny
                found.append((probe, False))
            elif label.startswith("not-") and label.removeprefix("not-") in probe.classes:
                found.append((probe, True))
    known = ", ".join(f"{probe.name} ({', '.join(probe.classes)})" for probe in probes)
    known = known or "none yet, see probes.py"
    check(found, f"--guide: no probe has a class {name!r}; this model's probes: {known}")
    ways = " or ".join(f"{probe.name}={label}" for probe, _ in found)
    check(len(found) == 1, f"--guide: several probes have a class {label!r}: say {ways}")

    ((probe, away),) = found
    if away:
        label = label.removeprefix("not-")
    index = probe.classes.index(label)
    if colon:
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        check(math.isfinite(weight), f"--guide: the weight in {item!r} is not a number")
    elif away and len(probe.classes) == 2:  # away from one of two classes is towards the other
        weight = probe.guidance_weights[1 - index]
    else:
        weight = probe.guidance_weights[index]
    other = label if away else f"not-{label}"
    check(weight >= 0, f"--guide: the weight in {item!r} is negative: say {other}:{-weight:g}")
    return Direction(probe, index, away, weight)


# ---------- The whole: a trained folder, ready to write -----------------------------------------------------


def load_decoder(folder, device):
    """Stage 1's weights -> what was saved with them, the Decoder. Raises InputError: see `load_weights`.

    A frozen GPT is not saved with its prompt generator. It is loaded from its source, if that is the same.
    """
    meta, weights = load_weights(folder, "decoder", device)
    architecture = meta["architecture"]
    frozen = architecture.get("frozen")
    if frozen:
        same = source_sha256(frozen["name"]) == frozen["sha256"]
        check(same, f"{frozen['name']} is not the decoder that {folder} was trained with: its files differ")
        gpt = GPT.from_pretrained(frozen["name"])
    else:
        gpt = GPT(GPTConfig(**architecture["gpt"]))
    decoder = Decoder(gpt, PromptGenerator(**architecture["generator"])).to(device).requires_grad_(False)
    trained = decoder.generator if frozen else decoder
    trained.load_state_dict(weights)
    return meta, decoder


def load_diffusion(folder, device):
    """Stage 2's weights -> what was saved with them, the data's `Covariance`, the network."""
    meta, weights = load_weights(folder, "diffusion", device)
    covariance = Covariance(weights.pop("variance").float().clamp(min=0), weights.pop("axes").float())
    diffusion = DiffusionTransformer(**meta["architecture"]).to(device)
    diffusion.load_state_dict(weights)
    return meta, covariance, diffusion


class DGLM:
    """A trained model from a folder (decoder, diffusion, tokenizer, probes) or the hub (owner/model), which
    proposes and writes.

    Raises InputError if a part is missing or damaged, or does not belong to the rest.
    """

    @torch.inference_mode(False)  # whoever calls: guidance needs gradients
    def __init__(self, folder, device="auto", with_probes=True):
        self.device = pick_device(str(device))
        self.folder = model_folder(str(folder))
        meta, self.decoder = load_decoder(self.folder, self.device)
        diffusion_meta, self.covariance, self.diffusion = load_diffusion(self.folder, self.device)
        self.diffusion.requires_grad_(False)
        self.decoder.gpt.to(precision(self.device))  # decoding is limited by memory bandwidth

        self.info = meta["data"]  # the encoder, the tokenizer, the mean embedding, ...
        same = self.info == diffusion_meta["data"]
        check(same, f"{self.folder}: decoder and diffusion were trained on different data: train one again")
        self.mean = torch.tensor(self.info["mean"], device=self.device)
        self.std = torch.tensor(self.info["std"], device=self.device)
        ranks = read_ranks(f"{self.folder}/tokenizer.tiktoken", self.info["tokenizer"])
        self.tokenizer = Tokenizer(ranks, self.info.get("pattern", GPT2_PATTERN))
        self.encoder = None  # takes seconds to load, and a text without a prefix does not need it
        self.proposal_tokens = self.info["block_size"] * 2 // 3  # few training windows continue for longer
        self.longest = self.decoder.gpt.config.n_positions - self.decoder.generator.K - 1  # after one token

        self.probes = []
        paths = sorted(glob.glob(f"{glob.escape(self.folder)}/probes/*.npz")) if with_probes else []
        for path in paths:
            probe = Probe.load(path, self.device)
            ours = self.info["encoder"]
            theirs = probe.encoder
            same = os.path.basename(ours) == os.path.basename(theirs)  # a folder may stand for a hub name
            check(same, f"{path} is a probe of the encoder {theirs}, this model's is {ours}: train it again")
            self.probes.append(probe)

    def encode(self, texts):
        """Texts -> e (N, E)."""
        if self.encoder is None:
            self.encoder = Encoder(self.info["encoder"], self.device)
        return torch.from_numpy(self.encoder(texts)).to(self.device)

    def standardise(self, e):
        return (e - self.mean) / self.std

    def to_sphere(self, x):
        """x (..., E) -> e (..., E)."""
        return F.normalize(x * self.std + self.mean, dim=-1)

    @torch.inference_mode(False)
    def propose(self, prefixes, guide, sampling, rng=None, on_step=None):
        """What the continuation of each prefix should mean -> e (B, E).

        guide: see `parse_guide`. on_step(prefixes, log_snr, e) gets the prediction (B, E) of every step.
        """

        def on_sphere(direction):
            return lambda points: direction.log_prob(self.to_sphere(points))

        def denoiser(z_t, x_pref, alpha2, no_prefix):
            with autocast(self.device):
                return self.diffusion(z_t, x_pref, alpha2, no_prefix)

        def watch(log_snr, x):
            on_step(prefixes, log_snr, self.to_sphere(x))

        directions = parse_guide(guide, self.probes)
        directions = [(on_sphere(each), each.weight) for each in directions if each.weight > 0]
        no_prefix = torch.tensor([not prefix for prefix in prefixes], device=self.device)
        x_of = {"": self.mean}  # for no prefix anything will do, as no_prefix overrides it
        distinct = sorted(set(prefixes) - {""})
        if distinct:
            x_of |= dict(zip(distinct, self.standardise(self.encode(distinct))))
        x = sample(
            denoiser,
            x_pref=torch.stack([x_of[prefix] for prefix in prefixes]),
            no_prefix=no_prefix,
            sampling=sampling,
            directions=directions,
            covariance=self.covariance,
            rng=rng,
            on_step=watch if on_step else None,
        )
        return self.to_sphere(x)

    def write(self, prefixes, e, max_new_tokens, sampling, rng=None):
        """Continues prefixes, each conditioned on its proposal e (B, E) -> texts."""
        prompts = [self.tokenizer.encode_ordinary(prefix) for prefix in prefixes]
        rows = self.decoder.write(prompts, self.standardise(e), max_new_tokens, sampling, rng)
        return self.tokenizer.texts(rows)

    def write_in_parts(self, prefixes, guide, max_new_tokens, proposal_tokens, sampling, rngs, on_step):
        """Continues prefixes in parts of about proposal_tokens, each with a proposal of its own, conditioned
        on the text so far -> pairs (text, mean of its proposals (E,)). The decoder rereads the last sentence.
        """
        prompts = [self.tokenizer.encode_ordinary(prefix) for prefix in prefixes]
        new = [[] for _ in prefixes]  # the tokens of each text
        proposals = [[] for _ in prefixes]
        unfinished = list(range(len(prefixes)))
        for end in [*range(proposal_tokens, max_new_tokens, proposal_tokens), max_new_tokens]:
            if not unfinished:
                break
            # parts end at words, so texts differ in length: the shortest gets as far as `end`
            shortest = min(len(new[i]) for i in unfinished)
            count = min(end - shortest, self.longest)
            if count <= 0:
                continue

            # the diffusion reads a window of the text so far, the decoder, from the second part on, less:
            # the more it reads, the less it follows a proposal
            so_far = [prompts[i] + new[i] for i in unfinished]
            window = [self.tokenizer.last_words(tokens, self.info["block_size"]) for tokens in so_far]
            if any(new[i] for i in unfinished):
                so_far = [self.tokenizer.last_sentence(tokens) for tokens in window]
            known = [text.strip() for text in self.tokenizer.texts(window)]
            rng = [rngs[i] for i in unfinished]
            e = self.propose(known, guide, sampling, rng, on_step)
            earlier = [new[i] for i in unfinished]
            rows = self.decoder.write(so_far, self.standardise(e), count, sampling, rng, earlier)

            for i, proposal, row in zip(unfinished, e, rows):
                proposals[i].append(proposal)
                new[i] = (new[i] + row)[:max_new_tokens]
                if len(row) == count and end < max_new_tokens:  # its last word may be half a word
                    words = self.tokenizer.word_starts(new[i], max(1, len(new[i]) - 8))
                    if words:
                        new[i] = new[i][: words[-1]]
            unfinished = [i for i, row in zip(unfinished, rows) if len(row) == count]
        means = [torch.stack(each).mean(0) for each in proposals]
        return list(zip(self.tokenizer.texts(new), means))

    def generate(
        self,
        prefixes,
        guide="none",
        num_samples=1,
        max_new_tokens=32,
        seed=1337,
        batch_size=64,
        proposal_tokens=0,
        on_step=None,
        **options,
    ):
        """Yields (continuation, its proposal e (E,)) num_samples times for each prefix, in order. A text in
        several parts comes with the mean of its proposals.

        prefixes: a list of texts; one may be empty. If one is too long for the decoder, only its end is read.
        guide: see `parse_guide`. proposal_tokens: a longer text gets a new proposal after so many; 0:
        two thirds of a training window. on_step: see `propose`. options: the fields of `Sampling`. One seed
        fixes everything: each text has random numbers of its own, whatever else is written. Raises
        InputError, at once, for what cannot be used.
        """
        sampling = Sampling(**options)
        proposal_tokens = min(proposal_tokens or self.proposal_tokens, self.longest)
        check_range("num_samples", num_samples, "at least 1")
        check_range("max_new_tokens", max_new_tokens, "at least 1")
        check_range("batch_size", batch_size, "at least 1")
        check_range("proposal_tokens", proposal_tokens, "at least 1")
        are_texts = isinstance(prefixes, list) and prefixes and all(isinstance(p, str) for p in prefixes)
        check(are_texts, "prefixes must be a list of texts")
        parse_guide(guide, self.probes)

        prefixes = [clean(prefix.rstrip()) for prefix in prefixes]
        rows = [(number, k) for number in range(len(prefixes)) for k in range(num_samples)]
        batches = (
            self.write_in_parts(
                [prefixes[number] for number, _ in rows[start : start + batch_size]],
                guide=guide,
                max_new_tokens=max_new_tokens,
                proposal_tokens=proposal_tokens,
                sampling=sampling,
                rngs=[rng_at("cpu", seed, *row) for row in rows[start : start + batch_size]],
                on_step=on_step,
            )
            for start in range(0, len(rows), batch_size)
        )
        return chain.from_iterable(batches)
