"""What the tests share: the toy's path, run once, and ways to run and to kill a script."""

import glob
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import settings

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
# one thread pool's worth of noise is no failure: hypothesis has no deadline
settings.register_profile("nanodglm", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("nanodglm")

from configurator import run  # noqa: E402
from prepare import OPENING, pick_one  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=0, help="how often tests/test_kills.py kills each script")


def python(command, cwd, **kwargs):
    """`python COMMAND` in the folder; its standard output."""
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=cwd, capture_output=True, text=True, **kwargs
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def side_by_side(commands, cwd, **env):
    """`python COMMAND` of each, two at a time, on a core each; their standard outputs."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda command: python(command, cwd, env=env), commands))


def digest(folder):
    """{path: SHA-256} of all files below a folder."""
    files = [f for f in glob.glob(f"{folder}/**", recursive=True) if os.path.isfile(f)]
    return {os.path.relpath(f, folder): hashlib.sha256(open(f, "rb").read()).hexdigest() for f in files}


def kill_when(arguments, cwd, condition):
    """Starts python, waits until the condition holds, and kills it as a power cut would."""
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None and not condition():
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def call(project, command, capsys, monkeypatch):
    """A script's main with these arguments, in this process -> exit status, the last line of standard
    error.
    """
    monkeypatch.chdir(project)
    script, *arguments = command.split()
    spec = importlib.util.spec_from_file_location("script", project / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as e:
        run(module.main, vars(module), arguments)
    return e.value.code, capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A copy of the project in which the toy's whole path has run, with fewer steps than config/toy.py
    takes, of fewer rows.
    """
    folder = tmp_path_factory.mktemp("project")
    for name in glob.glob(f"{ROOT}/*.py"):
        shutil.copy(name, folder)
    shutil.copytree(f"{ROOT}/config", folder / "config")
    python("prepare.py config/toy.py --max_documents=1200", folder)
    short = "config/toy.py --batch_size=32 --warmup_iters=50 --eval_rows=64 --eval_interval=200 --max_iters"
    stages = f"train_decoder.py {short}=200", f"train_diffusion.py {short}=150", "probes.py config/toy.py"
    side_by_side(stages, folder)
    with open(folder / "prefixes.txt", "w") as f:
        f.writelines(pick_one(OPENING, np.random.default_rng(i)) + ".\n" for i in range(8))
    return folder
