"""The command line: ``python -m shmdist worker`` is a worker; else a script is run with workers.

The script runs as ``__main__`` in this process, and finds the workers there::

    python -m shmdist -p 4 script.py arguments
    python -m shmdist -p auto --machine-file hosts.txt script.py
"""

from __future__ import annotations

import sys
from typing import Any


def main(arguments: list[str]) -> None:
    """Run the command that `arguments` names."""
    if arguments[:1] == ["worker"]:
        import shmdist.owners  # noqa: F401 - what a worker answers besides calls
        from shmdist.runtime.worker import start_worker

        start_worker()
        return
    options = _options(arguments)
    machines = _machines(options.machine_file) if options.machine_file else []
    _run(options.script, options.arguments, options.count, machines)


def _options(arguments: list[str]) -> Any:
    import argparse

    parser = argparse.ArgumentParser(
        "python -m shmdist", description="Run a script with workers; or, as `worker`, be one."
    )
    parser.add_argument(
        "-p",
        metavar="N",
        type=_count,
        default=0,
        dest="count",
        help="add N workers on this host; auto: one for each CPU",
    )
    parser.add_argument(
        "--machine-file",
        metavar="FILE",
        help="add workers by SSH: a line of FILE is [COUNT*][USER@]HOST[:PORT] [BIND_ADDR[:PORT]]",
    )
    parser.add_argument("script", help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script finds in sys.argv")
    return parser.parse_args(arguments)


def _count(text: str) -> int | None:
    """Return the number of local workers that is asked for, None for one for each CPU."""
    if text == "auto":
        return None
    count = int(text)
    if count < 0:
        raise ValueError(text)
    return count


def _machines(path: str) -> list[Any]:
    """Return the machines that a file names."""
    machines: list[Any] = []
    with open(path) as file:
        for line in file:
            text = line.partition("#")[0].strip()
            count, star, machine = text.partition("*")
            if star:
                machines.append((machine.strip(), int(count) if count.strip() != "auto" else "auto"))
            elif text:
                machines.append(text)
    return machines


def _run(script: str, arguments: list[str], count: int | None, machines: list[Any]) -> None:
    """Add the workers and run the script."""
    import os
    import runpy

    from shmdist.cluster import addprocs

    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # as Python does; and the workers' is a copy
    if count != 0:
        addprocs(count)
    if machines:
        addprocs(machines)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
