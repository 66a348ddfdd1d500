"""What the tests share: a trained toy, ways to run the scripts, a kill."""

import contextlib
import glob
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

os.environ["OMP_NUM_THREADS"] = "1"  # the number of threads decides the last bits of a sum
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from plumbing.config import run  # noqa: E402

# no deadline: a slow example on a busy machine is not a failure
settings.register_profile("nanodglm", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("nanodglm")

# the toy in a smaller size: python train_decoder.py config/toy.py config/tiny.py
TINY = """
prepare = {"max_documents": 600, "val_every": 10}
train_decoder = {
    "n_layer": 2,
    "n_embd": 64,
    "generator_width": 64,
    "generator_layers": 1,
    "batch_size": 32,
    "learning_rate": 4e-3,
    "warmup_iters": 20,
    "max_iters": 450,
    "eval_interval": 450,
    "eval_rows": 64,
}
train_diffusion = {
    "width": 64,
    "layers": 2,
    "diffusion_tokens": 8,
    "batch_size": 64,
    "learning_rate": 5e-3,
    "warmup_iters": 20,
    "max_iters": 400,
    "eval_interval": 400,
    "eval_rows": 64,
    "ema_decay": 0.98,
}
"""
TOY = "config/toy.py config/tiny.py"
SHORT = f"{TOY} --warmup_iters=100 --batch_size=16 --max_iters=20 --eval_interval=10 --eval_rows=32"
TRAININGS = {name: f"train_{name}.py {SHORT}" for name in ("decoder", "diffusion")}


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=0, help="how often tests/test_kills.py kills each script")
    parser.addoption("--fp32", action="store_true", help="as on a machine without bf16")


NO_BF16 = "import torch\n\ntorch.cpu._is_avx512_bf16_supported = lambda: False\n"


def pytest_configure(config):
    """With --fp32, every process that a test starts imports this first, and so does this one."""
    if config.getoption("--fp32"):
        folder = tempfile.mkdtemp()
        with open(f"{folder}/sitecustomize.py", "w") as f:
            f.write(NO_BF16)
        os.environ["PYTHONPATH"] = folder
        exec(NO_BF16)


# ---- running ----


def python(command, cwd, **env):
    """`python COMMAND` in the folder; its standard output."""
    arguments = [sys.executable, *(command.split() if isinstance(command, str) else command)]
    done = subprocess.run(arguments, cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# several commands, one after the other, in one process: loading the libraries takes longer than the work
IN_ONE = """
import runpy, sys
sys.path.insert(0, "")
for command in sys.argv[1:]:
    sys.argv = command.split()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        print("exit status", e.code, "of", command, file=sys.stderr)
"""


def in_one(commands, cwd, **env):
    """`python COMMAND` of each, in one process; their standard output and standard error."""
    arguments = [sys.executable, "-c", IN_ONE, *commands]
    done = subprocess.run(arguments, cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    return done.stdout, done.stderr


def load_script(project, script):
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), project / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_here(project, command, **replaced):
    """A script in this process, where the libraries are loaded already; some of its names may be replaced.
    A mistake in the command is a SystemExit.
    """
    script, *arguments = command.split()
    with contextlib.chdir(project):
        module = load_script(project, script)
        vars(module).update(replaced)
        run(module.main, vars(module), arguments)


@pytest.fixture
def call(capsys):
    """call(project, command): a script in this process -> its exit status, the lines of its standard output,
    the last line of standard error.
    """

    def call(project, command):
        status = 0
        try:
            run_here(project, command)
        except SystemExit as e:
            status = e.code
        said = capsys.readouterr()
        return status, said.out.splitlines(), (said.err.splitlines() or [""])[-1]

    return call


def kill_when(command, cwd, condition):
    """Starts `python COMMAND`, waits until the condition holds, and kills it as a power cut would."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *command.split()], cwd=cwd, **silent)
    while process.poll() is None and not condition():
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def digest(folder, ignore=()):
    """{path: SHA-256} of all files below a folder, except those with one of the endings to ignore."""
    files = [f for f in glob.glob(f"{folder}/**", recursive=True) if os.path.isfile(f)]
    files = [f for f in files if not f.endswith(tuple(ignore))]
    return {os.path.relpath(f, folder): hashlib.sha256(open(f, "rb").read()).hexdigest() for f in files}


# ---- damage ----


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_the_tail(path):
    os.truncate(path, path.stat().st_size // 2)


# ---- projects ----


def copy_scripts(folder):
    for package in ("config", "plumbing"):
        shutil.copytree(f"{ROOT}/{package}", folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in glob.glob(f"{ROOT}/*.py"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """The toy's whole path, shortened; the probes too learn from fewer rows."""
    folder = copy_scripts(tmp_path_factory.mktemp("project"))
    (folder / "config/tiny.py").write_text(TINY)
    run_here(folder, f"prepare.py {TOY}")
    for path in (folder / "data/toy").glob("*.jsonl"):
        path.write_text("".join(path.open().readlines()[:300]))
    for script in ("train_decoder", "train_diffusion", "probes"):
        run_here(folder, f"{script}.py {TOY}")
    return folder


@pytest.fixture(scope="session")
def undisturbed(project):
    """Two short trainings, never stopped, in out/whole."""
    for command in TRAININGS.values():
        run_here(project, f"{command} --out_dir=out/whole")
