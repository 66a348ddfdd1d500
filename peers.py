"""The alternatives to guidance: what else makes the same decoder write text with an attribute.

    best_of_n    writes several texts and keeps the one that the probe finds likeliest
    dexperts     pulls the decoder's logits towards those of a fine-tuned expert
    by_vectors   shifts the decoder's hidden states by a difference of means
    prompting    asks an instruction-tuned language model

eval.py measures them beside DGLM. None of them uses the diffusion to steer.

[DExperts] Liu et al. 2021, DExperts: Decoding-Time Controlled Text Generation. arXiv 2105.03023
[CAA] Rimsky et al. 2024, Steering Llama 2 via Contrastive Activation Addition. arXiv 2312.06681
"""

import math
from dataclasses import replace
from functools import cache

import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from model import load_decoder, parse_guide
from plumbing.autoregression import Reader, draw_tokens, likeliest
from plumbing.devices import autocast
from plumbing.errors import check


def best_of_n(model, drafts, guide):
    """Keeps, of n unguided texts for each prefix, the one that the guide's probes find likeliest:

        argmax_k  sum_y log p(y | e(text_k)),  k = 1 ... n

    drafts: n lists of pairs (text, proposal) from `DGLM.generate`, for the same prefixes -> one such list.
    It takes n times as long as one text, and can only choose from what the decoder writes by itself.
    """
    e = torch.stack([model.encode([text for text, _ in draft]) for draft in drafts])  # (n, prefixes, E)
    log_p = sum(direction.log_prob(e) for direction in parse_guide(guide, model.probes))  # (n, prefixes)
    best = log_p.argmax(0).tolist()
    return [drafts[k][i] for i, k in enumerate(best)]


def dexperts_logits(base, experts, anti_experts, a, sampling, stop=None):
    """A function that combines the logits of several language models, for `draw_tokens` [DExperts]:

        z + a sum_i (z_i^+ - z_i^-)

    z are the logits of the decoder, z_i^+ those of an expert (fine-tuned on text with attribute i), z_i^-
    those of its anti-expert (fine-tuned on text without it). Tokens that top-k and top-p exclude by z alone
    stay excluded. base is a `Reader`, experts and anti_experts are lists of them.
    """

    def next_logits(token):
        z = base(token)
        if stop is not None and not sampling.may_end:
            z[:, stop] = -math.inf
        wish = sum(reader(token) for reader in experts) - sum(reader(token) for reader in anti_experts)
        tokens, p = likeliest(z, sampling.top_k, sampling.top_p, sampling.temperature or 1.0)
        allowed = torch.zeros_like(z, dtype=torch.bool).scatter(1, tokens, p > 0)
        return (z + a * wish).masked_fill(~allowed, -math.inf)

    return next_logits


def dexperts(model, prefixes, pairs, a, max_new_tokens, sampling, rng):
    """Continues prefixes with DExperts -> texts.

    pairs: (expert, anti-expert), two GPTs, for each attribute. There are no soft tokens. Each token costs one
    step of all these models.
    """
    prompts = [model.tokenizer.encode_ordinary(prefix) for prefix in prefixes]
    stop = model.tokenizer.eot_token
    base = Reader(model.decoder.gpt, prompts, max_new_tokens, eot_row=model.decoder.generator.eot_row)
    experts = [Reader(expert, prompts, max_new_tokens) for expert, _ in pairs]
    anti_experts = [Reader(anti_expert, prompts, max_new_tokens) for _, anti_expert in pairs]
    next_logits = dexperts_logits(base, experts, anti_experts, a, sampling, stop)
    within = replace(sampling, top_k=0, top_p=1.0)  # next_logits has excluded the other tokens already
    rows = draw_tokens(next_logits, max_new_tokens, within, stop=stop, rng=rng)
    return model.tokenizer.texts(rows)


