"""Writing token after token: a key-value cache, the choice of each token, and the loop."""

import math

import torch
from torch.nn.utils.rnn import pad_sequence

from plumbing.devices import uniform
from plumbing.errors import check


class Reader:
    """A GPT that reads a batch of prompts, then token after token, with a key-value cache.

    prompts: lists of tokens, of any lengths (shorter ones are padded on the left). soft_prompt: None, or
    (B, K, n_embd), inserted after each prompt (as `model.insert` does in training), or before it with
    soft_first. eot_row: see `GPT.forward`.
    An empty prompt without soft tokens becomes <|endoftext|>. If one is too long, only its end is read.
    """

    @torch.no_grad()
    def __init__(self, gpt, prompts, max_new_tokens, soft_prompt=None, soft_first=False, eot_row=None):
        self.gpt = gpt
        self.eot_row = eot_row
        device = next(gpt.parameters()).device
        K = 0 if soft_prompt is None else soft_prompt.shape[1]
        room = gpt.config.n_positions - K - max_new_tokens
        check(room > 0, f"max_new_tokens={max_new_tokens} is more than this decoder can write at once")
        if K == 0:  # the first token must follow something
            prompts = [prompt or [gpt.config.vocab_size - 1] for prompt in prompts]

        # what is read first: the embeddings of each prompt and its soft tokens, padded on the left
        rows = [gpt.wte(torch.tensor(prompt[-room:], dtype=torch.long, device=device)) for prompt in prompts]
        if K > 0:
            soft_prompt = soft_prompt.to(gpt.wte.weight.dtype)
            if soft_first:
                rows = [torch.cat((soft, row)) for soft, row in zip(soft_prompt, rows)]
            else:
                rows = [torch.cat((row, soft)) for soft, row in zip(soft_prompt, rows)]
        self.h = pad_sequence(rows, batch_first=True, padding_side="left")  # (B, T, n_embd)
        B, T, _ = self.h.shape
        self.pad = torch.tensor([T - len(row) for row in rows], device=device)
        self.filled = T  # columns of the cache

        longest = T + max_new_tokens
        column = torch.arange(longest, device=device)
        self.usable = (column >= self.pad[:, None])[:, None, None]  # (B, 1, 1, longest), False for padding
        here = column[:T]
        self.positions = (here - self.pad[:, None]).clamp(min=0)
        self.mask = self.usable[..., :T] & (here <= here[:, None])  # (B, 1, T, T), causal
        self.mask |= here == here[:, None]  # padding attends to itself, or its softmax would be NaN
        sizes = [(block.attn.n_kv_head, longest, block.attn.head) for block in gpt.h]
        self.cache = [self.h.new_empty(2, B, *size) for size in sizes]

    @torch.no_grad()
    def __call__(self, token=None):
        """The token (B,) that follows (none at the first call) -> logits (B, vocab_size) of the next."""
        if token is not None:
            self.h = self.gpt.wte(token)[:, None]
            self.positions = (self.filled - self.pad)[:, None]
            self.filled += 1
            self.mask = self.usable[..., : self.filled]
        last = torch.zeros_like(self.positions, dtype=torch.bool)
        last[:, -1] = True
        logits = self.gpt(
            self.h,
            positions=self.positions,
            mask=self.mask,
            cache=self.cache,
            filled=self.filled,
            keep=last,
            eot_row=self.eot_row,
        )
        return logits.float()


def likeliest(logits, top_k, top_p, temperature):
    """Logits (B, V) -> k tokens of each row (B, k) and their probabilities (B, k).

    Of the top_k likeliest tokens (0: of all), those outside the smallest set with probability top_p get 0.
    """
    vocab_size = logits.shape[-1]
    k = min(top_k or vocab_size, vocab_size)
    if k == vocab_size and top_p == 1:  # the order does not matter, and takes long to find
        tokens = torch.arange(k, device=logits.device).expand_as(logits)
        return tokens, (logits / temperature).softmax(-1)
    logits, tokens = logits.topk(k)
    p = (logits / temperature).softmax(-1)  # falling
    if top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    return tokens, p


def pick(logits, seen, sampling, rng):
    """Logits (B, V) and the tokens seen so far (B, V) bool -> the next tokens (B,).

    The logits of seen tokens are penalised (Keskar et al. 2019), then one of the `likeliest` is drawn.
    Temperature 0 takes the very likeliest.
    """
    penalty = sampling.repetition_penalty
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    logits = torch.where(seen, penalised, logits)
    if sampling.temperature < 1e-6:
        return logits.argmax(-1)
    tokens, p = likeliest(logits, sampling.top_k, sampling.top_p, sampling.temperature)
    cumulative = p.cumsum(-1)
    total = cumulative[:, -1:]
    drawn = uniform(rng, (len(p), 1), p.device) * total
    drawn = drawn.minimum(total.nextafter(torch.zeros_like(total)))  # rounding must not reach p = 0
    index = (cumulative <= drawn).sum(-1, keepdim=True)
    return tokens.gather(1, index).squeeze(1)


@torch.no_grad()
def draw_tokens(next_logits, max_new_tokens, sampling, stop=None, rng=None, earlier=()):
    """Draws token after token -> the new tokens of each row, a list of lists that end before `stop`.

    next_logits: takes the last tokens (B,), or None at first, and gives logits (B, V): a `Reader`, or several
    combined. sampling: a `Sampling`; its repetition penalty covers the new tokens, and the lists `earlier`.
    """
    logits = next_logits(None)
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, tokens in zip(seen, earlier):
        row[tokens] = True
    done = seen.new_zeros(len(logits))
    drawn = []
    while True:
        if stop is not None and not sampling.may_end:
            logits[:, stop] = -math.inf
        token = pick(logits, seen, sampling, rng)
        drawn.append(token)
        if stop is not None:
            done |= token == stop  # whatever follows in that row is cut off below
        if done.all() or len(drawn) >= max_new_tokens:
            break
        seen.scatter_(1, token[:, None], True)
        logits = next_logits(token)
    rows = torch.stack(drawn, dim=1).tolist()
    return [row[: row.index(stop)] if stop in row else row for row in rows]
