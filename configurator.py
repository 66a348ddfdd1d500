"""Configuration from plain global variables (after nanoGPT's configurator, but a real function, without
`exec`).

A script starts with a block of globals, each with a comment, and ends with `run(main, globals())`. The
command line then overrides them, left to right:

    python train_diffusion.py --batch_size=64                  --key=value
    python train_diffusion.py --batch_size 64                  --key value
    python train_diffusion.py --compile                        bare --flag for a boolean
    python train_diffusion.py config/reviews.py --max_iters 9  a file of `key = value` lines, then an override
    python train_diffusion.py --help                           every variable, its default and its comment

A config file may serve several scripts: `key = value` sets the variable in every script that has it, and a
dictionary named after a script, `train_decoder = {"batch_size": 64}`, sets it in that script alone. Values
are literals: the file is parsed, not run.

Below it stands the rest of what the scripts share and is not the method: files that are whole or absent,
prepared data, and the training loop with its checkpoints.
"""

import ast
import base64
import difflib
import glob
import gzip
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import zlib
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import lru_cache

import numpy as np
import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

SCRIPTS = ("prepare", "train_decoder", "train_diffusion", "probes", "sample", "eval")
DATA_FORMAT, CHECKPOINT_FORMAT = 2, 3


class InputError(Exception):
    """Something that the person at the keyboard can put right: printed as one line, exit status 2."""


def check(holds, message):
    """Raises InputError(message) unless `holds`."""
    if not holds:
        raise InputError(message)


# ------------------------------------------------------------------------------------------------------------
# Configuration
# ------------------------------------------------------------------------------------------------------------


def declared(path):
    """The variables at the top of a script -> {name: (default, comment)}, in their order."""
    with open(path, encoding="utf-8") as f:
        source = f.read()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        name = getattr(node.targets[0], "id", "") if isinstance(node, ast.Assign) else ""
        if name.islower():
            comment = re.search(r"#\s*(.*)", lines[node.end_lineno - 1][node.end_col_offset :])
            found[name] = (ast.literal_eval(node.value), comment[1] if comment else "")
    return found


