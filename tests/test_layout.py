"""The code stays small, and README points into it. Run: python -m pytest tests/test_layout.py"""

import ast
import glob
import os
import re

import pytest
from conftest import ROOT

LONGEST = 200  # lines


def read(path):
    with open(f"{ROOT}/{path}", encoding="utf-8") as f:
        return f.read()


@pytest.mark.parametrize("path", sorted(glob.glob("plumbing/*.py", root_dir=ROOT)))
def test_a_module_of_plumbing_is_short(path):
    assert len(read(path).splitlines()) <= LONGEST


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


def misplaced(text):
    """Links [text](file#L123) -> those that point at a line that is not there or, where the text is a `name`,
    at another line than its definition; and how many of the links have a name.
    """
    wrong, named = [], 0
    for label, path, line in re.findall(r"\[([^\]]*)\]\(([^)#\s]+)#L(\d+)\)", text):
        link, line, name = (
            f"[{label}]({path}#L{line})",
            int(line),
            re.fullmatch(r"`([\w.]+)(?<!\.py)`", label),
        )
        if not os.path.isfile(f"{ROOT}/{path}") or not 1 <= line <= len(read(path).splitlines()):
            wrong.append(link)
        elif name and path.endswith(".py"):
            named += 1
            there = definitions(path).get(line, "")
            if there != name[1] and not there.endswith(f".{name[1]}"):
                wrong.append(link)
    return wrong, named


def test_links_of_the_readme_point_at_definitions():
    wrong, named = misplaced(read("README.md"))
    assert not wrong
    assert named >= 15


def test_a_link_to_another_line_is_noticed():
    """The check of README's links finds what is wrong, and nothing else."""
    lines = {name: line for line, name in definitions("model.py").items()}
    right = [f"[`{name}`](model.py#L{lines[name]})" for name in ("predict", "DGLM", "GPT.generate")]
    right += [f"[`generate`](model.py#L{lines['GPT.generate']})", "[the loop](train_decoder.py#L1)"]
    right.append("[`model.py`](model.py#L1)")
    wrong = [f"[`predict`](model.py#L{lines['predict'] + 1})", f"[`GPT`](model.py#L{lines['DGLM']})"]
    wrong += ["[here](model.py#L99999)", "[there](nowhere.py#L1)"]
    assert misplaced(" ".join(right + wrong)) == (wrong, 6)
