"""The first code on a remote host, before shmdist is there: its source is sent, not installed.

It reads its settings from standard input, one JSON text after its length, and tells of itself
by lines that begin with the settings' token: whatever else a login shell prints is no such
line.  Then it makes the process a worker.  What comes later on standard input is nothing but
its end, which means that the master is gone.

It must be readable to any Python 3 that may be found there, so that it can say which is needed.
It imports nothing of shmdist before it has found it, or has been sent it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import json
import os
import socket
import sys
from typing import Any


class _StatusWriter(io.TextIOBase):
    """Writes the worker's line, and all that this file has to say."""

    def __init__(self, token: str) -> None:
        self.token = token

    def say(self, kind: str, **what: Any) -> None:
        """Tell something to the master."""
        what["kind"] = kind
        sys.stdout.write(f"{self.token} {json.dumps(what)}\n")
        sys.stdout.flush()

    def write(self, text: str) -> int:
        """Take the line that a worker writes when it listens."""
        self.say("up", line=text.strip())
        return len(text)


class _SourceImporter:
    """Imports modules from their sources, which came from the master: no file is left behind."""

    def __init__(self, sources: dict[str, bytes]) -> None:
        self.sources = sources

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find a module that was sent."""
        file = name.replace(".", "/")
        package = file + "/__init__.py" in self.sources
        origin = file + "/__init__.py" if package else file + ".py"
        if origin not in self.sources:
            return None
        loader: Any = self
        spec = importlib.machinery.ModuleSpec(name, loader, origin="<sent>/" + origin, is_package=package)
        spec.has_location = True
        return spec

    def create_module(self, spec: Any) -> None:
        """Leave it to the import system."""

    def exec_module(self, module: Any) -> None:
        """Run a module's source."""
        origin = module.__spec__.origin
        code = compile(self.sources[origin[len("<sent>/") :]], origin, "exec", dont_inherit=True)
        exec(code, module.__dict__)

    def get_source(self, name: str) -> str | None:
        """Return a module's source, for tracebacks."""
        spec = self.find_spec(name)
        return self.sources[spec.origin[len("<sent>/") :]].decode("utf-8") if spec else None


def _read() -> bytes:
    """Read one text, or block of bytes, after its length."""
    size = int(sys.stdin.buffer.readline() or b"0")
    return sys.stdin.buffer.read(size)


def _settle(settings: dict[str, Any]) -> None:
    """Set directory, environment and module path."""
    folder = settings["dir"]
    if folder:
        try:
            os.chdir(os.path.expanduser(folder))
        except OSError as error:
            os.chdir(os.path.expanduser("~"))
            if settings["dir_wanted"]:
                sys.stderr.write(f"shmdist: {error}; working in {os.getcwd()} instead\n")
    for name, value in settings["defaults"].items():
        os.environ.setdefault(name, value)
    os.environ.pop("PYTHONHASHSEED", None)  # it was set for this process, not for those that it starts
    os.environ.update(settings["env"])
    wanted = [entry for entry in settings["env"].get("PYTHONPATH", "").split(os.pathsep) if entry]
    mine = [entry for entry in sys.path if entry]
    theirs = [entry for entry in settings["path"] if os.path.exists(entry)]
    # Their order where it is their interpreter; another one keeps its own modules first.
    order = theirs + mine if sys.prefix == settings["prefix"] else mine + theirs
    sys.path[:] = list(dict.fromkeys(wanted + order))
    sys.argv = [""]
    # So that shmdist loads what a worker needs, and no more.
    sys.orig_argv = [sys.executable, "-m", "shmdist", "worker"]


def _digest(folder: str) -> str:
    """Return a digest of all sources under a package's folder; as ``managers.ssh.remote_worker`` makes it."""
    import hashlib

    found = {}
    for place, _, files in os.walk(folder):
        for file in files:
            if file.endswith(".py"):
                path = os.path.join(place, file)
                with open(path, "rb") as source:
                    found[os.path.relpath(path, os.path.dirname(folder)).replace(os.sep, "/")] = source.read()
    whole = hashlib.sha256()
    for name in sorted(found):
        whole.update(name.encode() + b"\0" + found[name] + b"\0")
    return whole.hexdigest()