def convert(key, value, default, where):
    """`value`, a string of the command line or a literal of a config file, as the type of the default."""
    kind = type(default)
    if isinstance(value, str) and kind is not str:
        words = {"true": True, "false": False, "1": True, "0": False}
        try:
            value = words[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            pass
    large = isinstance(value, int) and abs(value) >= 2**63
    if kind is float and type(value) is int and not large:
        value = float(value)
    if type(value) is not kind or value != value or large:
        what = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
        raise InputError(f"{where}: {key} must be {what}, as {default!r}, not {value!r}")
    return value


def unknown(key, known, where):
    near = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean {near[0]}?" if near else "see --help"
    return InputError(f"{where}: unknown key {key!r}: {hint}")


def read_config(path, script, settings):
    """The values that a config file sets in `script` -> {key: value}.

    Raises InputError for a missing or malformed file, an unknown key or a value of the wrong type.
    """
    check(
        path.endswith(".py"),
        f"{path!r} is no config file, which ends in .py: variables are set by --key=value",
    )
    try:
        with open(path, encoding="utf-8") as f:
            body = ast.parse(f.read()).body
    except OSError as e:
        raise InputError(f"cannot read config file {path}: {e.strerror}") from None
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:  # the last two: values too deep
        raise InputError(f"{path}, line {getattr(e, 'lineno', 1)}: not `key = value` lines: {e}") from None
    here = os.path.dirname(os.path.abspath(__file__))
    known = {name: declared(f"{here}/{name}.py") for name in SCRIPTS}
    known[""] = {key: 1 for keys in known.values() for key in keys}  # what all scripts share
    entries = []  # (script or "", key, value, where)
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring
        where = f"{path}, line {node.lineno}"
        try:
            (name,), value = [target.id for target in node.targets], ast.literal_eval(node.value)
        except (AttributeError, TypeError, ValueError, RecursionError):
            raise InputError(f"{where}: only `key = value` with a plain value is allowed") from None
        if name in SCRIPTS:
            check(isinstance(value, dict), f'{where}: {name} is a script: write {name} = {{"key": value}}')
            entries += [(name, str(k), v, where) for k, v in value.items()]
        else:
            entries.append(("", name, value, where))
    values = {}
    for section, key, value, where in sorted(entries, key=lambda entry: entry[0] != ""):  # shared ones first
        if key not in known[section]:
            raise unknown(key, known[section], where)
        if section in ("", script) and key in settings:
            values[key] = convert(key, value, settings[key][0], where)
    return values


def parse_arguments(arguments, script, settings):
    """The command line -> {key: value}; later ones win. Raises InputError, or SystemExit(0) after --help."""
    values, rest = {}, list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            print(f"usage: python {script}.py [config/file.py] [--key=value | --key value | --flag] ...\n")
            for key, (default, comment) in settings.items():
                option = f"--{key}={default!r}"
                gap = "\n" + " " * 36 if len(option) > 32 else " " * (34 - len(option))
                print(f"  {option}{gap}{comment}")
            raise SystemExit(0)
        if not argument.startswith("--"):
            values |= read_config(argument, script, settings)
            continue
        key, equals, value = argument[2:].partition("=")
        if key not in settings:
            raise unknown(key, settings, "command line")
        default = settings[key][0]
        if not equals:
            flag = isinstance(default, bool)
            if flag and not (rest and rest[0].lower() in ("true", "false")):
                value = "true"
            elif rest and not re.fullmatch(r"--\w+(=.*)?", rest[0], re.DOTALL):  # the next option
                value = rest.pop(0)
            else:
                raise InputError(f"command line: --{key} needs a value")
        values[key] = convert(key, value, default, "command line")
    return values


def run(main, variables, arguments=None):
    """Override a script's `variables` (its `globals()`) from the command line, then call `main(settings)`.

    settings is the dictionary of all resolved values. Bad input, wherever it is met, ends as one line on
    standard error and exit status 2; Ctrl-C as exit status 130.
    """
    path = variables["__file__"]
    script = os.path.splitext(os.path.basename(path))[0]
    settings = declared(path)
    if RANK > 0:  # one process speaks for all
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # where the terminal lacks a letter, its number
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        variables.update(parse_arguments(sys.argv[1:] if arguments is None else arguments, script, settings))
        check(0 <= variables["seed"] < 2**32, f"seed={variables['seed']}: must be from 0 to 2^32 - 1")
        main({key: variables[key] for key in settings})
        sys.stdout.flush()
        if PROCESSES > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except InputError as e:
        fail(script, e, 2)
    except (MemoryError, RuntimeError) as e:
        known = {"out of memory|allocate memory": "out of memory: lower --batch_size or the sizes"}
        known |= {r"C(\+\+)? compiler": "--compile needs a C++ compiler, and on a GPU a C compiler"}
        for pattern, message in known.items():
            if isinstance(e, MemoryError) or re.search(pattern, str(e)):
                fail(script, message, 2)
        raise
    except BrokenPipeError:  # the reader of our output, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if script != "sample" or variables["out"]:
            fail(script, "stopped: what read its output has gone", 1)
    except OSError as e:  # a full disk, a folder without permission
        fail(script, f"{e.strerror or e}{f': {e.filename}' if e.filename else ''}", 2)
    except KeyboardInterrupt as e:
        resumes = script not in ("probes", "sample")
        hint = "; the same command continues from what was saved last" if resumes else ""
        fail(script, f"{str(e) or 'interrupted'}{hint}", 130)


def fail(script, message, status):
    print(f"{script}.py: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(status)


# ------------------------------------------------------------------------------------------------------------
# Files: whole or not at all, and checked when read
# ------------------------------------------------------------------------------------------------------------


def write_file(path, content):
    """Writes str, bytes, or what the callable writes to the path that it is given: all of it, or nothing."""
    target = os.path.realpath(path)  # of a link, what it points to
    check(os.path.isfile(target) or not os.path.exists(target), f"cannot write {path}: it is not a file")
    temporary = f"{target}.tmp"
    try:
        if callable(content):
            content(temporary)
        else:
            with open(temporary, "wb") as f:
                f.write(content.encode() if isinstance(content, str) else content)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # safetensors lets nobody else read
        os.replace(temporary, target)
    except BaseException as e:
        if os.path.exists(temporary):
            os.remove(temporary)
        if isinstance(e, KeyboardInterrupt):
            raise
        # safetensors raises its own kind on a full disk
        raise InputError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from None


@contextmanager
def alone(path):
    """Within, no other run writes what begins with `path`: PATH.lock. Raises InputError where one does."""
    import fcntl  # not on Windows

    if RANK > 0:  # of several processes the first has it
        yield
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however that ends
        except BlockingIOError:
            raise InputError(f"another run is at work on {path}: wait for its end, or stop it") from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            with suppress(FileNotFoundError):
                os.remove(lock.name)


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"cannot read {path}: {e}") from None


def json_hash(value):
    """The SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def write_json(path, value):
    """Writes a dictionary with a hash of itself."""
    write_file(path, json.dumps(value | {"sha256": json_hash(value)}, indent=1) + "\n")


def read_own_json(path, version):
    """What `write_json` wrote. Raises InputError where its `format` is another, or it was changed since."""
    value = read_json(path)
    found = value.get("format") if isinstance(value, dict) else None
    check(found == version, f"{path} has format {found}, this version reads {version}: make it again")
    whole = value.pop("sha256", None) == json_hash(value)
    check(whole, f"{path} is damaged, or was edited: it is not what was written")
    return value


def read_json_lines(path):
    """The rows of a .jsonl or .jsonl.gz file, which must be objects."""
    number = 0
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    row = json.loads(line)
                    check(isinstance(row, dict), f"{path}, line {number}: not a JSON object")
                    yield row
    except (ValueError, RecursionError) as e:
        raise InputError(
            f"{path}, line {number + isinstance(e, UnicodeDecodeError)}: not JSON in UTF-8 ({e})"
        ) from None
    except (OSError, EOFError, zlib.error) as e:
        raise InputError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None


def read_lines(path):
    """The lines of a text file that are not blank. Raises InputError for none."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            lines = [line.strip() for line in f if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read {path}: {e}") from None
    check(lines, f"{path} holds no line of text")
    return lines


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hub_file(repo, filename, **kwargs):
    """The local path of a file of the Hugging Face hub, downloaded once. Raises InputError when it cannot
    be had.
    """
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repo, filename, **kwargs)
    except Exception as e:
        why = str(e).strip().partition("\n")[0] or type(e).__name__
        offline = "without a network, give a folder or file of your own, or copy a hub cache and set HF_HOME"
        raise InputError(f"cannot get {filename} of {repo} from the hub ({why}); {offline}") from None


