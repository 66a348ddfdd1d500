"""Tokenizers trained by others: the byte-level BPE of a tokenizer.json or a .gguf file."""

import json
import os

import tokenizers

from plumbing.errors import check, reported_as
from plumbing.files import hub_file
from plumbing.gguf_files import gguf_path, read_gguf
from plumbing.text import DIGITS_APART, GPT2_PATTERN, Tokenizer

# text that tokenizers are known to split in different ways
AWKWARD = """a|A word| a word|two  words|three   words |it's we'll I'M|O'Brien 'quoted'|don't  'twas
1|12|1234567|in 1987|x1y22z333|  9|3.14|-1,000.50|2nd ½ ² ٣|50% $5 #tag|!? ... --|(a)[b]{c}|<b>&amp;</b>
snake_case CamelCase|http://x.org/a_b?c=1&d|naïve café ÄÖß|Привет мир|مرحبا|e\u0301|中文 字符，。
e.g. U.S.A.|日本語 テキスト|한국어|😀👍🏽 🇩🇪""".replace("\n", "|").split("|")
AWKWARD += ["\n", "\n\nnew\n", "  \n x", "x\r\ny", "\n7\n8", "\n 10", "\t tab"]
AWKWARD += [f"x{blank * count}y" for blank in " \t" for count in range(2, 41)]  # as in code


def read_json(path):
    """-> {token: its number}, merges in order, the patterns that may be the one that splits text, and the
    added tokens that text can hold.
    """
    with reported_as(f"{path} is damaged, or not a byte-level BPE"), open(path, encoding="utf-8") as f:
        saved = json.load(f)
        vocabulary = saved["model"]["vocab"]
        merges = saved["model"]["merges"]
        vocabulary |= {token["content"]: token["id"] for token in saved["added_tokens"]}
    plain = [token["content"] for token in saved["added_tokens"] if not token["special"]]
    steps = saved["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    own = [step["pattern"]["Regex"] for step in steps if "Regex" in step.get("pattern", ())]
    return vocabulary, merges, [GPT2_PATTERN, DIGITS_APART, *own], plain


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
        vocabulary, merges, patterns, plain = read_json(path)
    eot = next((token for token in ("<|endoftext|>", "<|end_of_text|>") if token in vocabulary), None)
    check(eot, f"{path}: it has no token <|endoftext|> or <|end_of_text|>")
    with reported_as(f"{path} is not a byte-level BPE, whose characters stand for bytes"):
        ranks, order = merge_order(vocabulary, merges)
    if not path.endswith(".gguf"):
        theirs = tokenizers.Tokenizer.from_file(path)
        theirs.no_padding()
        theirs.no_truncation()
        texts = AWKWARD + plain
        alike = (p for p in patterns if splits_alike(Tokenizer(ranks, p), order, theirs, texts))
        pattern = next(alike, None)
        check(pattern, f"{path}: it splits text in a way that is not supported")
    return ranks, [*order, vocabulary[eot]], pattern


def splits_alike(ours, order, theirs, texts):
    """Whether both make the same tokens of all texts; order: the numbers of our tokens in theirs."""
    for text in texts:
        tokens = [order[token] for token in ours.encode_ordinary(text)]
        if tokens != theirs.encode(text, add_special_tokens=False).ids:
            return False
    return True
