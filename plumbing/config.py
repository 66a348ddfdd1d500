"""Configuration from plain global variables, after nanoGPT's configurator but without `exec`.

A script starts with a block of globals, each with a comment, and ends with `run(main, globals())`. The
command line overrides them, from left to right:

    python train_diffusion.py --batch_size=64                  --key=value
    python train_diffusion.py --batch_size 64                  --key value
    python train_diffusion.py --compile                        bare --flag for a boolean
    python train_diffusion.py config/reviews.py --max_iters 9  a file of `key = value` lines, then an override
    python train_diffusion.py --help                           every variable, its default and its comment

A comment may end with the range of its variable in brackets, such as `[above 0]` or `[at least 0, below 1]`.
Values outside it are refused before anything is loaded: see `plumbing.errors.check_range`.

A config file may serve several scripts: `key = value` sets the variable in every script that has it, and a
dictionary named after a script, `train_decoder = {"batch_size": 64}`, sets it in that script alone. Values
are literals: the file is parsed, never run.
"""

import ast
import difflib
import os
import re
import signal
import sys
import threading

from plumbing.errors import InputError, check, check_range, explain, reported_as

LARGEST_SEED = 4_000_000_000  # what numpy, scikit-learn and torch all accept, with room for seed + 1, ...
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ("prepare", "train_decoder", "train_diffusion", "probes", "sample", "eval")


def declared(path):
    """The variables at the top of a script -> {name: comment}, in order."""
    with open(path, encoding="utf-8") as f:
        source = f.read()
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        name = getattr(node.targets[0], "id", "") if isinstance(node, ast.Assign) else ""
        if name.islower():
            comment = re.search(r"#\s*(.*)", lines[node.end_lineno - 1][node.end_col_offset :])
            found[name] = comment[1] if comment else ""
    return found


def convert(key, value, default, where):
    """`value`, a string of the command line or a literal of a config file, as the type of the default."""
    kind = type(default)
    text = str(value)
    try:
        if not isinstance(value, str | int | float):
            raise ValueError
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        what = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
        raise InputError(f"{where}: {key} must be {what}, like {default!r}, not {value!r}") from None


def check_known(key, known, where):
    near = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean {near[0]}?" if near else "see --help"
    check(key in known, f"{where}: unknown key {key!r}: {hint}")


def read_config(path, script, defaults):
    """The values that a config file sets in `script` -> {key: value}. Raises InputError."""
    check(path.endswith(".py"), f"{path!r} is not a config file (.py): set variables with --key=value")
    with reported_as(f"cannot read config file {path}"), open(path, encoding="utf-8") as f:
        body = ast.parse(f.read()).body
    known = {name: declared(f"{ROOT}/{name}.py") for name in SCRIPTS}
    known[""] = [key for keys in known.values() for key in keys]  # `key = value` may be of any script
    values = {"": {}, script: {}}
    for node in body:
        if isinstance(node, ast.Expr):
            continue  # the docstring
        where = f"{path}, line {node.lineno}"
        try:
            (name,) = [target.id for target in node.targets]
            value = ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            raise InputError(f"{where}: only `key = value` with a plain value is allowed") from None
        if name in SCRIPTS:
            owner = name
            check(isinstance(value, dict), f'{where}: write {name} = {{"key": value}}')
            settings = value
        else:
            owner = ""
            settings = {name: value}
        for key, setting in settings.items():
            check_known(str(key), known[owner], where)
            if owner in values and key in defaults:
                values[owner][key] = convert(key, setting, defaults[key], where)
    return values[""] | values[script]


def parse_arguments(arguments, command, comments, defaults):
    """The command line -> {key: value}; later ones win. Raises InputError, or SystemExit(0) after --help."""
    values = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            print(f"usage: python {command} [config/file.py] [--key=value | --key value | --flag] ...\n")
            for name, comment in comments.items():
                print(f"  --{name + '=' + repr(defaults[name]):40} {comment}")
            raise SystemExit(0)
        if not argument.startswith("--"):
            values |= read_config(argument, command.removesuffix(".py"), defaults)
            continue
        key, equals, value = argument[2:].partition("=")
        check_known(key, defaults, "command line")
        if not equals:  # --key value, or a bare --flag
            following = rest[0] if rest else "--"
            if isinstance(defaults[key], bool) and following.lower() not in ("true", "false"):
                value = "true"
            else:
                is_key = re.fullmatch(r"--(\w+(=.*)?)?", following, re.DOTALL)
                check(not is_key, f"command line: --{key} needs a value")
                value = rest.pop(0)
        values[key] = convert(key, value, defaults[key], "command line")
    return values


def interrupt(signal_number, frame):
    raise KeyboardInterrupt


def run(main, variables, arguments=None):
    """Override a script's `variables` (its `globals()`) from the command line, then call `main(settings)`.

    settings is the dictionary of all resolved values. A mistake, wherever it is met, ends as one line on
    standard error and exit status 2; Ctrl-C, and SIGTERM, with which schedulers end a job, as 130.
    """
    path = variables["__file__"]
    command = os.path.basename(path)
    if variables.get("__spec__") and variables["__name__"] == "__main__":
        command = f"-m {variables['__spec__'].name}"
    comments = declared(path)
    defaults = {key: variables[key] for key in comments}
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # terminals that cannot show every letter
    if sys.stderr is None:  # closed
        sys.stderr = open(os.devnull, "w")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
    try:
        given = sys.argv[1:] if arguments is None else arguments
        variables.update(parse_arguments(given, command, comments, defaults))
        settings = {key: variables[key] for key in comments}
        for key, comment in comments.items():
            conditions = re.search(r"\[(.*)\]$", comment)
            if conditions:
                check_range(key, settings[key], conditions[1])
        if "seed" in settings:
            check_range("seed", settings["seed"], f"at least 0, at most {LARGEST_SEED}")
        return main(settings)
    except KeyboardInterrupt:
        message = "interrupted"
        status = 130
        if command not in ("probes.py", "sample.py"):
            message += ": the same command continues from what is saved"
    except Exception as error:
        message = explain(error)
        status = 2
        if message is None:
            raise
    print(f"{command}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)