def read_ranks(path):
    """A file of ranks in tiktoken's format (base64 token, space, rank) -> {bytes: rank}. Raises
    InputError.
    """
    try:
        with open(path, "rb") as f:
            pairs = [line.split() for line in f.read().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is not a tokenizer in tiktoken's format: {e}") from None
    whole = len(ranks) >= 256 and sorted(ranks.values()) == list(range(len(ranks)))
    check(
        whole and all(bytes([b]) in ranks for b in range(256)),
        f"{path} is not a whole tokenizer: ranks are missing",
    )
    return ranks


def write_ranks(path, ranks):
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank)
    write_file(path, b"".join(lines))


def read_tensors(path, device="cpu"):
    try:
        return load_file(path, device=str(device))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path} is damaged or cut short: {e}") from None


def load_weights(module, tensors, source):
    """load_state_dict that says in one line what does not fit."""
    wanted = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in tensors.items()}
    for key in sorted(wanted.keys() | given.keys()):
        here, there = wanted.get(key, "absent"), given.get(key, "absent")
        check(here == there, f"{source} has other shapes: {key} is {there} there, {here} in this network")
    module.load_state_dict({k: v.to(module.state_dict()[k].dtype) for k, v in tensors.items()})


def save_checkpoint(folder, name, meta, weights=None, state=None):
    """Writes NAME-STEP.safetensors (weights), NAME-STEP.state.safetensors (what resuming needs) and last
    NAME.json.

    The JSON names the two files and their hashes: until it is replaced the old checkpoint stands, whole,
    and only then are the old files removed. weights None keeps those of the checkpoint before. meta must
    hold `step`.
    """
    path = f"{folder}/{name}.json"
    try:
        old = read_own_json(path, CHECKPOINT_FORMAT)
    except InputError:  # none, or one that this run starts over
        check(weights is not None, f"{path} is gone or damaged, and with it the best weights: start over")
        old = {}
    files = {k: old[k] for k in ("weights", "state") if k in old}
    for key, tensors, suffix in (("weights", weights, ""), ("state", state, ".state")):
        if tensors is not None:
            file = f"{name}-{meta['step']:06d}{suffix}.safetensors"
            if file == files.get(key, {}).get("file"):  # a run that started over, at the step of the old one
                file = f"{name}-{meta['step']:06d}-again{suffix}.safetensors"
            tensors = {k: v.detach().contiguous() for k, v in tensors.items()}
            write_file(f"{folder}/{file}", lambda p, t=tensors: save_file(t, p))
            files[key] = {"file": file, "sha256": sha256(f"{folder}/{file}")}
    write_json(path, {"format": CHECKPOINT_FORMAT, "kind": name} | meta | files)
    keep = {f["file"] for f in files.values()}
    for stale in set(glob.glob(f"{glob.escape(folder)}/{name}-*.safetensors*")):  # and what a kill left
        if os.path.basename(stale) not in keep:
            os.remove(stale)


