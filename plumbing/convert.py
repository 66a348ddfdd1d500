"""Decoders trained by others: a GPT-2 or Llama of transformers, from the hub, a folder or a .gguf file.

Weights get the names of `model.GPT`, and tokens are numbered in merge order, with <|endoftext|> last.
"""

import glob
import os
from contextlib import suppress

import torch

from plumbing.bpe import read_bpe
from plumbing.errors import InputError, check, reported_as
from plumbing.files import hub_folder, load_weights, save_weights, sha256
from plumbing.gguf_files import from_gguf, gguf_path, read_gguf

LLAMA_BLOCK = {  # a weight of our block: the weights of transformers that it joins
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}


def source(name):
    """Resolves a decoder's name to a local path: a .gguf file, or a folder."""
    return gguf_path(name) or (name if os.path.isdir(name) else hub_folder(name))


def source_sha256(name):
    """The hash of the files that hold a pretrained decoder's weights: which decoder it is."""
    path = source(name)
    files = sorted(glob.glob(f"{glob.escape(path)}/*.safetensors")) if os.path.isdir(path) else [path]
    return " ".join(map(sha256, files))


def read_pretrained(name, renumber=True):
    """What `GPT.from_pretrained` takes -> the fields of its GPTConfig, its weights by our names, in fp32.

    A .gguf file takes some seconds to dequantise, so the result is kept in the user's cache folder,
    unless its tokens keep their own numbers.
    """
    path = source(name)
    if os.path.isdir(path) or not renumber:
        return convert(name, path, renumber)
    cache = f"{os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')}/nanodglm"
    digest = sha256(path)
    try:
        meta, weights = load_weights(cache, digest)
        return meta["config"], weights
    except InputError:  # not there yet, damaged, or written by another version
        config, weights = convert(name, path, renumber)
    with suppress(InputError, OSError):  # without a place to keep it, it is converted each time
        os.makedirs(cache, exist_ok=True)
        save_weights(cache, digest, weights, {"config": config})
    return config, weights


def load_transformers(name, path):
    """A language model of transformers from a hub name, folder or .gguf file, in fp32. Raises InputError."""
    import transformers.utils.logging
    from transformers import AutoModelForCausalLM

    transformers.utils.logging.disable_progress_bar()
    options = {"dtype": torch.float32, "output_loading_info": True}
    if path.endswith(".gguf"):
        path, options["gguf_file"] = os.path.split(os.path.abspath(path))
    with reported_as(f"cannot load {name}, which may be incomplete"):
        model, report = AutoModelForCausalLM.from_pretrained(path, **options)
    for problem in ("missing", "unexpected", "mismatched"):  # transformers initialises these at random
        keys = sorted(map(str, report.get(f"{problem}_keys", ())))
        check(not keys, f"{name}: {len(keys)} weights are {problem}, such as {', '.join(keys[:2])}")
    return model


def load_tokenizer(name):
    """Its tokenizer of transformers, chat template included. Raises InputError."""
    import tokenizers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from transformers import AutoTokenizer

    folder = name
    file = {}
    path = gguf_path(name)
    if path:
        folder, file["gguf_file"] = os.path.split(os.path.abspath(path))
    with reported_as(f"cannot load {name}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **file)
    if path:  # transformers' conversion of a .gguf file loses how its tokenizer splits text
        _, _, pattern = read_gguf(path)
        splitter = Split(tokenizers.Regex(pattern), "isolated")
        bytes_of = ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([splitter, bytes_of])
    return tokenizer


def convert(name, path, renumber):
    """Reads a folder with transformers, or a .gguf file; then renames weights and renumbers tokens."""
    if path.endswith(".gguf"):
        config, weights = from_gguf(name, path)
    else:
        theirs = load_transformers(name, path)
        kind = theirs.config.model_type
        check(kind in ("gpt2", "llama"), f"{name} is neither a GPT-2 nor a Llama, but {kind}")
        rename = from_gpt2 if kind == "gpt2" else from_llama
        config, weights = rename(name, theirs.config, theirs.state_dict())
    if renumber and (path.endswith(".gguf") or os.path.exists(f"{path}/tokenizer.json")):
        _, order, _ = read_bpe(path)
        fits = max(order) < len(weights["wte.weight"])
        check(fits, f"{name}: its tokenizer has {max(order) + 1} tokens, its embedding fewer")
        config["vocab_size"] = len(order)
        for key in weights.keys() & {"wte.weight", "lm_head.weight"}:
            weights[key] = weights[key][order]
    return config, weights


def refuse(name, features):
    """Raises InputError for the first of {feature: whether it has it} that our GPT does not implement."""
    for feature, found in features.items():
        check(not found, f"{name}: {feature} is not supported")


def from_gpt2(name, theirs, tensors):
    """transformers' configuration and tensors -> the fields of GPTConfig, weights by our names."""
    features = {
        f"the activation {theirs.activation_function}": theirs.activation_function != "gelu_new",
        "a feed-forward of another width": theirs.n_inner not in (None, 4 * theirs.n_embd),
        "scale_attn_weights=False": not theirs.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": theirs.scale_attn_by_inverse_layer_idx,
        "an untied output layer": not theirs.tie_word_embeddings,
    }
    refuse(name, features)
    sizes = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    config = {size: getattr(theirs, size) for size in sizes}
    config["norm_eps"] = theirs.layer_norm_epsilon
    weights = {k.removeprefix("transformer."): w for k, w in tensors.items() if k != "lm_head.weight"}
    for key in weights:
        if key.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
            weights[key] = weights[key].t()  # their Conv1D holds (in, out)
    return config, weights


def from_llama(name, theirs, tensors):
    """transformers' configuration and tensors -> the fields of GPTConfig, weights by our names."""
    rope = getattr(theirs, "rope_parameters", None)
    rope = rope or {"rope_theta": theirs.rope_theta, **(theirs.rope_scaling or {})}
    rope_type = rope.get("rope_type", "default")
    features = {
        f"rope scaling ({rope_type})": rope_type != "default",
        f"the activation {theirs.hidden_act}": theirs.hidden_act != "silu",
        "attention with biases": theirs.attention_bias,
        "a feed-forward with biases": theirs.mlp_bias,
        "a head width of its own": theirs.head_dim * theirs.num_attention_heads != theirs.hidden_size,
    }
    refuse(name, features)
    config = {
        "vocab_size": theirs.vocab_size,
        "n_positions": theirs.max_position_embeddings,
        "n_layer": theirs.num_hidden_layers,
        "n_head": theirs.num_attention_heads,
        "n_embd": theirs.hidden_size,
        "rope_theta": rope["rope_theta"],
        "n_kv_head": theirs.num_key_value_heads,
        "n_hidden": theirs.intermediate_size,
        "norm_eps": theirs.rms_norm_eps,
        "tied": theirs.tie_word_embeddings,
    }
    weights = {"wte.weight": tensors["model.embed_tokens.weight"]}
    weights["ln_f.weight"] = tensors["model.norm.weight"]
    if not config["tied"]:
        weights["lm_head.weight"] = tensors["lm_head.weight"]
    for i in range(config["n_layer"]):
        for ours, parts in LLAMA_BLOCK.items():
            joined = torch.cat([tensors[f"model.layers.{i}.{part}.weight"] for part in parts])
            weights[f"h.{i}.{ours}.weight"] = joined
    return config, weights
