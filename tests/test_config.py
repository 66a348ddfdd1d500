"""Configuration. Run: python -m pytest tests/test_config.py"""

import glob
import pathlib

import pytest
from conftest import ROOT, load_script
from hypothesis import given
from hypothesis import strategies as st

from plumbing.config import SCRIPTS, declared, parse_arguments, read_config, run
from plumbing.errors import InputError

DEFAULTS = {"batch_size": 64, "learning_rate": 1e-3, "compile": False, "prefix": ""}


def parse(*arguments):
    return parse_arguments(arguments, "sample.py", dict.fromkeys(DEFAULTS, ""), DEFAULTS)


def test_values_take_the_type_of_their_default():
    got = parse("--batch_size=8", "--learning_rate", "1", "--compile", "--prefix", "--odd text=1")
    assert got == {"batch_size": 8, "learning_rate": 1.0, "compile": True, "prefix": "--odd text=1"}
    assert [type(v) for v in got.values()] == [int, float, bool, str]


def test_booleans_can_be_switched_off_and_later_values_win():
    got = parse("--compile", "--compile=false", "--batch_size=1", "--batch_size=2")
    assert got == {"compile": False, "batch_size": 2}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batchsize=8"], "unknown key 'batchsize': did you mean batch_size?"),
        (["--zzz"], "unknown key 'zzz': see --help"),
        (["--batch_size=1.5"], "batch_size must be a whole number"),
        (["--learning_rate=fast"], "learning_rate must be a number"),
        (["--batch_size"], "--batch_size needs a value"),
        (["--prefix", "--batchsize=8"], "--prefix needs a value"),
        (["no_such_config.py"], "cannot read config file no_such_config.py"),
    ],
)
def test_a_bad_command_line_is_named(arguments, message):
    with pytest.raises(InputError) as e:
        parse(*arguments)
    assert message in str(e.value)


@given(st.lists(st.text()))
def test_no_command_line_is_a_traceback(arguments):
    try:
        parse(*arguments)
    except (InputError, SystemExit):
        pass


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_prints_every_variable_of_a_script_with_its_default_and_comment(script, capsys):
    module = load_script(pathlib.Path(ROOT), f"{script}.py")
    with pytest.raises(SystemExit) as e:
        run(module.main, vars(module), ["--help"])
    said = capsys.readouterr().out
    comments = declared(f"{ROOT}/{script}.py")
    assert not e.value.code and comments
    for key, comment in comments.items():
        assert comment and comment in said and f"--{key}={getattr(module, key)!r}" in said


def config(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return str(path)


def test_a_config_file_sets_shared_values_and_those_of_its_script(tmp_path):
    text = (
        '"""mine"""\nsample = {"top_p": 1}\ndataset = "toy"\nsteps = 7\ntop_p = 0.5\nprobes = {"name": "x"}\n'
    )
    found = read_config(config(tmp_path, text), "sample", {"steps": 20, "top_p": 0.9, "name": ""})
    assert found == {"steps": 7, "top_p": 1.0}


@pytest.mark.parametrize(
    "text, message",
    [
        ("steps = __import__('os').getpid()", "only `key = value`"),
        ("stepz = 3", "unknown key 'stepz'"),
        ("sample = 3", 'write sample = {"key": value}'),
        ("steps = 'many'", "steps must be a whole number"),
        ("steps =", "line 1"),
        ("steps = seed = 3", "only `key = value`"),
    ],
)
def test_a_bad_config_file_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(InputError) as e:
        read_config(config(tmp_path, text), "sample", {"steps": 20})
    assert message in str(e.value) and "mine.py" in str(e.value) and "line 1" in str(e.value)


def test_presets_name_only_variables_that_exist():
    for preset in glob.glob(f"{ROOT}/config/*.py"):
        read_config(preset, "sample", {})
