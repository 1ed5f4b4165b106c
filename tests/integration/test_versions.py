"""Workers whose versions differ from process 1's: refused when they join, with a sentence that names both."""

import sys

import pytest

import shmdist as sd
from shmdist.wire import handshake, versions
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
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(versions, "own_numpy", lambda: "2.1.0")
    monkeypatch.setattr(sys, "prefix", "/elsewhere")  # so that the worker looks
    refused("process 1 has numpy 2.1.0", "has numpy 1.26.4", "install")
