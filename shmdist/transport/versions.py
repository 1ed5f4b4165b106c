"""Which versions of shmdist, Python and numpy go together.

Functions travel as bytecode, which every minor version of Python has of its own; messages are
those of one version of shmdist; and what one major version of numpy pickles another may not be
able to read.  A worker that differs is refused when it joins, before it could fail in the
middle of a program.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from shmdist._version import __version__


class Versions(NamedTuple):
    """What a process runs with; `numpy` is None where it is not installed, or nobody looked."""

    shmdist: str
    python: str
    numpy: str | None = None


def own_versions(*, numpy: bool) -> Versions:
    """Return this process's; numpy's only when asked, for finding it takes a while."""
    return Versions(__version__, sys.version.split()[0], own_numpy() if numpy else None)


def own_numpy() -> str | None:
    """Return the version of numpy that is installed here; it is not imported for that."""
    loaded = getattr(sys.modules.get("numpy"), "__version__", None)
    if loaded is not None:
        return str(loaded)
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("numpy")
    except PackageNotFoundError:
        return None


def conflict(mine: Versions, theirs: Versions, where: str) -> str | None:
    """Return why two processes do not go together, in one sentence that names both sides.

    Parameters
    ----------
    mine, theirs : Versions
        Of process 1 and of a worker; the worker's are proven to be what it says, not to be true.
    where : str
        Who and where the worker is.

    Examples
    --------
    >>> mine, theirs = Versions("1.0", "3.11.7"), Versions("1.0", "3.12.1")
    >>> print(conflict(mine, theirs, "worker 2 on node7"))
    process 1 runs Python 3.11.7 and worker 2 on node7 runs Python 3.12.1: functions cannot be sent between \
minor versions; name an interpreter of Python 3.11 with exename=
    >>> conflict(mine, mine._replace(python="3.11.9"), "worker 2 on node7") is None
    True
    """
    if mine.shmdist != theirs.shmdist:
        return (
            f"process 1 runs shmdist {mine.shmdist} and {where} runs shmdist {theirs.shmdist}: "
            "install the same version on both"
        )
    ours = _leading(mine.python, 2)
    if ours != _leading(theirs.python, 2):
        return (
            f"process 1 runs Python {mine.python} and {where} runs Python {theirs.python}: functions cannot "
            f"be sent between minor versions; name an interpreter of Python {ours} with exename="
        )
    if mine.numpy and theirs.numpy and _leading(mine.numpy, 1) != _leading(theirs.numpy, 1):
        return (
            f"process 1 has numpy {mine.numpy} and {where} has numpy {theirs.numpy}: arrays and dtypes of "
            f"one major version may not be readable to another; "
            f"install numpy {_leading(mine.numpy, 1)} on both"
        )
    return None


def _leading(version: str, parts: int) -> str:
    return ".".join(version.split(".")[:parts])


__all__ = ["Versions", "conflict", "own_numpy", "own_versions"]
