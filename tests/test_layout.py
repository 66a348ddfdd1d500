"""The code stays small, and the documentation points into it. Run: python -m pytest tests/test_layout.py"""

import ast
import glob
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

LONGEST = 200  # lines
DOCUMENTS = ("README.md", "docs/method.md", "pretrained/english/README.md", "pretrained/reviews/README.md")


def read(path):
    with open(f"{ROOT}/{path}", encoding="utf-8") as f:
        return f.read()


@pytest.mark.parametrize("path", sorted(glob.glob("plumbing/*.py", root_dir=ROOT)))
def test_a_module_of_plumbing_is_short_and_in_the_list(path):
    assert len(read(path).splitlines()) <= LONGEST
    name = os.path.basename(path).removesuffix(".py")
    assert name == "__init__" or re.search(rf"^{name}  ", read("plumbing/__init__.py"), re.MULTILINE)


@pytest.mark.parametrize("path", sorted(glob.glob("plumbing/*.py", root_dir=ROOT)))
def test_plumbing_knows_nothing_of_the_method(path):
    assert not re.search(
        r"^(from|import) (model|peers|prepare|train_\w+|probes|sample|eval)\b", read(path), re.M
    )


def definitions(path):
    """{line: the class or function defined there}; methods are Class.method."""

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                found[child.lineno] = prefix + child.name
                walk(child, f"{prefix}{child.name}.")
            else:
                walk(child, prefix)

    found = {}
    walk(ast.parse(read(path)), "")
    return found


def misplaced(text, folder=""):
    """Links [text](path#L123), relative to a folder -> those to a file or line that is not there or, where
    the text is a `name`, to another line than its definition; and how many of the links have a name.
    """
    wrong = []
    named = 0
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("#"):
            continue
        path, _, anchor = target.partition("#")
        line = anchor.removeprefix("L") if re.fullmatch(r"L\d+", anchor) else ""
        path = os.path.normpath(os.path.join(folder, path))
        if not os.path.exists(f"{ROOT}/{path}"):
            wrong.append(f"[{label}]({target})")
            continue
        if not line:
            continue
        name = re.fullmatch(r"`([\w.]+)(?<!\.py)`", label)
        if not 1 <= int(line) <= len(read(path).splitlines()):
            wrong.append(f"[{label}]({target})")
        elif name and path.endswith(".py"):
            named += 1
            there = definitions(path).get(int(line), "")
            if there != name[1] and not there.endswith(f".{name[1]}"):
                wrong.append(f"[{label}]({target})")
    return wrong, named


@pytest.mark.parametrize("path", DOCUMENTS)
def test_links_point_at_files_and_definitions(path):
    wrong, named = misplaced(read(path), os.path.dirname(path))
    assert not wrong
    assert named >= (20 if path == "docs/method.md" else 0)


def test_a_link_to_another_line_is_noticed():
    """The check of links finds what is wrong, and nothing else."""
    lines = {name: line for line, name in definitions("model.py").items()}
    right = [f"[`{name}`](model.py#L{lines[name]})" for name in ("predict", "DGLM", "GPT.generate")]
    right += [f"[`generate`](model.py#L{lines['GPT.generate']})", "[the loop](train_decoder.py#L1)"]
    right += ["[`model.py`](model.py#L1)", "[the model](model.py)", "[elsewhere](https://example.org/x)"]
    wrong = [f"[`predict`](model.py#L{lines['predict'] + 1})", f"[`GPT`](model.py#L{lines['DGLM']})"]
    wrong += ["[here](model.py#L99999)", "[there](nowhere.py#L1)", "[nothing](nothing.md)"]
    assert misplaced(" ".join(right + wrong)) == (wrong, 6)


def test_an_older_python_is_one_line(tmp_path):
    """As in Python 3.10, which imports everything up to there."""
    (tmp_path / "old.py").write_text("import sys\nsys.version_info = (3, 10)\nimport plumbing.config\n")
    env = os.environ | {"PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, tmp_path / "old.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "needs Python 3.11 or newer" in done.stderr
