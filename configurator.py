"""Configuration from plain global variables (after nanoGPT's configurator, but a real function, without `exec`).

A script starts with a block of globals, each with a comment, and ends with `run(main, globals())`. The command line then
overrides them, left to right:

    python train_diffusion.py --batch_size=64                  --key=value
    python train_diffusion.py --batch_size 64                  --key value
    python train_diffusion.py --compile                        bare --flag for a boolean
    python train_diffusion.py config/reviews.py --max_iters 9  a file of `key = value` lines, then an override
    python train_diffusion.py --help                           every variable, its default and its comment

A config file may serve several scripts: `key = value` sets the variable in every script that has it, and a dictionary
named after a script, `train_decoder = {"batch_size": 64}`, sets it in that script alone. Values are literals: the file is
parsed, not run.
"""

import ast
import difflib
import gzip
import hashlib
import json
import os
import re
import sys
import zlib

SCRIPTS = ("prepare", "train_decoder", "train_diffusion", "probes", "sample")


class InputError(Exception):
    """Something that the person at the keyboard can put right: printed as one line, exit status 2."""


def check(holds, message):
    """Raises InputError(message) unless `holds`."""
    if not holds:
        raise InputError(message)


def declared(path):
    """The variables at the top of a script -> {name: (default, comment)}, in their order."""
    with open(path, encoding="utf-8") as f:
        source = f.read()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.islower():
            comment = re.search(r"#\s*(.*)", lines[node.end_lineno - 1][node.value.end_col_offset :])
            found[node.targets[0].id] = (ast.literal_eval(node.value), comment[1] if comment else "")
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
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or value != value:
        raise InputError(f"{where}: {key} is a {kind.__name__} (default {default!r}), not {value!r}")
    return value


def unknown(key, known, where):
    near = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean {near[0]}?" if near else "see --help"
    return InputError(f"{where}: unknown key {key!r}: {hint}")


def read_config(path, script, settings):
    """The values that a config file sets in `script` -> {key: value}.

    Raises InputError for a missing or malformed file, an unknown key or a value of the wrong type.
    """
    try:
        with open(path, encoding="utf-8") as f:
            body = ast.parse(f.read()).body
    except OSError as e:
        raise InputError(f"cannot read config file {path}: {e.strerror}") from None
    except (SyntaxError, ValueError) as e:
        raise InputError(f"{path}, line {getattr(e, 'lineno', 1)}: not `key = value` lines: {e}") from None
    here = os.path.dirname(os.path.abspath(__file__))
    scripts = {name: declared(f"{here}/{name}.py") for name in SCRIPTS if os.path.exists(f"{here}/{name}.py")}
    shared, own = {}, {}
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring
        where = f"{path}, line {node.lineno}"
        try:
            key, value = node.targets[0].id, ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            raise InputError(f"{where}: only `key = value` with a plain value is allowed") from None
        for name, keys in {key: value}.items() if key in scripts else {"": {key: value}}.items():
            if not isinstance(keys, dict):
                raise InputError(f'{where}: {name} is a script: write {name} = {{"key": value}}')
            for k, v in keys.items():
                users = [s for s in ([name] if name else scripts) if k in scripts[s]]
                if not users and not (name in ("", script) and k in settings):
                    raise unknown(k, settings if name in ("", script) else scripts[name], where)
                if k in settings and name in ("", script):
                    (own if name else shared)[k] = convert(k, v, settings[k][0], where)
    return shared | own


def parse_arguments(arguments, script, settings):
    """The command line -> {key: value}; later ones win. Raises InputError, or SystemExit(0) after --help."""
    values, rest = {}, list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            width = max(len(f"{k}={d[0]!r}") for k, d in settings.items())
            print(f"usage: python {script}.py [config/file.py] [--key=value | --key value | --flag] ...\n")
            for key, (default, comment) in settings.items():
                print(f"  --{f'{key}={default!r}':{width}}  {comment}")
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
            elif rest:
                value = rest.pop(0)
            else:
                raise InputError(f"command line: --{key} needs a value")
        values[key] = convert(key, value, default, "command line")
    return values


def write_file(path, content):
    """Writes str, bytes or a callable's output (it is given the temporary path) so that `path` is whole or untouched."""
    temporary = f"{path}.tmp"
    try:
        if callable(content):
            content(temporary)
        else:
            with open(temporary, "wb") as f:
                f.write(content.encode() if isinstance(content, str) else content)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except Exception as e:  # safetensors raises its own kind on a full disk
        if os.path.exists(temporary):
            os.remove(temporary)
        raise InputError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from None


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError) as e:
        raise InputError(f"cannot read {path}: {e}") from None


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
        raise InputError(f"{path}, line {number + isinstance(e, UnicodeDecodeError)}: not JSON in UTF-8 ({e})") from None
    except (OSError, EOFError, zlib.error) as e:
        raise InputError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def run(main, variables, arguments=None):
    """Override a script's `variables` (its `globals()`) from the command line, then call `main(settings)`.

    settings is the dictionary of all resolved values. Bad input, wherever it is met, ends as one line on standard error
    and exit status 2; Ctrl-C as exit status 130.
    """
    path = variables["__file__"]
    script = os.path.splitext(os.path.basename(path))[0]
    settings = declared(path)
    try:
        variables.update(parse_arguments(sys.argv[1:] if arguments is None else arguments, script, settings))
        main({key: variables[key] for key in settings})
    except InputError as e:
        fail(script, e, 2)
    except OSError as e:  # a full disk, a folder without permission
        fail(script, f"{e.strerror or e}{f': {e.filename}' if e.filename else ''}", 2)
    except KeyboardInterrupt:
        fail(script, "interrupted", 130)


def fail(script, message, status):
    print(f"{script}.py: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(status)
