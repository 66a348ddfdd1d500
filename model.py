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
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing.config import check, check_positive, reported_as
from plumbing.decoders import read_pretrained, source_sha256
from plumbing.decoding import Reader, decode, insert
from plumbing.devices import autocast, pick_device, precision
from plumbing.files import load_weights, model_folder
from plumbing.guides import parse_guide
from plumbing.text import GPT2_PATTERN, Encoder, Tokenizer, clean, read_ranks

# ---------- The diffusion mathematics: log_snr (B,), alpha and sigma (B, 1), to multiply (B, E) -------------

MAX_LOG_SNR = 15.0  # training covers log_snr in [-15, 15]


def cosine_log_snr(t, scale=1.0):
    """log_snr at t in [0, 1] for alpha^2 = cos^2(pi t / 2), clamped to +-20, then shifted by 2 ln(scale)."""
    return torch.cos(math.pi / 2 * t).square().logit().clamp(-20, 20) + 2 * math.log(scale)


def alpha_sigma(log_snr):
    """(B,) -> alpha, sigma, each (B, 1)."""
    return log_snr.sigmoid().sqrt()[..., None], (-log_snr).sigmoid().sqrt()[..., None]


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
    return alpha * z_t - sigma * v, sigma * z_t + alpha * v


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

    def sample(self, n, rng=None):
        """-> log_snr (n,) and the values of their bins (n,)."""
        index = torch.multinomial(self.value, n, replacement=True, generator=rng)
        within = torch.rand(n, generator=rng, device=self.value.device)
        log_snr = ((index + within) / len(self.value) - 0.5) * (2 * MAX_LOG_SNR)
        return log_snr, self.value[index]

    def update(self, log_snr, loss):
        """Moves the bins that the batch touched towards the mean of its weighted losses there."""
        index = (log_snr / (2 * MAX_LOG_SNR) + 0.5).mul(len(self.value)).long().clamp(0, len(self.value) - 1)
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


def attend(q, k, v, mask=None, causal=False):
    """q (B, heads, T, head), k and v (B, heads, S, head), mask (B, 1, T, S), True where q looks -> like q."""
    if v.dtype != torch.bfloat16 or not v.is_cpu or mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    # on a CPU in bf16 the fused kernel is slower than this formula, and its gradient takes four times as long
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        scores += torch.full(scores.shape[-2:], -math.inf, dtype=v.dtype).triu(1)
    return scores.softmax(-1).type_as(v) @ v


class Block(nn.Module):
    """Attention and a gated feed-forward, each on an input that is normalised, then modulated by the time.

    h (B, T, d), time (B, d / 2): the time embedding after SiLU -> (B, T, d).
    """

    def __init__(self, d):
        super().__init__()
        hidden = int(d * 4 * 2 / 3)
        self.norm_1, self.time_1 = RMSNorm(d), nn.Linear(d // 2, 2 * d)
        self.qkv, self.proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.q_norm, self.k_norm = RMSNorm(HEAD), RMSNorm(HEAD)
        self.norm_2, self.time_2 = RMSNorm(d), nn.Linear(d // 2, 2 * d)
        self.ff_in, self.ff_out = nn.Linear(d, 2 * hidden), nn.Linear(hidden, d)
        for linear in (self.time_1, self.time_2):  # starts as if there were no conditioning
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, h, time):
        B, T, d = h.shape
        qkv = self.qkv(modulate(self.norm_1(h), self.time_1(time)))
        q, k, v = (part.view(B, T, -1, HEAD) for part in qkv.chunk(3, dim=-1))
        q, k = self.q_norm(q).type_as(v), self.k_norm(k).type_as(v)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, heads, T, HEAD)
        h = h + self.proj(y.transpose(1, 2).reshape(B, T, d))
        a, g = self.ff_in(modulate(self.norm_2(h), self.time_2(time))).chunk(2, dim=-1)
        return h + self.ff_out(a * F.silu(g))


