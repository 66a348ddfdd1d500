"""Writing with a GPT: a key-value cache, the choice of each token, and the loop."""

import math

import torch

from plumbing.config import check


def insert(rows, block, at):
    """rows (B, T, ...), block (B, K, ...) -> (B, T + K, ...): row i with its block before element at[i].

    [a b c] and [s s] at 2 -> [a b s s c].
    """
    T, K, rest = rows.shape[1], block.shape[1], rows.shape[2:]
    column, at = torch.arange(T + K, device=rows.device), at[:, None]
    source = torch.where(column < at, column, torch.where(column < at + K, T + column - at, column - K))
    source = source.view(*source.shape, *[1] * len(rest)).expand(-1, -1, *rest)
    return torch.cat((rows, block), dim=1).gather(1, source)


class Reader:
    """A GPT that reads a batch of prompts, then token after token, with a key-value cache.

    prompts: lists of tokens, of any lengths (shorter ones are padded on the left). soft_prompt: None, or
    (B, K, n_embd), inserted after each prompt, or before it with soft_first. eot_row: see `GPT.forward`.
    An empty prompt without soft tokens becomes <|endoftext|>; of one that is too long, the end is read.
    """

    @torch.no_grad()
    def __init__(self, gpt, prompts, max_new_tokens, soft_prompt=None, soft_first=False, eot_row=None):
        device, B = next(gpt.parameters()).device, len(prompts)
        K = 0 if soft_prompt is None else soft_prompt.shape[1]
        room = gpt.config.n_positions - K - max_new_tokens
        check(room > 0, f"max_new_tokens={max_new_tokens} is more than this decoder can write at once")
        if K == 0:  # the first token must follow something
            prompts = [prompt or [gpt.config.vocab_size - 1] for prompt in prompts]
        prompts = [prompt[-room:] for prompt in prompts]
        T = max(1, *map(len, prompts))  # a column to begin with, even if it is padding
        longest = T + K + max_new_tokens
        self.gpt, self.eot_row, self.filled = gpt, eot_row, T + K

        self.pad = torch.tensor([T - len(p) for p in prompts], device=device)
        tokens = torch.tensor([[0] * (T - len(p)) + list(p) for p in prompts], device=device)
        self.h = gpt.wte(tokens)
        if K:
            at = self.pad if soft_first else torch.full_like(self.pad, T)
            self.h = insert(self.h, soft_prompt.to(self.h), at)
        column = torch.arange(longest, device=device)
        self.usable = (column >= self.pad[:, None])[:, None, None]  # (B, 1, 1, longest), False for padding
        here = column[: T + K]
        self.positions = (here - self.pad[:, None]).clamp(min=0)
        self.mask = self.usable[..., : T + K] & (here <= here[:, None])  # (B, 1, T + K, T + K), causal
        self.mask |= here == here[:, None]  # padding attends to itself, or its softmax would be NaN
        sizes = [(block.attn.n_kv_head, longest, block.attn.head) for block in gpt.h]
        self.cache = [self.h.new_empty(2, B, *size) for size in sizes]

    @torch.no_grad()
    def __call__(self, token=None):
        """The token (B,) that follows (none at the first call) -> logits (B, vocab_size) of the next."""
        if token is not None:
            self.h, self.positions = self.gpt.wte(token)[:, None], (self.filled - self.pad)[:, None]
            self.filled += 1
            self.mask = self.usable[..., : self.filled]
        inputs = self.h, self.positions, self.mask, self.cache, self.filled
        last = torch.zeros_like(self.positions, dtype=torch.bool)
        last[:, -1] = True
        return self.gpt(*inputs, keep=last, eot_row=self.eot_row).float()


def likeliest(logits, top_k, top_p, temperature):
    """Logits (B, V) -> k tokens of each row (B, k) and their probabilities (B, k).

    Of the top_k likeliest tokens (0: of all), those outside the smallest set with probability top_p get 0.
    """
    vocab_size = logits.shape[-1]
    k = min(top_k or vocab_size, vocab_size)
    if k == vocab_size and top_p == 1:  # the order does not matter, and takes long to find
        return torch.arange(k, device=logits.device).expand_as(logits), (logits / temperature).softmax(-1)
    logits, tokens = logits.topk(k)
    p = (logits / temperature).softmax(-1)  # falling
    return tokens, p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0) if top_p < 1 else p


def pick(logits, seen, sampling, rng):
    """Logits (B, V) and the tokens seen so far (B, V) bool -> the next tokens (B,).

    The logits of seen tokens are penalised (Keskar et al. 2019), then one of the `likeliest` is drawn.
    Temperature 0 takes the very likeliest.
    """
    penalty = sampling.repetition_penalty
    logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.temperature < 1e-6:
        return logits.argmax(-1)
    tokens, p = likeliest(logits, sampling.top_k, sampling.top_p, sampling.temperature)
    return tokens.gather(1, torch.multinomial(p, 1, generator=rng)).squeeze(1)


@torch.no_grad()
def decode(next_logits, max_new_tokens, sampling, stop=None, rng=None, earlier=()):
    """Draws token after token -> the new tokens of each row, a list of lists that end before `stop`.

    next_logits: takes the last tokens (B,), or None at first, and gives logits (B, V): a `Reader`, or several
    combined. sampling: a `Sampling`; its repetition penalty covers the new tokens, and the lists `earlier`.
    """
    logits, new = next_logits(None), []
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, tokens in zip(seen, earlier):
        row[tokens] = True
    done = seen.new_zeros(len(logits))
    while True:
        if stop is not None and not sampling.may_end:
            logits[:, stop] = -math.inf
        token = pick(logits, seen, sampling, rng)
        new.append(token)
        if stop is not None:
            done |= token == stop  # whatever follows in that row is cut off below
        if done.all() or len(new) >= max_new_tokens:
            break
        seen.scatter_(1, token[:, None], True)
        logits = next_logits(token)
    rows = torch.stack(new, dim=1).tolist()
    return [row[: row.index(stop)] if stop in row else row for row in rows]