def load_checkpoint(folder, name, key="weights", device="cpu"):
    """-> (the JSON, the tensors of `key`). Raises InputError where there is none, or it is damaged."""
    meta = read_own_json(f"{folder}/{name}.json", CHECKPOINT_FORMAT)
    check(meta["kind"] == name, f"{folder}/{name}.json is a checkpoint of the {meta['kind']}: a wrong file")
    check(key in meta, f"{folder}/{name}.json has no {key}: it cannot be trained further")
    path = f"{folder}/{meta[key]['file']}"
    tensors = read_tensors(path, device)
    check(
        sha256(path) == meta[key]["sha256"], f"{path} is damaged: it is not the file that {name}.json names"
    )
    return meta, tensors


def newest_model():
    """The whole model in out/ that was trained last, else the one in the box. Raises InputError for none."""
    folders = (os.path.dirname(path) for path in glob.glob("out/*/decoder.json"))
    trained = [folder for folder in folders if os.path.exists(f"{folder}/diffusion.json")]
    if trained:
        return max(trained, key=lambda folder: os.path.getmtime(f"{folder}/decoder.json"))
    box = os.path.relpath(f"{os.path.dirname(os.path.abspath(__file__))}/pretrained/reviews")
    check(
        os.path.exists(f"{box}/decoder.json"),
        "there is no trained model in out/ yet: see the README, or give --out_dir",
    )
    return box


# ------------------------------------------------------------------------------------------------------------
# Prepared data
# ------------------------------------------------------------------------------------------------------------


def data_name(dataset):
    """`reviews.jsonl.gz`, `some/folder/reviews` or `reviews` -> reviews, the folder's name in data/."""
    return os.path.basename(os.path.normpath(dataset)).split(".")[0] or "text"


DATASETS = ("toy", "c4", "openwebtext")  # beside paths
COLUMNS = ("tokens", "length", "split", "prefix_emb", "cont_emb")


