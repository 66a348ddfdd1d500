"""The alternatives to guidance: what else makes the same decoder write text with an attribute.

    best_of_n    writes several texts and keeps the one that the probe finds likeliest
    dexperts     pulls the decoder's logits towards those of a fine-tuned expert
    prompting    asks an instruction-tuned language model

eval.py measures them beside DGLM. None of them uses the diffusion to steer.

[DExperts] Liu et al. 2021, DExperts: Decoding-Time Controlled Text Generation. arXiv 2105.03023
"""

from dataclasses import replace
from functools import cache

import torch
from transformers import pipeline

from model import load_decoder, parse_guide
from plumbing.config import check
from plumbing.decoding import Reader, decode
from plumbing.devices import autocast


def best_of_n(model, drafts, guide):
    """Keeps, of n unguided texts for each prefix, the one that the guide's probes find likeliest:

        argmax_k  sum_y log p(y | e(text_k)),  k = 1 ... n

    drafts: n lists of pairs (text, proposal) from `DGLM.generate`, for the same prefixes -> one such list.
    It takes n times as long as one text, and can only choose from what the decoder writes by itself.
    """
    e = torch.stack([model.encode([text for text, _ in draft]) for draft in drafts])  # (n, prefixes, E)
    guides = parse_guide(guide, model.probes)
    log_p = sum(probe.log_prob(e)[..., label] for probe, label, _ in guides)  # (n, prefixes)
    return [drafts[k][i] for i, k in enumerate(log_p.argmax(0).tolist())]


def dexperts_logits(base, experts, anti_experts, a, top_p):
    """A function that combines the logits of several language models, for `decode` [DExperts]:

        z + a sum_i (z_i^+ - z_i^-)

    z are the logits of the decoder, z_i^+ those of an expert (fine-tuned on text with attribute i), z_i^-
    those of its anti-expert (fine-tuned on text without it). Tokens outside the decoder's top_p likeliest are
    excluded. base is a `Reader`, experts and anti_experts are lists of them.
    """

    def next_logits(token):
        z = base(token)
        wish = sum(reader(token) for reader in experts) - sum(reader(token) for reader in anti_experts)
        p = z.softmax(-1)
        falling = p.sort(descending=True)[0]
        least = falling.where(falling.cumsum(-1) - falling < top_p, 1.0).amin(-1, keepdim=True)
        logits = z + a * wish
        return torch.where(p < least, logits - 100, logits)

    return next_logits


def dexperts(model, prefixes, pairs, a, max_new_tokens, options, rng):
    """Continues prefixes with DExperts -> texts.

    pairs: (expert, anti-expert), two GPTs, for each attribute. options: a `Sampling`, whose nucleus the
    unsteered decoder defines. No soft tokens are read. Each token costs one step of all these models.
    """
    prompts = [model.tokenizer.encode_ordinary(prefix) for prefix in prefixes]
    gpt, stop = model.decoder.gpt, model.tokenizer.eot_token
    base = Reader(gpt, prompts, max_new_tokens, eot_row=model.decoder.generator.eot_row)
    experts, anti_experts = ([Reader(gpt, prompts, max_new_tokens) for gpt in side] for side in zip(*pairs))
    next_logits = dexperts_logits(base, experts, anti_experts, a, options.top_p)
    rows = decode(next_logits, max_new_tokens, replace(options, top_k=0, top_p=1.0), stop, rng)
    return [model.tokenizer.decode(row).rstrip("\ufffd") for row in rows]


def load_experts(text, model):
    """`negative=EXPERT+ANTI,...`: folders of this decoder, fine-tuned -> {class: (expert, anti-expert)}.

    Raises InputError if one of them is another decoder, or was not fine-tuned.
    """
    load, gpt, experts = cache(load_decoder), model.decoder.gpt, {}
    for label, _, folders in (item.partition("=") for item in text.split(",") if item):
        pair = [load(folder, model.device) for folder in folders.split("+")]
        tuned = [e.gpt.config == gpt.config and "frozen" not in meta["architecture"] for meta, e in pair]
        fits = all(meta["data"]["tokenizer"] == model.data["tokenizer"] for meta, _ in pair)
        check(fits and tuned == [True, True], "--experts: CLASS=EXPERT+ANTI, this decoder tuned twice")
        experts[label] = [expert.gpt.to(gpt.wte.weight.dtype) for _, expert in pair]
    return experts


def prompting(lm, prefixes, classes, max_new_tokens, options, batch_size):
    """Asks an instruct model for a text with the classes, and makes it begin with the prefix -> texts.

    lm: has a transformers model and tokenizer, and a device. options: a `Sampling`.
    """
    wish = f"Write a {' and '.join(classes)} text that begins: "

    def chat(prefix):
        return [{"role": "user", "content": wish + prefix}, {"role": "assistant", "content": prefix}]

    least = 0 if options.may_end else max_new_tokens
    settings = {"do_sample": True, "max_new_tokens": max_new_tokens, "min_new_tokens": least}
    settings |= {key: getattr(options, key) for key in ("temperature", "top_k", "top_p")}
    settings |= {"device": lm.device, "batch_size": batch_size, "return_full_text": False}
    write = pipeline("text-generation", model=lm.model, tokenizer=lm.tokenizer, **settings)
    with autocast(lm.device):
        rows = write([chat(prefix) for prefix in prefixes])
    return [row["generated_text"].rstrip("\ufffd") for (row,) in rows]