def load_experts(text, model):
    """`negative=EXPERT+ANTI,...`: folders of this decoder, fine-tuned -> {class: [expert, anti-expert]}.

    Raises InputError if one of them is another decoder, or was not fine-tuned.
    """
    gpt = model.decoder.gpt
    load = cache(load_decoder)  # a folder may serve several classes

    def load_tuned(folder):
        meta, decoder = load(folder, model.device)
        same = decoder.gpt.config == gpt.config and meta["data"]["tokenizer"] == model.info["tokenizer"]
        tuned = "frozen" not in meta["architecture"]
        check(same and tuned, f"--experts: {folder} is not this model's decoder, fine-tuned")
        return decoder.gpt.to(gpt.wte.weight.dtype)

    experts = {}
    for item in text.replace(" ", "").split(","):
        if item:
            label, _, folders = item.partition("=")
            check(folders.count("+") == 1, f"--experts {item}: write CLASS=EXPERT+ANTI, two folders")
            experts[label] = [load_tuned(folder) for folder in folders.split("+")]
    return experts


@torch.no_grad()
def steering_vectors(model, texts, labels, layer):
    """-> {label: v (n_embd,)}, by which a label's texts differ after a block of the decoder [CAA]:

        v_y = mean_{texts with y} h - mean_{y' not y} mean_{texts with y'} h

    h are the hidden states after block `layer`, at the first 64 tokens (DiffMean in Wu et al. 2025).
    """
    gpt = model.decoder.gpt
    longest = min(64, gpt.config.n_positions)
    states = []
    hook = gpt.h[layer].register_forward_hook(lambda block, inputs, h: states.append(h))
    means = {}
    for label in sorted(set(labels)):
        mine = [text for text, y in zip(texts, labels) if y == label]
        prompts = [model.tokenizer.encode_ordinary(text)[:longest] for text in mine]
        total = 0
        count = 0
        for start in range(0, len(prompts), 64):
            reader = Reader(gpt, prompts[start : start + 64], max_new_tokens=0)
            reader()
            real = reader.usable[:, 0, 0]  # (B, T), False for padding
            total = total + states.pop()[real].float().sum(0)
            count = count + real.sum()
        means[label] = total / count
    hook.remove()

    vectors = {}
    for label, mean in means.items():
        others = torch.stack([other for y, other in means.items() if y != label])
        vectors[label] = mean - others.mean(0)
    return vectors


def by_vectors(model, prefixes, vectors, layer, a, max_new_tokens, sampling, rng):
    """Continues prefixes while a times the sum of `vectors` is added to what block `layer` gives -> texts."""
    gpt = model.decoder.gpt
    prompts = [model.tokenizer.encode_ordinary(prefix) for prefix in prefixes]
    stop = model.tokenizer.eot_token
    eot_row = model.decoder.generator.eot_row
    shift = a * sum(vectors)
    hook = gpt.h[layer].register_forward_hook(lambda block, inputs, h: h + shift.to(h))
    try:
        rows = gpt.generate(prompts, max_new_tokens, sampling, stop=stop, rng=rng, eot_row=eot_row)
    finally:
        hook.remove()
    return model.tokenizer.texts(rows)


def prompting(lm, prefixes, classes, max_new_tokens, sampling):
    """Asks an instruct model for a text with the classes, and makes it begin with the prefix -> texts.

    lm: has a transformers model, its tokenizer with a chat template, and a device. Draws from torch's own
    random numbers.
    """
    wish = f"Write a {' and '.join(classes)} text that begins: "
    chats = []
    for prefix in prefixes:
        question = {"role": "user", "content": wish + prefix}
        answer = {"role": "assistant", "content": prefix}  # which the model continues
        chats.append([question, answer])
    inputs = lm.tokenizer.apply_chat_template(
        chats, continue_final_message=True, padding=True, return_tensors="pt", return_dict=True
    ).to(lm.device)
    prompt_length = inputs["input_ids"].shape[1]

    options = {"do_sample": False}
    if sampling.temperature > 0:
        options = {"do_sample": True, "temperature": sampling.temperature}
        options |= {"top_k": sampling.top_k, "top_p": sampling.top_p}
    min_new_tokens = 0 if sampling.may_end else max_new_tokens
    penalty = RepetitionPenaltyLogitsProcessor(
        sampling.repetition_penalty, prompt_ignore_length=prompt_length
    )
    with autocast(lm.device):
        rows = lm.model.generate(
            **inputs,
            **options,
            logits_processor=LogitsProcessorList([penalty]),
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
        )
    texts = lm.tokenizer.batch_decode(rows[:, prompt_length:], skip_special_tokens=True)
    return [text.rstrip("\ufffd") for text in texts]