class Transformer(nn.Module):
    """n blocks over (B, length, d). With skips, late blocks also see the inputs of early ones."""

    def __init__(self, d, n, length, skips=False):
        super().__init__()
        check(d > 0 and d % HEAD == 0, f"the width {d} must be a multiple of {HEAD}")
        self.time = TimeEmbedding(d)
        self.positions = nn.Parameter(torch.randn(length, d))
        self.blocks = nn.ModuleList(Block(d) for _ in range(n))
        self.skips = nn.ModuleList(nn.Linear(2 * d, d) for _ in range(n // 2 if skips else 0))
        self.norm = RMSNorm(d)

    def forward(self, h, alpha2):
        time = F.silu(self.time(alpha2))
        h, stored = h + self.positions * h.shape[-1] ** -0.5, []
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
        self.K = K
        self.widen, self.inp = nn.Linear(E, 4 * E), nn.Linear(4 * E // K, d)
        self.transformer = Transformer(d, n, K)
        self.out = nn.Linear(d, n_embd)
        # a frozen decoder may never end a text: this is added to its output row of <|endoftext|>
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
        self.M = M
        self.null = nn.Parameter(torch.randn(E))
        self.widen_z, self.inp_z = nn.Linear(E, 8 * E), nn.Linear(8 * E // M, d // 2)
        self.widen_pref, self.inp_pref = nn.Linear(E, 4 * E), nn.Linear(4 * E // M, d // 2)
        self.join = nn.Linear(d, d)
        self.transformer = Transformer(d, n, M, skips=True)
        self.out, self.narrow = nn.Linear(d, 8 * E // M), nn.Linear(8 * E, E)

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
        check(config.n_embd % config.n_head == 0, f"n_embd={config.n_embd}: not a multiple of n_head")
        self.n_kv_head, gpt2 = config.n_kv_head or config.n_head, not config.rope_theta
        self.head, self.groups = config.n_embd // config.n_head, config.n_head // self.n_kv_head
        self.sizes = [config.n_embd, self.n_kv_head * self.head, self.n_kv_head * self.head]  # of q, k, v
        self.c_attn = nn.Linear(config.n_embd, sum(self.sizes), bias=gpt2)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=gpt2)

    def forward(self, h, rotation, mask, kv, filled):
        B, T, C = h.shape
        qkv = self.c_attn(h).split(self.sizes, dim=-1)
        q, k, v = (part.view(B, T, -1, self.head).transpose(1, 2) for part in qkv)
        if rotation:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
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
        self.gated, hidden = config.rope_theta > 0, config.n_hidden or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, hidden * (1 + self.gated), bias=not self.gated)
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
        self.ln_1, self.attn = norm(config.n_embd, config.norm_eps), CausalSelfAttention(config)
        self.ln_2, self.mlp = norm(config.n_embd, config.norm_eps), MLP(config)

    def forward(self, h, rotation, mask, kv, filled):
        h = h + self.attn(self.ln_1(h), rotation, mask, kv, filled)
        return h + self.mlp(self.ln_2(h))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019), or Llama (Touvron et al. 2023) under GPT-2's names. No dropout."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        V, P, C = config.vocab_size, config.n_positions, config.n_embd
        self.wte = nn.Embedding(V, C, _weight=torch.empty(V, C))  # initialised below
        if not config.rope_theta:
            self.wpe = nn.Embedding(P, C, _weight=torch.empty(P, C))
        self.h = nn.ModuleList(GPTBlock(config) for _ in range(config.n_layer))
        self.ln_f = (nn.RMSNorm if config.rope_theta else nn.LayerNorm)(config.n_embd, config.norm_eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2 and not p.is_meta:  # on the meta device even this no-op takes two seconds
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
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
        config, rotation = self.config, None
        if positions is None:
            positions = torch.arange(h.shape[1], device=h.device)
        if config.rope_theta:
            rotation = rotary(positions, config.n_embd // config.n_head, config.rope_theta)
        else:
            h = h + self.wpe(positions)
        for i, block in enumerate(self.h):
            h = block(h, rotation, mask, None if cache is None else cache[i], filled)
        h = self.ln_f(h if keep is None else h[keep])
        logits = F.linear(h, self.wte.weight if config.tied else self.lm_head.weight)
        if eot_row is not None:
            logits[..., -1] += h @ eot_row.to(h)
        return logits

    def generate(self, prompts, max_new_tokens, sampling, stop=None, rng=None, earlier=(), **soft):
        """Continues lists of tokens -> the new tokens of each. earlier: see `decode`. soft: `Reader`."""
        reader = Reader(self, prompts, max_new_tokens, **soft)
        return decode(reader, max_new_tokens, sampling, stop, rng, earlier)


# ---------- Stage 1's model ---------------------------------------------------------------------------------


class Decoder(nn.Module):
    """What stage 1 trains: the prompt generator and the GPT that reads its soft tokens.

    They come between prefix and continuation. Before a frozen GPT, which has never learnt to read across a
    gap, they come first.
    """

    def __init__(self, gpt, generator):
        super().__init__()
        self.gpt, self.generator = gpt, generator
        self.soft_first = generator.eot_row is not None

    def forward(self, tokens, length, split, z, alpha2, continuation_only=False, words_only=False):
        """Mean cross-entropy of the real tokens -> scalar, nats a token.

        tokens: (B, T + 1). length: (B,) tokens of each window, T at most; the one that follows it is a target
        too. split: (B,) tokens of its prefix. z: (B, E) an embedding, standardised and noisy. alpha2: (B,).
        The prefix carries loss unless the soft tokens come first, or continuation_only. With words_only, the
        loss is `name_words`. With z None, <|endoftext|> replaces the soft tokens: the plain decoder.
        """
        if z is None:
            soft_prompt = self.gpt.wte.weight[-1].expand(len(tokens), 1, -1)
        else:
            soft_prompt = self.generator(z, alpha2)
        if words_only:
            return self.name_words(tokens, length, split, soft_prompt)
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

    def name_words(self, tokens, length, split, soft_prompt):
        """Mean cross-entropy of the continuations' tokens, as if each soft token named some -> scalar, nats.

        A token w has probability mean_k softmax_w(e_w . s_k + log count_w) among all tokens of the batch's
        continuations, which contain it count_w times; e_w is its embedding.
        """
        column = torch.arange(tokens.shape[1], device=tokens.device)
        row, at = torch.where((column >= split[:, None]) & (column < length[:, None]))
        words, index, count = tokens[row, at].unique(return_inverse=True, return_counts=True)
        log_p = (soft_prompt @ self.gpt.wte.weight[words].T + count.log()).log_softmax(-1)  # (B, K, words)
        return -(log_p.logsumexp(1)[row, index] - math.log(soft_prompt.shape[1])).mean()

    @torch.no_grad()
    def write(self, prompts, x, max_new_tokens, sampling, rng=None, earlier=()):
        """Continues prompts (lists of tokens), each conditioned on its proposal x (B, E) -> lists of tokens,
        which end before <|endoftext|>. earlier: tokens of each text that the repetition penalty covers too.
        """
        log_snr = torch.full((len(x),), 1 - sampling.sigma2, device=x.device).logit()
        z = diffuse(x, torch.randn(x.shape, generator=rng, device=x.device), log_snr)
        soft = {"soft_prompt": self.generator(z, log_snr.sigmoid()), "soft_first": self.soft_first}
        soft["eot_row"] = self.generator.eot_row
        stop = self.gpt.config.vocab_size - 1
        return self.gpt.generate(prompts, max_new_tokens, sampling, stop, rng, earlier, **soft)


# ---------- Sampling and guidance ---------------------------------------------------------------------------


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
        for key, default in type(self).__dataclass_fields__.items():
            kind, value = default.type, getattr(self, key)
            fits = isinstance(value, kind) or kind is float and isinstance(value, int)
            check(fits, f"{key}={value!r}: must be of the type {kind.__name__}")
        check(1 <= self.steps <= 1000, f"steps={self.steps}: must be from 1 to 1000")
        check(self.sampler in ("ddpm", "ddim", "dpm++"), f"sampler={self.sampler}: use ddpm, ddim or dpm++")
        check(self.guide_through in ("network", "estimate"), "guide_through: use network or estimate")
        check(0 <= self.sigma2 <= 1, f"sigma2={self.sigma2}: must be from 0 (obey it) to 1 (ignore it)")
        check(0 <= self.temperature < math.inf, f"temperature={self.temperature}: must be 0 or more")
        check(self.top_k >= 0, f"top_k={self.top_k}: must be 0 (all) or more")
        check(0 < self.top_p <= 1, f"top_p={self.top_p}: must be above 0, and 1 at most")
        check(0.01 <= self.repetition_penalty <= 100, "repetition_penalty must be from 0.01 to 100")


class Covariance(NamedTuple):
    """The covariance C of the training embeddings, standardised: its variances (E,) along its axes (E, E)."""

    variance: torch.Tensor
    axes: torch.Tensor


def predict(denoiser, z_t, log_snr, x_pref, no_prefix, sampling, guides, covariance, rng, points=32):
    """The denoiser's x and eps at z_t (B, E), after both kinds of guidance. Arguments: see `sample`."""
    alpha, sigma = alpha_sigma(log_snr)
    through_network = bool(guides) and sampling.guide_through == "network"
    with torch.set_grad_enabled(through_network):
        z_t = z_t.detach().requires_grad_(through_network)
        if sampling.cfg_scale == 1:
            v = denoiser(z_t, x_pref, log_snr.sigmoid(), no_prefix)
        else:  # classifier-free guidance (Ho & Salimans 2022), both passes in one batch
            never = torch.ones_like(no_prefix)
            pair = z_t.repeat(2, 1), x_pref.repeat(2, 1), log_snr.sigmoid().repeat(2)
            v_cond, v_null = denoiser(*pair, torch.cat((no_prefix, never))).chunk(2)
            v = sampling.cfg_scale * v_cond + (1 - sampling.cfg_scale) * v_null
        x, eps = x_and_eps(z_t, v.float(), log_snr)
    if guides:
        # p(y | z_t) is the mean of p(y | point) over points drawn from p(x | z_t), a Gaussian around x [LGD].
        # The gradient of its log goes on from x to z_t either through the network, or as if the data were
        # N(m, C): then Cov[x | z_t] = sigma^2 C (alpha^2 C + sigma^2)^-1, and dx/dz_t is alpha / sigma^2
        # times that. (The best linear estimate has this error, so for other data, given the prefix, the true
        # Cov[x | z_t] is no larger on average.)
        offsets = torch.randn((len(x), points, x.shape[1]), generator=rng, device=x.device)
        if through_network:
            offsets *= (sigma / alpha)[:, None]
        else:
            variance, axes = covariance
            posterior = sigma**2 * variance / (alpha**2 * variance + sigma**2)  # (B, E), along the axes
            offsets = (offsets * posterior.sqrt()[:, None]) @ axes.T
        with torch.enable_grad():
            at = z_t if through_network else x.requires_grad_()
            cloud = x[:, None] + offsets  # (B, points, E); log_p lacks the constant log(points)
            log_p = sum(weight * log_prob(cloud).logsumexp(1) for log_prob, weight in guides)
            (gradient,) = torch.autograd.grad(log_p.sum(), at)
        if not through_network:
            gradient = (gradient @ axes * posterior * alpha / sigma**2) @ axes.T
        # eps' = eps - sigma gradient, so x' = (z_t - sigma eps') / alpha = x + sigma^2 / alpha gradient
        x, eps = x + sigma**2 / alpha * gradient, eps - sigma * gradient
    return x.detach(), eps.detach()


@torch.no_grad()
def sample(denoiser, x_pref, no_prefix, sampling, guides=(), covariance=None, rng=None, on_step=None):
    """Draws continuation embeddings -> x (B, E).

    denoiser: (z_t, x_pref, alpha2, no_prefix) -> v. x_pref: (B, E). no_prefix: (B,) bool. sampling: a
    `Sampling`. guides: pairs (log_prob, weight), where log_prob maps points (..., E) to log p(y | point)
    (...); the score gains weight * grad log p(y | z_t), so weight 1 aims at the posterior. covariance: a
    `Covariance`, for guides at the estimate. on_step(log_snr, x) gets every prediction.
    """
    (B, E), steps, device = x_pref.shape, sampling.steps, x_pref.device
    if sampling.sampler == "dpm++":
        levels = torch.linspace(-4, 4, steps + 1, device=device)  # of log_snr, where a proposal forms
    else:  # the paper's, from the noisiest level trained
        levels = cosine_log_snr(torch.linspace(1, 0, steps + 1, device=device)).clamp(-MAX_LOG_SNR)
    z = torch.randn((B, E), generator=rng, device=device)
    last_x = last_delta = None
    for i in range(steps):
        log_snr, log_snr_next = levels[i].expand(B), levels[i + 1].expand(B)
        x, eps = predict(denoiser, z, log_snr, x_pref, no_prefix, sampling, guides, covariance, rng)
        if on_step:
            on_step(levels[i].item(), x)
        (alpha, sigma), (alpha_next, sigma_next) = alpha_sigma(log_snr), alpha_sigma(log_snr_next)
        delta = levels[i + 1] - levels[i]  # the step in log_snr, above 0
        if i == steps - 1:
            z = x
        elif sampling.sampler == "ddim":
            z = alpha_next * x + sigma_next * eps
        elif sampling.sampler == "ddpm":
            # q(z_next | z, x) of [VDM], with a variance between its two bounds, log-linearly
            mean = torch.exp(-delta) * (alpha_next / alpha) * z - torch.expm1(-delta) * alpha_next * x
            deviation = torch.sqrt(-torch.expm1(-delta)) * sigma_next**0.8 * sigma**0.2
            z = mean + deviation * torch.randn((B, E), generator=rng, device=z.device)
        else:
            # [DPM++] (2M), algorithm 2, whose lambda = log(alpha / sigma) is half of our log_snr
            ahead = x if last_x is None else x + (x - last_x) * delta / (2 * last_delta)
            last_x, last_delta = x, delta
            z = sigma_next / sigma * z - alpha_next * torch.expm1(-delta / 2) * ahead
    check(z.isfinite().all(), "the diffusion diverged: lower cfg_scale or the weights of the guides")
    return z


@dataclass
class Probe:
    """A linear classifier of embeddings from probes.py: p(class | e) = softmax(coef e + intercept)."""

    name: str
    classes: list
    coef: torch.Tensor  # (classes, E)
    intercept: torch.Tensor  # (classes,)
    encoder: str
    weight: list  # of a guide to each class, unless it says another

    def log_prob(self, e):
        """Unit embeddings (..., E) -> log p(class | e) (..., classes)."""
        return F.log_softmax(F.linear(e, self.coef, self.intercept), dim=-1)

    @classmethod
    def load(cls, path, device="cpu"):
        """Reads NAME.npz. Raises InputError if it is damaged, or not a probe."""
        damaged = f"{path} is damaged, or not a probe of probes.py"
        with reported_as(damaged), np.load(path, allow_pickle=False) as f:
            classes, encoder = f["classes"].tolist(), str(f["encoder"])
            weight = np.broadcast_to(f["weight"], len(classes)).tolist()
            coef, intercept = (torch.tensor(f[k], device=device) for k in ("coef", "intercept"))
        return cls(os.path.basename(path).removesuffix(".npz"), classes, coef, intercept, encoder, weight)


# ---------- The whole: a trained folder, ready to write -----------------------------------------------------


def load_decoder(folder, device):
    """Stage 1's weights -> what was saved with them, the Decoder. Raises InputError: see `load_weights`.

    A frozen GPT is not saved with its prompt generator. It is loaded from its source, if that is the same.
    """
    meta, weights = load_weights(folder, "decoder", device)
    architecture, frozen = meta["architecture"], meta["architecture"].get("frozen")
    if frozen:
        same = source_sha256(frozen["name"]) == frozen["sha256"]
        check(same, f"{frozen['name']} is not the decoder that {folder} was trained with: its files differ")
    gpt = GPT.from_pretrained(frozen["name"]) if frozen else GPT(GPTConfig(**architecture["gpt"]))
    decoder = Decoder(gpt, PromptGenerator(**architecture["generator"])).to(device).requires_grad_(False)
    (decoder.generator if frozen else decoder).load_state_dict(weights)
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

    def __init__(self, folder, device="auto", with_probes=True):
        self.device = pick_device(device)
        self.folder = folder = model_folder(folder)
        meta, self.decoder = load_decoder(folder, self.device)
        diffusion_meta, self.covariance, self.diffusion = load_diffusion(folder, self.device)
        self.data = meta["data"]
        same = self.data == diffusion_meta["data"]
        check(same, f"{folder}: decoder and diffusion were trained on different data: train one again")
        self.proposal_tokens = self.data["block_size"] * 2 // 3  # few training windows continue for longer
        self.longest = self.decoder.gpt.config.n_positions - self.decoder.generator.K - 1  # after one token
        self.diffusion.requires_grad_(False)
        self.decoder.gpt.to(precision(self.device))  # decoding is limited by memory bandwidth
        ranks = read_ranks(f"{folder}/tokenizer.tiktoken", self.data["tokenizer"])
        self.tokenizer = Tokenizer(ranks, self.data.get("pattern", GPT2_PATTERN))
        self.encoder = None
        self.mean, self.std = (torch.tensor(self.data[k], device=self.device) for k in ("mean", "std"))
        self.probes = []
        for path in sorted(glob.glob(f"{glob.escape(folder)}/probes/*.npz")) if with_probes else ():
            self.probes.append(probe := Probe.load(path, self.device))
            ours, theirs = self.data["encoder"], probe.encoder  # a folder may stand for a hub name
            same = os.path.basename(ours) == os.path.basename(theirs)
            check(same, f"{path} is a probe of the encoder {theirs}, this model's is {ours}: train it again")

    def encode(self, texts):
        """Texts -> e (N, E)."""
        if self.encoder is None:  # takes seconds to load, and a text without a prefix does not need it
            self.encoder = Encoder(self.data["encoder"], self.device)
        return torch.from_numpy(self.encoder(texts)).to(self.device)

    def standardise(self, e):
        return (e - self.mean) / self.std

    def to_sphere(self, x):
        """x (..., E) -> e (..., E)."""
        return F.normalize(x * self.std + self.mean, dim=-1)

    def propose(self, prefixes, guide, sampling, rng=None, on_step=None):
        """What the continuation of each prefix should mean -> e (B, E).

        guide: see `parse_guide`. on_step(prefixes, log_snr, e) gets the prediction (B, E) of every step.
        """

        def on_sphere(guide):
            return lambda points: guide.log_prob(self.to_sphere(points))

        def denoiser(*inputs):
            with autocast(self.device):
                return self.diffusion(*inputs)

        guides = [(on_sphere(g), g.weight) for g in parse_guide(guide, self.probes) if g.weight > 0]
        no_prefix = torch.tensor([not p for p in prefixes], device=self.device)
        distinct = sorted(set(prefixes) - {""})
        embedded = dict(zip(distinct, self.standardise(self.encode(distinct)))) if distinct else {}
        x_pref = torch.stack([embedded.get(p, self.mean) for p in prefixes])  # for "", no_prefix overrides it
        watch = on_step and (lambda log_snr, x: on_step(prefixes, log_snr, self.to_sphere(x)))
        x = sample(denoiser, x_pref, no_prefix, sampling, guides, self.covariance, rng=rng, on_step=watch)
        return self.to_sphere(x)

    def write(self, prefixes, e, max_new_tokens, sampling, rng=None):
        """Continues prefixes, each conditioned on its proposal e (B, E) -> texts."""
        prompts = [self.tokenizer.encode_ordinary(p) for p in prefixes]
        rows = self.decoder.write(prompts, self.standardise(e), max_new_tokens, sampling, rng)
        return self.tokenizer.texts(rows)

    def write_in_parts(self, prefixes, guide, max_new_tokens, proposal_tokens, sampling, rng, on_step):
        """Continues prefixes in parts of about proposal_tokens, each with a proposal of its own, conditioned
        on the text so far -> pairs (text, mean of its proposals (E,)). The decoder rereads the last sentence.
        """
        prompts, new = [self.tokenizer.encode_ordinary(p) for p in prefixes], [[] for _ in prefixes]
        proposals, unfinished = [[] for _ in prefixes], list(range(len(prefixes)))
        for end in [*range(proposal_tokens, max_new_tokens, proposal_tokens), max_new_tokens]:
            earlier = [new[i] for i in unfinished]
            count = min(end - min(map(len, earlier), default=end), self.longest)  # the shortest reaches `end`
            if count <= 0:
                continue
            read = [prompts[i] + new[i] for i in unfinished]
            known = [self.tokenizer.last_words(tokens, self.data["block_size"]) for tokens in read]
            if any(earlier):  # the more the decoder reads, the less it follows a proposal
                read = [self.tokenizer.last_sentence(tokens) for tokens in known]
            known = [text.strip() for text in self.tokenizer.texts(known)]
            e = self.propose(known, guide, sampling, rng, on_step)
            rows = self.decoder.write(read, self.standardise(e), count, sampling, rng, earlier)
            for i, proposal, row in zip(unfinished, e, rows):
                proposals[i].append(proposal)
                new[i] = (new[i] + row)[:max_new_tokens]
                if len(row) == count and end < max_new_tokens:  # its last word may be half a word
                    words = self.tokenizer.word_starts(new[i], max(1, len(new[i]) - 8))
                    new[i] = new[i][: words[-1]] if words else new[i]
            unfinished = [i for i, row in zip(unfinished, rows) if len(row) == count]
        means = [torch.stack(each).mean(0) for each in proposals]
        return list(zip(self.tokenizer.texts(new), means))

    def generate(self, prefixes, guide="none", num_samples=1, max_new_tokens=32, seed=1337, **options):
        """Yields (continuation, its proposal e (E,)) num_samples times for each prefix, in order. A text in
        several parts comes with the mean of its proposals.

        prefixes: a list of texts; one may be empty. options: the fields of `Sampling`; batch_size (64);
        proposal_tokens, after which a longer text gets a new proposal (two thirds of a training window);
        on_step of `propose`. Of a prefix that the decoder has no room for, it reads the end. One seed fixes
        everything. Raises InputError, at once, for what cannot be used.
        """
        batch_size, on_step = options.pop("batch_size", 64), options.pop("on_step", None)
        proposal_tokens = min(options.pop("proposal_tokens", 0) or self.proposal_tokens, self.longest)
        sampling = Sampling(**options)
        counts = {"num_samples": num_samples, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
        counts["proposal_tokens"] = proposal_tokens
        whole = all(isinstance(number, int) for number in (seed, *counts.values()))
        check(whole, f"{', '.join(counts)} and seed must be whole numbers")
        check_positive(counts, *counts)
        texts = isinstance(prefixes, list) and prefixes and all(isinstance(p, str) for p in prefixes)
        check(texts, "prefixes must be a list of texts")
        parse_guide(guide, self.probes)
        prefixes = [clean(p.rstrip()) for p in prefixes]
        rows = [p for p in prefixes for _ in range(num_samples)]
        batches = (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
        how = {"max_new_tokens": max_new_tokens, "proposal_tokens": proposal_tokens, "sampling": sampling}
        how |= {"guide": guide, "rng": torch.Generator(self.device).manual_seed(seed), "on_step": on_step}
        return chain.from_iterable(self.write_in_parts(batch, **how) for batch in batches)
