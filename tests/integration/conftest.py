"""One cluster for all tests of this folder, and the proof after each test that nothing is left of it."""

import contextlib
import os
import sys
import warnings

import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration import helpers
from tests.integration import sshd as sshd_module

WORKERS = 3
_reports = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    item.stash.setdefault(_reports, {})[report.when] = report
    return report


@pytest.fixture(scope="session")
def _cluster():
    pids = sd.addprocs(WORKERS)
    for pid in pids:  # all links are made now: later their descriptors would look like a leak
        for other in pids:
            sd.remotecall_fetch(sd.remotecall_fetch, pid, int, other)
    sd.default_worker_pool()  # made on first use, and it has a channel
    for pid in [1, *pids]:
        sd.remotecall_fetch(helpers.settle_down, pid)
    yield list(pids)
    sd.rmprocs(*[pid for pid in pids if pid in sd.workers()])


@pytest.fixture
def cluster(_cluster):
    """The shared workers, by their ids; they must be alive and idle after the test."""
    assert set(_cluster) <= set(sd.workers()), "an earlier test has ended a shared worker"
    return list(_cluster)


@pytest.fixture
def fresh():
    """Adds workers for one test, that may do with them what it likes."""
    added = []

    def add(n=1, **params):
        pids = sd.addprocs(n, **params)
        added.extend(pids)
        return pids

    yield add
    left = [pid for pid in added if pid in sd.procs()]
    if left:
        sd.rmprocs(*left)


def _states(between_tests=False):
    node = current_node()
    states = {1: helpers.settled_state(between_tests)}
    for pid in sorted(node.peers.links):
        with contextlib.suppress(sd.ProcessExitedException):  # the test may have ended it
            states[pid] = sd.remotecall_fetch(helpers.settled_state, pid, between_tests)
    return states


def _leftovers(before, now):
    """Return what is there now and was not before, by process."""
    left = []
    for pid, state in now.items():
        former = before.get(pid, {"descriptors": state["descriptors"]})
        for name, value in state.items():
            if name == "descriptors":
                if value > former[name]:
                    left.append(f"process {pid}: {value - former[name]} more descriptors")
            elif name == "references":
                left += [
                    f"process {pid}: {text}" for key, text in value.items() if key not in former.get(name, ())
                ]
            elif value and value != former.get(name):
                left.append(f"process {pid}: {name}: {value}")
    return left


@pytest.fixture(autouse=True)
def nothing_left(request):
    """After each test nothing is left of it, on any process."""
    if "_cluster" in request.fixturenames:
        request.getfixturevalue("_cluster")
    shm = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    before = _states(between_tests=True)
    if not current_node().peers.links:
        before[1]["descriptors"] = sys.maxsize  # what the first worker brings stays
    children = helpers.children()
    yield
    report = request.node.stash.get(_reports, {}).get("call")
    if report is None or not report.passed:
        return  # its traceback holds what it has
    request.node.funcargs.clear()  # pytest keeps the fixtures' values, references among them, till after this
    left = []

    def clean():
        left[:] = _leftovers(before, _states())
        left.extend(f"child process {child}" for child in helpers.children() - children - _of_members())
        return not left

    try:
        with warnings.catch_warnings():
            helpers.until(clean, 5.0)
    except AssertionError:
        pytest.fail("left over:\n" + "\n".join(left))
    # One may be in the making, by tests that run beside these.
    helpers.until(lambda: {name for name in os.listdir("/dev/shm") if "shmdist" in name} <= shm)


def _of_members():
    return {peer.ospid for peer in list(current_node().peers.members.values())}


@pytest.fixture(scope="session")
def user_key(tmp_path_factory):
    return sshd_module.make_key(tmp_path_factory.mktemp("keys") / "id_ed25519")


@pytest.fixture(scope="session")
def sshd(tmp_path_factory, user_key):
    """The server of the tests that need nothing special of it."""
    sd.default_worker_pool()  # made on first use, and it has a channel
    server = sshd_module.Sshd(tmp_path_factory.mktemp("sshd"), user_key)
    yield server
    server.stop()


@pytest.fixture
def start(tmp_path, user_key):
    """Starts further servers for one test."""
    started = []

    def start(name="other", settings="", **options):
        started.append(sshd_module.Sshd(tmp_path / name, user_key, settings, **options))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def brief(monkeypatch, request):
    """What falls silent is soon taken for dead: after the module's TIMEOUT."""
    monkeypatch.setenv("SHMDIST_HEARTBEAT_TIMEOUT", f"{request.module.TIMEOUT:g}")


@pytest.fixture
def host(brief):
    """A host of its own; its line can be cut."""
    if not sshd_module.can_make_hosts():
        pytest.skip("this machine does not let us make network namespaces (ip netns, from iproute2)")
    made = sshd_module.Host(211)
    yield made
    made.remove()


@pytest.fixture
def server(host, start):
    """An SSH server on that host."""
    return start(host.name, address=host.address, prefix=host.prefix)
