"""Lines to other hosts that are slow, lossy, stalled, or down for a moment: slower, and nothing else."""

import functools
import operator
import subprocess
import threading
import time

import numpy as np
import pytest

import shmdist as sd
from tests.integration import helpers
from tests.integration.helpers import until, within
from tests.integration.slowline import SlowLine
from tests.integration.sshd import Host, can_make_hosts, needs_sshd

pytestmark = [needs_sshd, pytest.mark.parametrize("tunnel", [False, True], ids=["direct", "tunnel"])]
TIMEOUT = 6.0  # the retries of TCP come at 0.2, 0.6, 1.4, 3 s


@pytest.fixture(scope="module", autouse=True)
def _pool():
    sd.default_worker_pool()  # made on first use, and it has a channel


@pytest.fixture
def join(monkeypatch, start):
    """Adds two workers on a host at the end of a line."""
    if not can_make_hosts():
        pytest.skip("this machine does not let us make network namespaces (ip netns, from iproute2)")
    lines = []

    def join(kind, tunnel, timeout=TIMEOUT, **options):
        monkeypatch.setenv("SHMDIST_HEARTBEAT_TIMEOUT", f"{timeout:g}")
        try:
            lines.append(kind(231, **options))
        except OSError as error:
            pytest.skip(str(error))
        line = lines[-1]
        server = start(line.name, address=line.address, prefix=line.prefix)
        return line, sd.addprocs([(server.text, 2)], **server.params(tunnel=tunnel))

    yield join
    for line in lines:
        line.remove()


def use(pids, size=1 << 16):
    """Go both ways with small and large things."""
    a, b = pids
    array = np.random.default_rng(0).random(size)
    for pid in pids:
        assert np.array_equal(sd.remotecall_fetch(np.negative, pid, array), -array)
    assert sd.pmap(lambda x: x * x, range(50)) == [x * x for x in range(50)]
    assert sd.distributed(operator.add)(lambda i: 2 * i)(range(100)) == 9900
    assert sd.remotecall_fetch(sd.remotecall_fetch, a, abs, b, -3) == 3
    channel = sd.RemoteChannel(lambda: sd.Channel(2), a)
    sd.remote_do(lambda: [channel.put(n) for n in range(5)], b)
    assert [channel.take(timeout=20) for _ in range(5)] == list(range(5))


def busy(pids, stop):
    """Go on calling until told to stop; return a list that gets what went wrong, and the thread."""
    wrong, rounds = [], [0]
    array = np.arange(1 << 19, dtype=float)

    def body():
        try:
            while not stop.is_set():
                for pid in pids:
                    there = sd.remotecall_fetch(np.negative, pid, array)
                    assert np.array_equal(there, -array)
                rounds[0] += 1
        except Exception as error:
            wrong.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    return wrong, rounds, thread


def test_a_slow_line(join, tunnel):
    """There and back takes as long as across a continent."""
    line, pids = join(SlowLine, tunnel, delay=0.03)
    with within(90), pids:
        begun = time.monotonic()
        assert sd.remotecall_fetch(abs, pids[0], -1) == 1
        assert time.monotonic() - begun >= 0.06, "the line is as slow as it should be"
        use(pids)
    assert line.process.poll() is None


def test_a_lossy_line(join, tunnel):
    """Calls go on for longer than a host may be silent; four questions in a row are hardly ever lost."""
    _, pids = join(SlowLine, tunnel, timeout=5.0, delay=0.01, loss=0.05)
    with within(120), pids:
        use(pids)
        deadline = time.monotonic() + 6.0
        while time.monotonic() < deadline:
            assert sd.remotecall_fetch(abs, pids[0], -1) == 1


def run(command):
    subprocess.run(command.split(), check=True, capture_output=True)


class Lossless(Host):
    """A host whose line can be taken down."""

    def stall(self):
        run(f"ip link set {self._line} down")

    def go_on(self):
        run(f"ip link set {self._line} up")


@pytest.mark.parametrize(
    "kind", [Lossless, SlowLine, functools.partial(SlowLine, kept=60)], ids=["down", "stalled", "spilling"]
)
def test_a_line_that_comes_back_in_time(join, tunnel, kind):
    """With calls and large arrays under way; nothing is lost, and nobody is given up."""
    line, pids = join(kind, tunnel)
    stop = threading.Event()
    call = sd.remotecall(time.sleep, pids[0], 0.4 * TIMEOUT)
    wrong, rounds, thread = busy(pids, stop)
    try:
        until(lambda: rounds[0] or wrong, 20)
        line.stall()
        time.sleep(TIMEOUT / 3)
        line.go_on()
        before = rounds[0]
        until(lambda: rounds[0] > before + 1 or wrong, 20)
    finally:
        line.go_on()
        stop.set()
        thread.join(60)
    assert not wrong
    assert call.fetch(timeout=10) is None
    assert set(pids) <= set(sd.workers())
    assert helpers.settled_state()["pending"] == []
    sd.rmprocs(*pids)
