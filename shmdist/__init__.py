"""Julia's Distributed for Python: functions, data and loops on worker processes.

A tour by theme.

Processes
    ``addprocs(4)`` starts workers on this host, ``addprocs(["host", ("me@host", 4)])`` on others by SSH;
    ``rmprocs`` removes them, and so does the end of ``with addprocs(4) as pids:``. ``workers``, ``procs``,
    ``nworkers`` and ``nprocs`` tell who is there, ``myid`` who one is: 1 is the program itself. With no
    workers all of what follows runs in the program's own process.

Calls
    ``remotecall_fetch(f, pid, *args)`` runs a function on a process and returns its value, ``remotecall`` a
    Future at once. ``remote_do`` forgets the value; ``spawn`` chooses the worker. Lambdas, closures and
    functions of a script or notebook just work. ``everywhere`` runs code, or defines a function or class,
    on all processes. ``interrupt`` ends the calls that run on a worker.

Futures and channels
    A ``Future`` is a value on some process, there or still to come: ``fetch``, ``wait``, ``isready``,
    ``cancel``, ``await``. A ``RemoteChannel`` is a queue that all processes can use: ``put``, ``take``.
    ``fetch`` and ``wait`` take lists of them, too. What waits takes ``timeout=`` in seconds.

Pools, maps and loops
    ``pmap(f, xs)`` is a parallel ``map``, ``pgenerate`` one that yields results as they come, and
    ``@distributed`` a parallel ``for`` loop with a reduction. ``WorkerPool`` and ``CachingPool`` say which
    workers are used.

Local tasks
    ``async_(f, *args)`` runs a function on a thread; ``with sync():`` waits for all that is begun inside.

Arrays
    An array that is sent is a value: who gets it has his own, and on the same host that costs one copy.
    An array of ``shared.zeros``, ``shared.array`` and so on is one memory that all processes of the host see.

Errors
    What a call raised is raised where its value is asked for, as its own type and as ``RemoteException``,
    whose text has the traceback from there. A worker that dies is a ``ProcessExitedException`` to whoever
    waits for it; what cannot be sent, a ``SerializationError``. All are under ``ShmdistError``.

Managers
    ``LocalManager`` and ``SSHManager`` start workers; a ``ClusterManager`` of your own does so elsewhere.

Examples
--------
>>> import operator
>>> import numpy as np
>>> import shmdist as sd
>>> with sd.addprocs(2) as pids:
...     norm = sd.remotecall(np.linalg.norm, pids[0], np.ones(4))
...     squares = sd.pmap(lambda x: x * x, range(5))
...     total = sd.distributed(operator.add)(lambda i: i)(range(101))
...     print(norm.fetch(), squares, total)
2.0 [0, 1, 4, 9, 16] 5050

``help(shmdist.pmap)`` and the like tell all of one function; ``python -m shmdist -p 4 script.py`` runs a
script with workers.
"""

import sys
from typing import TYPE_CHECKING, Any

from shmdist._version import __version__ as __version__

if TYPE_CHECKING or sys.orig_argv[-3:] != ["-m", "shmdist", "worker"]:
    from shmdist._public import *  # noqa: F403 - the names are listed there
    from shmdist._public import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        """Load the public names on first use: start-up time of workers is a feature."""
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        import importlib.util

        if name == "shared":  # the one module that is a public name
            return importlib.import_module("shmdist.shared")
        # A module's name: the import system asks for it here before it looks for the module.
        # It need not be a file: on another host the source may have come by the connection.
        if importlib.util.find_spec(f"shmdist.{name}") is not None:
            raise AttributeError(name)
        public = importlib.import_module("shmdist._public")  # a from-import would ask us again
        for each in public.__all__:
            globals()[each] = getattr(public, each)
        globals()["__all__"] = public.__all__
        try:
            return globals()[name]
        except KeyError:
            raise AttributeError(f"module 'shmdist' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    """List the public names alone: the modules that they live in are mechanism."""
    return list(sys.modules[__name__].__all__)
