"""Which versions go together."""

import sys

import pytest

from shmdist import __version__
from shmdist.transport.versions import Versions, conflict, own_numpy, own_versions

MINE = Versions("1.2.3", "3.11.7", "2.1.0")


@pytest.mark.parametrize(
    "theirs",
    [
        MINE,
        MINE._replace(python="3.11.12"),
        MINE._replace(numpy="2.4.1"),
        MINE._replace(numpy=None),
    ],
)
def test_these_go_together(theirs):
    assert conflict(MINE, theirs, "worker 2") is None
    assert conflict(theirs, MINE, "worker 2") is None


@pytest.mark.parametrize(
    ("theirs", "both"),
    [
        (MINE._replace(python="3.12.1"), ("Python 3.11.7", "Python 3.12.1", "exename")),
        (MINE._replace(python="3.1.1"), ("Python 3.11.7", "Python 3.1.1")),
        (MINE._replace(shmdist="1.2.4"), ("shmdist 1.2.3", "shmdist 1.2.4", "install")),
        (MINE._replace(numpy="1.26.4"), ("numpy 2.1.0", "numpy 1.26.4", "install")),
        (MINE._replace(numpy="20.1"), ("numpy 2.1.0", "numpy 20.1")),
    ],
)
def test_these_do_not(theirs, both):
    text = conflict(MINE, theirs, "worker 2 on node7")
    assert all(part in text for part in (*both, "process 1", "worker 2 on node7"))
    assert "\n" not in text
    assert conflict(theirs, MINE, "worker 2 on node7") is not None


def test_own():
    import numpy

    assert own_versions(numpy=True) == (__version__, sys.version.split()[0], numpy.__version__)
    assert own_versions(numpy=False).numpy is None


def test_numpy_is_not_imported_to_find_its_version(monkeypatch):
    import numpy

    monkeypatch.delitem(sys.modules, "numpy")
    assert own_numpy() == numpy.__version__
    assert "numpy" not in sys.modules


def test_no_numpy(monkeypatch):
    import importlib.metadata

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.delitem(sys.modules, "numpy")
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert own_numpy() is None