def _find_package(settings: dict[str, Any], tell: _StatusWriter) -> str:
    """Find the master's shmdist here, or have it sent; return why it cannot be had, if so."""
    need = []
    why = "shmdist is not installed"
    spec = importlib.util.find_spec("shmdist")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders or _digest(folders[0]) != settings["digest"]:
        root = settings["root"]  # the file system may be the master's
        if os.path.isdir(root) and _digest(os.path.join(root, "shmdist")) == settings["digest"]:
            sys.path.insert(0, root)
            import shmdist._version

            sys.path.remove(root)
        elif not folders or settings["bootstrap"]:
            need.append("shmdist")
        else:
            import shmdist._version

            if shmdist._version.__version__ != settings["version"]:
                return f"shmdist {shmdist._version.__version__} is installed"
    if importlib.util.find_spec("cloudpickle") is None:
        why = "shmdist is not installed" if need else "cloudpickle is not installed"
        need.append("cloudpickle")
    if not need:
        return ""
    if not settings["bootstrap"]:
        return why
    tell.say("need", packages=need)
    import zipfile

    archive = zipfile.ZipFile(io.BytesIO(_read()))
    finder: Any = _SourceImporter({name: archive.read(name) for name in archive.namelist()})
    sys.meta_path.insert(0, finder)
    return ""


def _tie() -> Any:
    """End with the master: with standard input, and with the server's process of this connection."""
    import threading

    from shmdist.worker.watchdog import Watchdog

    lifeline = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    watchdog = Watchdog(lifeline)  # it forks, which is to be done before there are threads

    def wait() -> None:
        watchdog.wait()
        node = sys.modules.get("shmdist.runtime.node")
        if node is not None and node._current is not None:
            node._current.flush_own_output()
        os._exit(0)

    threading.Thread(target=wait, name="shmdist-lifeline", daemon=True).start()
    try:
        # A thread that holds the interpreter lets nobody see the end of standard input.
        import ctypes

        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
        if os.getppid() == 1:
            os._exit(1)
    except (AttributeError, ImportError, OSError):
        pass
    return watchdog


def _address(settings: dict[str, Any]) -> str | None:
    """Return where to listen: as asked, or where the login came in."""
    if settings["bind_addr"]:
        return str(settings["bind_addr"])
    words = os.environ.get("SSH_CONNECTION", "").split()
    return words[2] if len(words) == 4 else None


def _numpy(settings: dict[str, Any], host: str) -> str | None:
    """Return this host's version of numpy, and say so where it does not go with the master's."""
    try:
        from importlib.metadata import version

        mine: str | None = version("numpy")
    except Exception:
        mine = None
    theirs = settings["numpy"]
    if theirs and not mine:
        text = f"numpy {theirs} on the master, none on {host}: arrays cannot be sent there"
    elif theirs and mine and theirs.split(".")[0] != mine.split(".")[0]:
        text = f"numpy {theirs} on the master, {mine} on {host}: not all made by one can be read by the other"
    else:
        return mine
    sys.stderr.write("shmdist: " + text + "\n")
    return mine


def main() -> None:
    """Be a worker."""
    settings = json.loads(_read().decode("utf-8"))
    sys.stderr.write(settings["token"] + "\n")
    sys.stderr.flush()
    tell = _StatusWriter(settings["token"])
    host = socket.gethostname()
    mine = sys.version.split()[0]
    if mine.split(".")[:2] != settings["python"].split(".")[:2]:
        text = (
            f"Python {settings['python']} on the master, {mine} on {host} ({sys.executable}): "
            "functions cannot be sent between them; "
        )
        tell.say("error", message=text + "name an interpreter of the master's version with exename=")
        sys.exit(1)
    _settle(settings)
    why = _find_package(settings, tell)
    if why:
        text = f"shmdist {settings['version']} on the master, and on {host} ({sys.executable}) {why}; "
        tell.say("error", message=text + "install the same version there, or pass bootstrap=True")
        sys.exit(1)
    watchdog = _tie()
    import shmdist.references.server  # noqa: F401 - what a worker answers besides calls
    from shmdist.managers.base import usable_cpus
    from shmdist.runtime.resource_tracker import set_authkey
    from shmdist.worker.main import be_worker

    set_authkey(settings["authkey"])

    numpy = _numpy(settings, host)
    tell.say("hello", pid=os.getpid(), host=host, python=mine, numpy=numpy, cpus=usable_cpus())
    out: Any = tell
    be_worker(
        settings["cookie"],
        out,
        bind_addr=_address(settings),
        port=settings["bind_port"],
        close_stdin=False,
        watchdog=watchdog,
    )
