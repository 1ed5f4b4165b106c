"""The command line: ``python -m shmdist worker`` is a worker; else a script is run with workers.

The script runs as ``__main__`` in this process, and finds the workers there::

    python -m shmdist -p 4 script.py arguments
    python -m shmdist -p auto --machine-file hosts.txt script.py
"""

from __future__ import annotations

import os
import sys
from types import CodeType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse


def main(arguments: list[str]) -> None:
    """Run the command that `arguments` names."""
    if arguments[:1] == ["worker"]:
        if arguments[1:]:
            _parser().error(f"worker takes no arguments, not {' '.join(arguments[1:])}")
        import shmdist.references.server  # noqa: F401 - what a worker answers besides calls
        from shmdist.worker.main import start_worker

        start_worker()
        return
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        code = _read_script(options.script)
        machines = _machines(options.machine_file) if options.machine_file else []
    except _UsageError as error:
        parser.error(str(error))
    _run(options.script, code, options.arguments, options.count, machines)


class _UsageError(Exception):
    """What was wrong in the command, as the user is told."""


def _parser() -> argparse.ArgumentParser:
    import argparse  # not on a worker's way to its start

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
    return parser


def _count(text: str) -> int | None:
    """Return the number of local workers that is asked for, None for one for each CPU."""
    if text == "auto":
        return None
    if not text.isdecimal():
        import argparse

        raise argparse.ArgumentTypeError(f"N is a number of workers, 0 or more, or auto, not {text!r}")
    return int(text)


def _machines(path: str) -> list[Any]:
    """Return the machines that a file names."""
    import argparse

    from shmdist.managers.ssh.host_spec import parse_machine

    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _UsageError(f"the machine file {path!r} cannot be read: {_reason(error)}") from None
    machines: list[Any] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        count, star, machine = text.partition("*")
        try:
            item: Any = text if not star else (machine.strip(), _count(count.strip()) or "auto")
            if star and count.strip() != "auto" and not int(count):
                raise ValueError("COUNT is 1 or more, or auto")
            parse_machine(item)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise _UsageError(f"line {number} of the machine file {path!r}, {text!r}: {error}") from None
        machines.append(item)
    return machines


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _read_script(script: str) -> CodeType | None:
    """Return the code of a script; None of a folder or archive, whose ``__main__.py`` is to run."""
    import io
    import zipfile

    path = os.path.abspath(script)
    try:
        if os.path.isdir(path):
            if not os.path.exists(os.path.join(path, "__main__.py")):
                raise _UsageError(f"the script {script!r} is a folder without a __main__.py")
            return None
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        raise _UsageError(f"the script {script!r} cannot be read: {_reason(error)}") from None
    if zipfile.is_zipfile(path):
        return None
    try:
        return compile(source, path, "exec", dont_inherit=True)
    except BaseException:
        _hide_our_frames(None)
        raise


def _run(
    script: str, code: CodeType | None, arguments: list[str], count: int | None, machines: list[Any]
) -> None:
    """Add the workers and run the script, in all that it can see as Python itself would."""
    from shmdist.cluster import addprocs

    sys.argv = [script, *arguments]
    if not sys.flags.safe_path:  # the workers' path is a copy of ours
        path = os.path.realpath(script)
        sys.path[0] = path if code is None else os.path.dirname(path)
    if count != 0:
        addprocs(count)
    if machines:
        addprocs(machines)
    if code is None:
        import runpy

        runpy.run_path(script, run_name="__main__")
        return
    from importlib.machinery import SourceFileLoader

    # It stays: threads of the script, and what is run at exit, look there for its names.
    main = sys.modules["__main__"] = ModuleType("__main__")
    path = os.path.abspath(script)
    loader = SourceFileLoader("__main__", path)
    main.__dict__.update(__builtins__=__builtins__, __file__=path, __cached__=None, __loader__=loader)
    try:
        exec(code, main.__dict__)
    except BaseException:
        _hide_our_frames(code)
        raise


def _hide_our_frames(code: CodeType | None) -> None:
    """Let the traceback of what ends the program begin in the script, whose code this is."""
    shown = sys.excepthook  # Python's, or one that the script has set

    def show(kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
        while tb is not None and tb.tb_frame.f_code is not code:
            tb = tb.tb_next
        shown(kind, error.with_traceback(tb), tb)

    sys.excepthook = show


if __name__ == "__main__":
    main(sys.argv[1:])
