"""What the tests share: the toy's path, run once beside the tests that do not need it; running, killing."""

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

os.environ["OMP_NUM_THREADS"] = "1"  # scripts run side by side, a core each; the number decides the last bits
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from configurator import run  # noqa: E402

# a busy machine is no failure: hypothesis has no deadline
settings.register_profile("nanodglm", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("nanodglm")

SHORT = "config/toy.py --batch_size=16 --max_iters=20 --eval_interval=10 --eval_rows=32"
TRAININGS = {"decoder": f"train_decoder.py {SHORT} --muon=0.02", "diffusion": f"train_diffusion.py {SHORT}"}


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=0, help="how often tests/test_kills.py kills each script")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "project" in item.fixturenames)  # last, so that the toy is trained by then


def python(command, cwd, **env):
    """`python COMMAND` in the folder; its standard output."""
    arguments = [sys.executable, *(command.split() if isinstance(command, str) else command)]
    done = subprocess.run(arguments, cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# several commands, one after the other, in one process: to load the libraries takes longer than the work
IN_ONE = """
import runpy, sys
sys.path.insert(0, "")
for command in sys.argv[1:]:
    sys.argv = command.split()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        print("exit status", e.code)
"""


def side_by_side(commands, cwd, **env):
    """`python COMMAND` of each, two at a time; their standard outputs."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda command: python(command, cwd, **env), commands))


def digest(folder, ignore=()):
    """{path: SHA-256} of all files below a folder, but for those that end so."""
    files = [f for f in glob.glob(f"{folder}/**", recursive=True) if os.path.isfile(f)]
    files = [f for f in files if not f.endswith(tuple(ignore))]
    return {os.path.relpath(f, folder): hashlib.sha256(open(f, "rb").read()).hexdigest() for f in files}


def kill_when(command, cwd, condition):
    """Starts `python COMMAND`, waits until the condition holds, and kills it as a power cut would."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *command.split()], cwd=cwd, **silent)
    while process.poll() is None and not condition():
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def load_script(project, script):
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), project / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(monkeypatch, capsys):
    """call(project, command): a script in this process, whose libraries are loaded already -> its exit
    status, the lines of its standard output, the last line of standard error.
    """

    def call(project, command):
        monkeypatch.chdir(project)
        script, *arguments = command.split()
        module, status = load_script(project, script), 0
        try:
            run(module.main, vars(module), arguments)
        except SystemExit as e:
            status = e.code
        said = capsys.readouterr()
        return status, said.out.splitlines(), (said.err.splitlines() or [""])[-1]

    return call


def copy_scripts(folder):
    shutil.copytree(f"{ROOT}/config", folder / "config")
    for path in glob.glob(f"{ROOT}/*.py"):
        shutil.copy(path, folder)
    return folder


def make_project(folder):
    """The toy's whole path, with fewer steps than config/toy.py takes, of fewer rows."""
    copy_scripts(folder)
    python("prepare.py config/toy.py --max_documents=1200", folder)
    short = "config/toy.py --batch_size=32 --warmup_iters=50 --eval_rows=64 --eval_interval=200 --max_iters"
    stages = f"train_decoder.py {short}=200", f"train_diffusion.py {short}=150", "probes.py config/toy.py"
    side_by_side(stages, folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def toy(request, tmp_path_factory):
    """Starts on the toy at once, if any test needs it."""
    if any("project" in item.fixturenames for item in request.session.items):
        return ThreadPoolExecutor(1).submit(make_project, tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def project(toy):
    return toy.result()


@pytest.fixture(scope="session")
def undisturbed(project):
    """Two short trainings, never stopped, in out/whole."""
    side_by_side([f"{command} --out_dir=out/whole" for command in TRAININGS.values()], project)
