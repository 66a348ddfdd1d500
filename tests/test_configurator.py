"""Configuration and safe files. Run: python -m pytest tests/test_configurator.py"""

import os
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configurator import (
    InputError,
    alone,
    declared,
    parse_arguments,
    read_config,
    read_json_lines,
    write_file,
)

SETTINGS = {
    "batch_size": (64, "rows"),
    "learning_rate": (1e-3, "at its peak"),
    "compile": (False, ""),
    "prefix": ("", "text"),
}


def parse(*arguments):
    return parse_arguments(arguments, "sample", SETTINGS)


def test_values_take_the_type_of_their_default():
    got = parse("--batch_size=8", "--learning_rate", "1", "--compile", "--prefix", "--odd text=1")
    assert got == {"batch_size": 8, "learning_rate": 1.0, "compile": True, "prefix": "--odd text=1"}
    assert [type(v) for v in got.values()] == [int, float, bool, str]


def test_booleans_can_be_switched_off_and_later_values_win():
    assert parse("--compile", "--compile=false", "--batch_size=1", "--batch_size=2") == {
        "compile": False,
        "batch_size": 2,
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batchsize=8"], "unknown key 'batchsize': did you mean batch_size?"),
        (["--zzz"], "unknown key 'zzz': see --help"),
        (["--batch_size=1.5"], "batch_size must be a whole number"),
        (["--learning_rate=fast"], "learning_rate must be a number"),
        (["--learning_rate=nan"], "learning_rate must be a number"),
        (["--batch_size"], "--batch_size needs a value"),
        (["--prefix", "--batchsize=8"], "--prefix needs a value"),
        (["--batch_size", "9" * 20], "batch_size must be a whole number"),
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


def test_help_prints_every_variable_with_default_and_comment(capsys):
    with pytest.raises(SystemExit) as e:
        parse("--help")
    assert not e.value.code
    text = capsys.readouterr().out
    assert all(
        f"--{key}={default!r}" in text and comment in text for key, (default, comment) in SETTINGS.items()
    )


def config(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return str(path)


def test_a_config_file_sets_shared_values_and_those_of_its_script(tmp_path):
    path = config(
        tmp_path, '"""mine"""\ndataset = "toy"\nsteps = 7\nsample = {"top_p": 1}\nprobes = {"name": "x"}\n'
    )
    settings = {"steps": (20, ""), "top_p": (0.9, "")}
    assert read_config(path, "sample", settings) == {"steps": 7, "top_p": 1.0}


@pytest.mark.parametrize(
    "text, message",
    [
        ("steps = __import__('os').getpid()", "only `key = value`"),
        ("import os", "only `key = value`"),
        ("stepz = 3", "unknown key 'stepz'"),
        ("sample = {'stepz': 3}", "did you mean steps?"),
        ("sample = 3", "sample is a script"),
        ("steps = 'many'", "steps must be a whole number"),
        ("steps =", "line 1"),
        ("steps = seed = 3", "only `key = value`"),
        ("steps = " + "-" * 100_000 + "1", "line 1"),
    ],
)
def test_a_bad_config_file_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(InputError) as e:
        read_config(config(tmp_path, text), "sample", {"steps": (20, "")})
    assert message in str(e.value) and "mine.py, line 1" in str(e.value)


def test_every_script_documents_each_of_its_variables():
    from configurator import SCRIPTS

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for script in SCRIPTS:
        for key, (_, comment) in declared(f"{root}/{script}.py").items():
            assert comment, f"{script}.{key} has no comment"


def test_presets_name_only_variables_that_exist():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for preset in os.listdir(f"{root}/config"):
        if preset.endswith(".py"):
            read_config(f"{root}/config/{preset}", "sample", declared(f"{root}/sample.py"))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_file(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # as a full disk would
    try:
        with pytest.raises(InputError, match="cannot write"):
            write_file(path, "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_link_is_written_through_and_what_is_no_file_stays(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_file(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="it is not a file"):
        write_file(tmp_path / "pipe", "text")


def test_two_runs_do_not_write_the_same(tmp_path):
    with alone(f"{tmp_path}/new/decoder"):
        with pytest.raises(InputError, match="another run is at work on"), alone(f"{tmp_path}/new/decoder"):
            pass
        with alone(f"{tmp_path}/new/diffusion"):
            pass
    with alone(f"{tmp_path}/new/decoder"):
        pass
    assert not os.listdir(tmp_path / "new")


@given(st.binary(max_size=200))
def test_no_bytes_make_the_json_lines_reader_crash(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_bytes(content)
    try:
        assert all(isinstance(row, dict) for row in read_json_lines(str(path)))
    except InputError as e:
        assert "rows.jsonl" in str(e)