class Data:
    """A folder that prepare.py wrote, as memory maps: data/NAME/{train,val} and meta.json. Raises
    InputError.
    """

    def __init__(self, dataset):
        self.folder = f"data/{data_name(dataset)}"
        if not os.path.exists(f"{self.folder}/meta.json"):
            raise InputError(
                f"{self.folder} is not prepared, or not wholly: run prepare.py, with your config file"
            )
        self.meta = read_own_json(f"{self.folder}/meta.json", DATA_FORMAT)
        source, name = self.meta["settings"]["dataset"], data_name(dataset)
        here = dataset != name and os.path.exists(dataset)
        same = not here or source not in DATASETS and os.path.realpath(source) == os.path.realpath(dataset)
        hint = f"rename one, or say --dataset {name}"
        check(same, f"{self.folder} was prepared from {source}, not from {dataset}: {hint}")
        options = {"desc": f"check {self.folder}", "leave": False, "delay": 2, "disable": RANK > 0}
        for path, digest in tqdm(self.meta["sha256 of"].items(), **options):
            damaged = f"{self.folder}/{path} is missing or damaged: remove the folder and prepare it again"
            check(
                os.path.exists(f"{self.folder}/{path}") and sha256(f"{self.folder}/{path}") == digest, damaged
            )
        self.splits = {}
        for split in ("train", "val"):
            paths = {name: f"{self.folder}/{split}/{name}.npy" for name in COLUMNS}
            self.splits[split] = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
        self.mean, self.std = torch.tensor(self.meta["mean"]), torch.tensor(self.meta["std"])
        self.std = torch.where(self.std < 1e-3, 1.0, self.std)  # some encoders have dead dimensions

    def ranks(self):
        """The ranks of the tokenizer that the data was prepared with."""
        return read_ranks(f"{self.folder}/tokenizer.tiktoken")

    def identity(self):
        """What a model trained on this data must be used with."""
        keys = ("name", "encoder", "E", "vocab_size", "block_size", "tokenizer", "mean")
        return {k: self.meta[k] for k in keys} | {"std": self.std.tolist()}

    def size(self, split):
        return len(self.splits[split]["length"])

    def rows(self, split, index, names, device="cpu"):
        """Rows `index` of the named arrays, as tensors: tokens cut to the longest row's, embeddings in fp32,
        standardised.
        """
        index, out = np.sort(index), []  # in the order of the file
        cuda = device.startswith("cuda")
        for name in names:
            x = torch.from_numpy(
                self.splits[split][name][index].astype(np.float32 if "emb" in name else np.int64)
            )
            if name == "tokens":
                longest = self.splits[split]["length"][index].max()
                x = x[:, : -(-longest // 8) * 8 if cuda else longest]  # GPUs and torch.compile like eights
            if "emb" in name:
                x = (x - self.mean) / self.std
            out.append(x.pin_memory().to(device, non_blocking=True) if cuda else x.to(device))
        return out


# ------------------------------------------------------------------------------------------------------------
# Several processes, one a GPU, started by torchrun. Alone, all of this is the identity.
# ------------------------------------------------------------------------------------------------------------

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device):
    """Meets the other processes of torchrun, if there are any."""
    if PROCESSES > 1 and not torch.distributed.is_initialized():
        backend = "nccl" if device.startswith("cuda") else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(device)
        try:
            torch.distributed.init_process_group(backend, timeout=timedelta(days=1))  # for the slowest part
        except (ValueError, RuntimeError) as e:
            hint = "start with torchrun, or unset WORLD_SIZE"
            raise InputError(f"cannot meet the {PROCESSES} processes ({e}): {hint}") from None


def share(rows):
    """This process's part of what all of them know."""
    return rows[RANK::PROCESSES]


def summed(x):
    """The sum of a tensor over the processes."""
    if PROCESSES > 1:
        torch.distributed.all_reduce(x)
    return x


# ------------------------------------------------------------------------------------------------------------
# Training: what the two stages share
# ------------------------------------------------------------------------------------------------------------


def pick_device(name):
    """auto, cpu, cuda, cuda:1, mps ... -> a device name. Raises InputError where there is no such device."""
    if name == "auto" and not torch.cuda.is_available():
        return "cpu"
    if name in ("auto", "cuda") and torch.cuda.is_available():  # of torchrun, each process its own
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    try:
        kind = torch.zeros(1, device=name).device.type
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"no device {name!r} ({str(e).splitlines()[0]}): try --device=cpu") from None
    check(kind != "meta", f"no device {name!r}: try --device=cpu")
    return "cpu" if kind == "cpu" else name


