"""Workers whose versions differ from process 1's: refused when they join, with a sentence that names both."""

import subprocess
import sys

import numpy as np
import pytest

import shmdist as sd
from shmdist.transport import handshake, versions
from tests.integration.helpers import within


def refused(*texts):
    before = sd.procs()
    with within(20), pytest.raises(sd.LaunchWorkerError) as caught:
        sd.addprocs(1)
    first = str(caught.value).splitlines()[0]
    assert all(text in first for text in texts), first
    assert caught.value.phase == "versions"
    assert sd.procs() == before


def with_fields(monkeypatch, **changes):
    """Have the worker seem to be another version: what it says is what process 1 reads."""
    know = handshake._Machine._know_peer

    def know_otherwise(self):
        know(self)
        for name, value in changes.items():
            setattr(self, name, value)

    monkeypatch.setattr(handshake._Machine, "_know_peer", know_otherwise)


def test_another_minor_version_of_python(monkeypatch):
    with_fields(monkeypatch, peer_python="3.99.1")
    refused(f"Python {sys.version.split()[0]}", "Python 3.99.1", "worker", "process 1", "exename=")


def test_another_patch_of_python_is_none(monkeypatch, fresh):
    major, minor, _ = sys.version_info[:3]
    with_fields(monkeypatch, peer_python=f"{major}.{minor}.99")
    [pid] = fresh()
    assert sd.remotecall_fetch(abs, pid, -1) == 1


def test_another_version_of_shmdist(monkeypatch):
    with_fields(monkeypatch, peer_version="0.0.1")
    refused("shmdist 0.0.1", f"shmdist {sd.__version__}", "install")


def test_another_major_version_of_numpy(monkeypatch, tmp_path):
    """A real one, as far as the worker can tell: its interpreter finds the metadata of another numpy."""
    info = tmp_path / "numpy-1.26.4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.26.4\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(versions, "own_numpy", lambda: "2.1.0")
    monkeypatch.setattr(sys, "prefix", "/elsewhere")  # so that the worker looks
    refused("process 1 has numpy 2.1.0", "has numpy 1.26.4", "install")


def interpreter(tmp_path, body):
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_an_interpreter_that_is_too_old(tmp_path):
    """It does not know our flags, and is asked for its version when it has ended."""
    old = interpreter(tmp_path, '[ "$1" = -c ] && echo 2.7.18 || { echo "Unknown option: -P" >&2; exit 2; }')
    with within(20), pytest.raises(sd.LaunchWorkerError) as caught:
        sd.addprocs(2, exename=old)
    assert f"Python {sys.version.split()[0]}" in str(caught.value) and "Python 2.7.18" in str(caught.value)
    assert (caught.value.phase, caught.value.exitcode) == ("versions", 2)
    assert caught.value.stderr_tail == ("Unknown option: -P",)


def test_an_interpreter_that_is_none(tmp_path):
    none = interpreter(tmp_path, "echo what? >&2; exit 3")
    with within(20), pytest.raises(sd.LaunchWorkerError, match="ended before it was up") as caught:
        sd.addprocs(1, exename=none)
    assert (caught.value.phase, caught.value.exitcode) == ("start", 3)


def test_another_interpreter_of_the_same_version_keeps_its_own_modules(tmp_path, fresh):
    """What it does not have it gets from process 1's path."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "own")], check=True)
    site = next((tmp_path / "own").glob("lib/python*/site-packages"))
    (site / "only_there.py").write_text("value = 42\n")
    (site / "operator.py").write_text("raise ImportError('the standard library comes first')\n")
    [pid] = fresh(exename=tmp_path / "own" / "bin" / "python")
    assert sd.remotecall_eval("__main__", pid, "import operator, only_there; only_there.value") == 42
    assert np.array_equal(sd.remotecall_fetch(lambda x: x + 1, pid, np.zeros(3)), np.ones(3))
