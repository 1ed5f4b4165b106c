"""What the tests share, and the functions that they run on workers.

Workers import this module, so it imports neither pytest nor numpy.
"""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

from shmdist.runtime.node import current_node

ROOT = Path(__file__).resolve().parent.parent.parent
MARK = "SHMDIST_TEST_MARK"  # environment variable by which the processes of one script are found


def until(condition, timeout=5.0, what=""):
    """Poll `condition` until it is true; return its value."""
    deadline = time.monotonic() + timeout
    pause = 0.0005
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(
                f"not so within {timeout:g} s: {what or getattr(condition, '__name__', condition)}"
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)
    return value


@contextlib.contextmanager
def within(seconds):
    """Fail when the block takes longer."""
    begun = time.monotonic()
    yield
    took = time.monotonic() - begun
    assert took < seconds, f"took {took:.2f} s, allowed are {seconds:g} s"


def settle_down():
    """Take what is there for good out of the collector's sight: it will run some thousand times."""
    gc.collect()
    gc.freeze()


def settled_state(between_tests=False):
    """Return what is left over in this process; empty collections when nothing is."""
    begun = time.perf_counter()
    gc.collect()
    if between_tests and time.perf_counter() - begun > 0.01:
        gc.freeze()  # what has been imported since
    node = current_node()
    with node.lock:
        node.counts.refs._check()
        entries = {tuple(rrid): repr(entry) for rrid, entry in list(node.counts.refs.entries.items())}
    running = [task for task in list(node.tasks.running.values()) if task.thread_state is not _my_strand()]
    node.sharing.blocks.pay()
    shared = node.sharing.state()
    descriptors = _descriptors(node)
    return {
        "blocks lent": shared["lent"],
        "blocks held": shared["held"],
        "blocks owed": shared["unsent_releases"],
        "receipts": [repr(table) for table in (node.counts.receipts, node.sharing.receipts) if len(table)],
        "references": entries,
        "pending": sorted(node.requests.pending),
        "waiting": sorted(node.requests.waiting),
        "unclaimed takes": sorted(node.requests.unclaimed_takes),
        "released": len(node.counts.released),
        "running": [repr(task) for task in running],
        "queued": sorted(node.tasks.queued),
        "lanes": len(node.reactor.lanes),
        "descriptors": descriptors,
    }


def _descriptors(node):
    """Return how many descriptors are open besides those of links and of shared memory."""
    found, known = 0, None
    while True:  # memory may be given back, and a link end, while we count
        former, known = known, _known_descriptors(node)
        if known == former:
            return found - known
        found = len(os.listdir("/proc/self/fd"))


def _known_descriptors(node):
    with node.lock:
        links = sum(len(links) for links in node.peers.all_links.values())
    return links + node.sharing.state()["descriptors"] + node.reserve.descriptors


def _my_strand():
    from shmdist.runtime.interrupts import current

    return current()


def reference_count():
    """Return how many references live in this process."""
    gc.collect()
    return len(current_node().counts.refs.entries)


def children(ospid=None):
    """Return the process ids of the children of a process."""
    found = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        for path in Path(f"/proc/{ospid or os.getpid()}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found |= {int(word) for word in path.read_text().split()}
    return found


def parent(ospid):
    """Return the process id of the parent of a process."""
    return int(Path(f"/proc/{ospid}/stat").read_text().rpartition(")")[2].split()[1])


def is_alive(ospid):
    """Tell whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{ospid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def name_of(ospid):
    """Return the short name that a process has for the system; empty when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{ospid}/comm").read_text().strip()
    return ""


def cpu_ticks(ospid):
    """Return the processor time that a process has used, in clock ticks."""
    fields = Path(f"/proc/{ospid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def shared_bytes(ospids):
    """Return the bytes of memory in the unnamed files that processes have open."""
    found = {}
    for ospid in ospids:
        for path in Path(f"/proc/{ospid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                if "shmdist" in os.readlink(path):
                    stat = path.stat()
                    found[stat.st_ino] = stat.st_blocks * 512
    return sum(found.values())


def anonymous_bytes(ospid="self"):
    """Return the bytes of memory that a process has for itself."""
    for line in Path(f"/proc/{ospid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the system does not tell")


def marked(mark):
    """Return the processes that have `mark` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            ospid = int(path.parent.name)
            if mark.encode() in path.read_bytes() and is_alive(ospid):
                found.append(ospid)
    return found


class Script:
    """A program of its own that uses shmdist, and all the processes that it starts.

    Parameters
    ----------
    source : str
        Python; run by ``python -c`` unless `command` says otherwise.
    """

    def __init__(
        self,
        source="",
        *,
        command=None,
        stdin=None,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=None,
        cwd=None,
    ):
        self.mark = f"{MARK}={uuid.uuid4().hex}"
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            MARK: self.mark.partition("=")[2],
            **(env or {}),
        }
        # Coverage or pytest settings of ours are not for it.
        environment.pop("PYTEST_CURRENT_TEST", None)
        self.process = subprocess.Popen(
            command or [sys.executable, "-c", source],
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            env=environment,
            cwd=cwd,
            text=True,
        )
        self._stdin = stdin

    def end(self, timeout=20.0, gone=5.0):
        """Wait for the end of the program and of all that it started; return its output."""
        try:
            out, err = self.process.communicate(self._stdin, timeout)
        except subprocess.TimeoutExpired:
            self.kill_all()
            out, err = self.process.communicate()
            raise AssertionError(f"the program did not end in {timeout} s\n{out}\n{err}") from None
        try:
            until(lambda: not marked(self.mark), gone, "no process of the program is left")
        finally:
            self.kill_all()
        return Ended(self.process.returncode, out, err)

    def line(self):
        """Read one line of its output."""
        return self.process.stdout.readline().rstrip("\n")

    def kill_all(self):
        """End whatever is left of it."""
        for ospid in marked(self.mark):
            with contextlib.suppress(OSError):
                os.kill(ospid, signal.SIGKILL)


class Ended:
    """How a program ended."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def __repr__(self):
        return f"<ended with {self.code}>\n--- stdout\n{self.out}\n--- stderr\n{self.err}"

    def clean(self, code=0):
        """Assert that it ended as it should, and said nothing on stderr; return its stdout."""
        assert self.code == code and self.err == "", self
        return self.out


def run_script(source, **options):
    """Run a program to its end; return how it ended."""
    return Script(source, **options).end()


# ---------------------------------------------------------------------- run on workers

log = []  # what calls on this process noted, in their order


def note(item):
    log.append(item)


def take_log():
    noted, log[:] = list(log), []
    return noted


def meet_and_wait(started, gate):
    """Say that the call has begun, then wait for something in `gate`."""
    started.put(threading.get_ident())
    return gate.take()


def tell_and_run(started, function, *args):
    """Say that the call has begun, then run `function`."""
    started.put(os.getpid())
    return function(*args)


def loop_for_ever():
    number = 0
    while True:
        number += 1


def hold_the_interpreter():
    """Match a regular expression that takes hours, in C code that never lets go."""
    import re

    re.match(r"(a+)+b", "a" * 64)


def sleep_long():
    time.sleep(1000)


def kill_self(signum):
    os.kill(os.getpid(), signum)
    signal.pause()
