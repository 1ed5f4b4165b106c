"""Other versions of Python, where the machine has them: equal ones make a cluster, others say why not."""

import glob
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration import pairs, sshd
from tests.integration.helpers import ROOT, Script

PACKAGES = ("numpy", "cloudpickle", "paramiko")
MINE = sys.version_info[:2]
OTHERS = [f"3.{minor}" for minor in (11, 12, 13) if (3, minor) != MINE]


def find(version):
    """Return an interpreter of a minor version that this machine has; None without one."""
    pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    found = [shutil.which(f"python{version}"), *glob.glob(f"{pyenv}/versions/{version}.*/bin/python")]
    for path in found:
        if (
            path
            and run([path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).stdout
            == f"{version}\n"
        ):
            return path  # it was run, for it may be pyenv's shim, which leads nowhere
    return None


def run(command):
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def prepare(version, folder):
    """Make an environment with what shmdist needs, or keep the one that is there; return why not, if so."""
    base = find(version)
    if base is None:
        return f"this machine has no Python {version}"
    python = folder / "bin" / "python"
    if run([python, "-c", f"import {', '.join(PACKAGES)}"] if python.exists() else ["false"]).returncode == 0:
        return None
    for command in (
        [base, "-m", "venv", "--without-pip", "--clear", folder],
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *PACKAGES],
    ):
        done = run(command)
        if done.returncode != 0:
            last = (done.stderr.strip() or "no reason given").splitlines()[-1]
            return f"no environment for Python {version} could be made: {last}"
    return None


@pytest.fixture(scope="module")
def environments(request):
    """The folders of the environments, which stay for the next run; or why there is none."""
    folders = {version: request.config.cache.mkdir(f"python{version}") for version in OTHERS}
    with ThreadPoolExecutor() as executor:
        reasons = list(executor.map(prepare, OTHERS, folders.values()))
    return {
        version: reason or str(folder / "bin" / "python")
        for (version, folder), reason in zip(folders.items(), reasons, strict=True)
    }


@pytest.fixture
def interpreter(environments, version):
    found = environments[version]
    if not os.path.isabs(found):
        pytest.skip(found)
    return found


@pytest.fixture(scope="module")
def ssh(request):
    """Parameters of a machine to log in to, where there can be one."""
    if sshd.why_not() is not None:
        return {"machine": None}
    server = request.getfixturevalue("sshd")
    params = server.params()
    del params["exename"]
    return {"machine": server.text, "ssh": params}


def job(python, name, params):
    """Have an interpreter do one of the jobs of `pairs`; it must say nothing."""
    program = Script(command=[python, "-m", pairs.__name__, name, json.dumps(params)], cwd=ROOT)
    assert program.end(60).clean() == ""


@pytest.mark.parametrize("version", OTHERS)
def test_equal_pairs(interpreter, ssh, version):
    job(interpreter, "equal", ssh)


def full_version(python):
    return run([python, "-c", "import sys; print(sys.version.split()[0])"]).stdout.strip()


@pytest.mark.parametrize("version", OTHERS)
def test_mixed_pairs(interpreter, environments, ssh, version):
    """In both directions: this test's interpreter is one of the others' others."""
    others = {
        python: full_version(python)
        for python in [sys.executable, *environments.values()]
        if os.path.isabs(python) and python != interpreter
    }
    job(interpreter, "mixed", {**ssh, "others": others})
    job(sys.executable, "mixed", {**ssh, "others": {interpreter: full_version(interpreter)}})