def precision(device):
    """bf16 where the hardware has it, else fp16 (with a scaler) on a GPU and fp32 on a CPU."""
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return torch.bfloat16 if device == "cpu" and native else torch.float32


def autocast(device):
    dtype = precision(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.split(":")[0], dtype)


def peak_rate(device):
    """FLOP of matrix products a second: the maker's figure for a GPU that we know, else measured."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    known = {
        "H100 PCIe": 756e12,
        "H100": 989e12,
        "H200": 989e12,
        "A100": 312e12,
        "L40S": 362e12,
        "4090": 165e12,
        "V100": 125e12,
    }
    for part, rate in known.items():
        if part in name:
            return rate
    size = 8192 if name else 2048
    a, seconds = torch.randn(size, size, device=device, dtype=precision(device)), []
    for _ in range(5):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


def learning_rate_at(step, peak, warmup, max_iters):
    """Linear warm-up, then a cosine down to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, max_iters - warmup)))


def make_optimizers(module, learning_rate, betas, weight_decay, muon):
    """AdamW; where muon > 0, Muon (Jordan et al. 2024) at that rate for the linear layers' matrices, AdamW
    for the rest -> a list. Only matrices decay, independent of the peak rate, which is kept as `initial_lr`.
    """
    linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)} if muon else set()
    rest = [p for p in module.parameters() if id(p) not in linear]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay / learning_rate},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]
    if linear:
        matrices = [p for p in module.parameters() if id(p) in linear]
        decay = weight_decay / muon
        optimizers.append(torch.optim.Muon(matrices, muon, decay, momentum=0.95, adjust_lr_fn="original"))
    for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
        group["initial_lr"] = group["lr"]
    return optimizers


