"""shmdist: Julia's Distributed for Python, on ``multiprocessing.connection``.

Top-level modules are what a user sees; folders are mechanism::

    errors                         every exception class
    memory/  wire/                 bytes shared on a host; bytes between two processes
    runtime/                       one process: its node, its threads, the calls it runs
    managers/                      how workers come to be
    channels  futures  refs        Channel, Future, RemoteChannel
      completion  references         what waits for an outcome; what Future and RemoteChannel share
      faces  travel                  a Future's face of concurrent.futures; its value in a pickle
      owners                         the owner's side of references
    calls  cluster  evaluation     remotecall...; addprocs...; everywhere
      membership  places             process 1's side of the cluster; where a call is to run
      relays                         joining two workers that have no direct way
    tasks  pools  maps  loops      async_, sync; WorkerPool...; pmap; @distributed
      poolstate  shipping            a pool where it lives; a function sent once to each worker
      repeats                        arrays that go out many times in one map
      batches  runs                  elements in one call; the calls of a map, under way

A call goes ``calls`` -> ``runtime.node`` -> ``wire.codec`` -> ``wire.link``, and on the other
side ``wire.link`` -> ``runtime.dispatch`` -> ``runtime.task`` -> the function.
"""

import sys
from typing import TYPE_CHECKING, Any

from shmdist._version import __version__ as __version__

if TYPE_CHECKING or sys.orig_argv[-3:] != ["-m", "shmdist", "worker"]:
    from shmdist.public import *  # noqa: F403 - the names are listed there
    from shmdist.public import __all__ as __all__
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
        public = importlib.import_module("shmdist.public")  # a from-import would ask us again
        for each in public.__all__:
            globals()[each] = getattr(public, each)
        globals()["__all__"] = public.__all__
        try:
            return globals()[name]
        except KeyError:
            raise AttributeError(f"module 'shmdist' has no attribute {name!r}") from None