@lru_cache(maxsize=2)
def epoch_order(n, epoch, seed):
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_index(n, batch_size, number, seed):
    """The rows of batch `number`: epochs without replacement, each in an order of its own."""
    at = np.arange(number * batch_size, (number + 1) * batch_size)
    epochs = range(at[0] // n, at[-1] // n + 1)
    return np.concatenate([epoch_order(n, epoch, seed)[at[at // n == epoch] % n] for epoch in epochs])


def generator_at(device, *numbers):
    """A random generator that is a function of numbers (seed, step, ...): nothing to save or restore."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


def train(
    name, folder, settings, data, columns, module, network, extra, weights, loss, evaluate, after_step=None
):
    """The training loop of both stages, with checkpoints that resume exactly.

    name: of the checkpoint, `decoder` or `diffusion`. settings: those of the script. network: what rebuilds
    the module, saved with it. extra: {name: tensor} of what changes beside module and optimizer (averages,
    bins). weights(): the tensors to export. loss(net, rows, generator): of these rows of the data's columns,
    to go down and to be shown, each a mean over the rows; net is the module, or DistributedDataParallel of
    it. evaluate(): {name: number}, of which "loss" picks the checkpoint whose weights are kept.
    after_step(step): called after each optimizer step.

    A batch is divided among the processes: however many there are, the steps are those of one.

    Every random number is a function of (seed, step): a resumed run takes the steps of one never stopped, on
    a CPU bit for bit.
    """
    s, device = settings, str(next(module.parameters()).device)
    for key in ("batch_size", "gradient_accumulation", "max_iters", "eval_interval", "eval_rows"):
        check(s[key] >= 1, f"{key}={s[key]}: must be at least 1")
    for key in ("learning_rate", "grad_clip"):
        check(s[key] > 0, f"{key}={s[key]}: must be above 0")
    for key in ("muon", "weight_decay", "warmup_iters"):
        check(s[key] >= 0, f"{key}={s[key]}: must be 0 (none) or above")
    for key in ("beta1", "beta2"):
        check(0 <= s[key] < 1, f"{key}={s[key]}: must be from 0 to below 1")
    betas = s["beta1"], s["beta2"]
    optimizers = make_optimizers(module, s["learning_rate"], betas, s["weight_decay"], s["muon"])
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=precision(device) == torch.float16)
    live = {f"module.{k}": v for k, v in module.state_dict().items()} | extra
    meta = {"step": 0, "data": data.identity(), "network": network, "settings": s, "history": []}
    if s["resume"] and os.path.exists(f"{folder}/{name}.json"):
        meta = resume(name, folder, meta, live, optimizers, scaler)
    start, history = meta["step"], meta["history"]
    if start >= s["max_iters"]:
        return print(f"{folder}/{name}.json has all {start} steps: raise --max_iters, or say --resume=False")
    join_processes(device)
    n, micro, seed = data.size("train"), s["gradient_accumulation"], s["seed"]
    check(
        s["batch_size"] % PROCESSES == 0,
        f"batch_size={s['batch_size']}: must divide by {PROCESSES} processes",
    )

    def read(i):
        """Of micro-batch i, this process's share."""
        index = share(np.sort(batch_index(n, s["batch_size"], i, seed)))
        return data.rows("train", index, columns, device)

    def forward(net, i, rows):
        with autocast(device):
            return loss(net, rows, generator_at(device, seed, 0, i))

    rows = read(start * micro)
    before = {key: tensor.clone() for key, tensor in extra.items()}
    with FlopCounterMode(display=False) as flops:  # on a trial run, of which nothing stays
        forward(module, start * micro, rows)[0].backward()
    module.zero_grad(set_to_none=True)
    for key, tensor in extra.items():
        tensor.copy_(before[key])
    del before
    work = flops.get_total_flops() * micro / peak_rate(device)  # seconds a step, at the device's peak
    net = module
    if s["compile"]:
        module.compile()
    if PROCESSES > 1:
        net = DistributedDataParallel(module, [device] if device.startswith("cuda") else None)

    def backward(step):
        """Adds up the gradients of a step -> its loss."""
        nonlocal rows
        losses = []
        for i in range(step * micro, (step + 1) * micro):
            last = i == (step + 1) * micro - 1
            with nullcontext() if last or net is module else net.no_sync():
                value, shown = forward(net, i, rows)
                scaler.scale(value / micro).backward()
            rows = read(i + 1)  # while a GPU is at work
            losses.append(shown.detach())
        return torch.stack(losses).mean()

    def descend(step):
        """One step of the optimizers -> whether it was taken: not where the gradient is not finite."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, group["initial_lr"], s["warmup_iters"], s["max_iters"])
            scaler.unscale_(optimizer)
        finite = nn.utils.clip_grad_norm_(module.parameters(), s["grad_clip"]).isfinite().item()
        for optimizer in optimizers if finite else []:
            scaler.step(optimizer)
        scaler.update()
        module.zero_grad(set_to_none=True)
        return finite

    def save(step, weights):
        state = {
            f"optimizer.{o}.{i}.{k}": v
            for o, optimizer in enumerate(optimizers)
            for i, slot in optimizer.state_dict()["state"].items()
            for k, v in slot.items()
        }
        meta.update(step=step, scaler=scaler.state_dict(), running=[total, counted, overflows])
        save_checkpoint(folder, name, meta, weights, live | state)

    # since the last validation: sum of the losses, steps, gradients that were not finite
    total, counted, overflows = meta.get("running", (0.0, 0, 0))
    recent, options = [], {"desc": name, "unit": " steps", "dynamic_ncols": True, "disable": RANK > 0}
    with tqdm(initial=start, total=s["max_iters"], **options) as bar, deferred_interrupt() as interrupted:
        for step in range(start, s["max_iters"]):
            recent.append(backward(step))
            overflows += not descend(step)
            if after_step:
                after_step(step)
            bar.update()
            due = (step + 1) % s["eval_interval"] == 0 or step + 1 == s["max_iters"]
            stop = bool(interrupted)
            if PROCESSES > 1:  # all stop together
                stop = summed(torch.tensor(float(stop), device=device)).item() > 0
            if len(recent) == 10 or due or stop:
                losses = summed(torch.stack(recent)).div(PROCESSES).tolist()
                for at, number in enumerate(losses, step + 1 - len(recent)):
                    row = batch_index(n, s["batch_size"], at * micro, seed)[0]
                    where = f"step {at + 1}, whose batch begins with row {row} of {data.folder}/train"
                    kept = f"lower --learning_rate; the last checkpoint is of step {meta['step']}"
                    check(math.isfinite(number), f"the loss became {number} in {where}: {kept}")
                    total, counted = total + number, counted + 1
                shown = {
                    "loss": f"{total / counted:.4f}",
                    "rate": f"{optimizers[0].param_groups[0]['lr']:.1e}",
                }
                shown["utilisation"] = f"{work * (bar.format_dict['rate'] or 0):.0%}"
                bar.set_postfix(shown | ({"overflows": overflows} if overflows else {}), refresh=False)
                recent = []
            if due and RANK == 0:
                try:
                    record = {"step": step + 1, "train": total / counted} | evaluate()
                except InputError as e:
                    raise InputError(f"validation after {where}: {e}; {kept}") from None
                record |= {"overflows": overflows} if overflows else {}
                bar.write("  ".join(f"{k} {v:.4g}" for k, v in record.items()))
                best = record["loss"] <= min((h["loss"] for h in history), default=math.inf)
                history.append(record)
                total, counted, overflows = 0.0, 0, 0
                save(step + 1, weights() if best else None)
            if stop and step + 1 < s["max_iters"]:
                if not due and RANK == 0:
                    save(step + 1, None if history else weights())
                if PROCESSES > 1:
                    torch.distributed.barrier()  # or torchrun would end the one that saves
                raise KeyboardInterrupt(f"interrupted; saved at step {step + 1}")


@contextmanager
def deferred_interrupt():
    """Within, Ctrl-C (or a polite kill) makes the yielded list true, for the loop to end its step and save;
    a second one interrupts at once.
    """
    interrupted = []

    def handler(number, frame):
        if interrupted and time.monotonic() > interrupted[0] + 1:  # torchrun may say it twice
            raise KeyboardInterrupt
        interrupted.append(time.monotonic())
        os.write(2, b"\nends this step and saves it; once more stops at once\n")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def resume(name, folder, meta, live, optimizers, scaler):
    """Puts module, optimizers and scaler back to where the checkpoint in `folder` left them -> its JSON.

    Raises InputError where it was made from other data, with another network or other optimizers.
    """
    load_checkpoint(folder, name)  # the best weights too must be whole
    saved, state = load_checkpoint(folder, name, "state")
    hint = "give another --out_dir, or --resume=False to start over"
    check(
        saved["data"] == meta["data"],
        f"{folder}/{name}.json was trained on other data ({saved['data']['name']}): {hint}",
    )
    check(
        saved["network"] == meta["network"],
        f"{folder}/{name}.json holds a network of other sizes: {hint}",
    )
    same = (saved["settings"]["muon"] > 0) == (meta["settings"]["muon"] > 0)
    check(
        same,
        f"{folder}/{name}.json was trained {'without' if meta['settings']['muon'] else 'with'} Muon: {hint}",
    )
    changed = [k for k, v in meta["settings"].items() if saved["settings"].get(k) != v]
    note = f", with other {', '.join(changed)}" if changed else ""
    print(f"resuming {folder}/{name}.json at step {saved['step']}{note}")
    with torch.no_grad():
        for key, tensor in live.items():
            tensor.copy_(state[key])
    slots = [{} for _ in optimizers]
    for key in [k for k in state if k.startswith("optimizer.")]:
        _, o, i, field = key.split(".")
        slots[int(o)].setdefault(int(i), {})[field] = state[key]
    for optimizer, slot in zip(optimizers, slots):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": slot})
    if saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    return saved | {"settings": meta["settings"]}
