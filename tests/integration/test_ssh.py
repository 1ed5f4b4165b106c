"""Workers on other hosts, through real SSH servers on the loopback interface."""

import contextlib
import os
import socket

import numpy as np
import pytest

import shmdist as sd
from tests.integration import helpers
from tests.integration.helpers import until, within
from tests.integration.sshd import Host, Sshd, can_make_hosts, descriptors, needs_sshd, threads_of_logins

pytestmark = needs_sshd


# ---------------------------------------------------------------------- the road


@pytest.mark.parametrize("tunnel", [False, True])
def test_calls_arrays_and_maps(sshd, tunnel):
    logins = sshd.logins()
    with within(30), sd.addprocs([(sshd.text, 2)], tunnel=tunnel, **sshd.params()) as pids:
        assert sd.remotecall_fetch(os.getpid, pids[0]) != os.getpid()
        array = np.arange(1 << 20, dtype=float)
        there = sd.remotecall_fetch(np.multiply, pids[0], array, 2.0)
        assert np.array_equal(there, array * 2) and there.flags.writeable
        assert sd.pmap(lambda x: x * x, range(20)) == [x * x for x in range(20)]
        # One worker calls the other.
        assert sd.remotecall_fetch(sd.remotecall_fetch, pids[0], sd.myid, pids[1]) == pids[1]
        with pytest.raises(ZeroDivisionError):
            sd.remotecall_fetch(divmod, pids[1], 1, 0)
        listening = sd.remotecall_fetch(addresses, pids[0])
        assert listening == ["127.0.0.1"]
    assert sshd.logins() == logins + 1, "one login for both workers"
    assert not set(pids) & set(sd.procs())


def test_what_a_host_shares_with_the_program(sshd, cluster):
    """Texts have one hash there, too, and multiprocessing's secret is process 1's."""

    def look():
        import multiprocessing

        return (
            hash("needle"),
            os.environ.get("PYTHONHASHSEED"),
            multiprocessing.current_process().authkey.hex(),
        )

    with within(30), sd.addprocs([sshd.text], **sshd.params()) as pids:
        assert sd.remotecall_fetch(look, pids[0]) == sd.remotecall_fetch(look, cluster[0])
    with within(30), sd.addprocs([sshd.text], env={"PYTHONHASHSEED": "5"}, **sshd.params()) as pids:
        assert sd.remotecall_fetch(look, pids[0])[1] == "5"


def addresses():
    from shmdist.runtime.node import current_node

    node = current_node()
    return [place[0] for family, place in node.peers.members[node.pid].addresses if family == "tcp"]


@pytest.fixture
def hosts(start):
    """Two servers on hosts of their own, which have no way to each other."""
    if not can_make_hosts():
        pytest.skip("this machine does not let us make network namespaces (ip netns, from iproute2)")
    made = [Host(201), Host(202)]
    yield [start(host.name, address=host.address, prefix=host.prefix) for host in made]
    for host in made:
        host.remove()


@pytest.mark.parametrize("tunnel", [False, True])
def test_workers_without_a_way_to_each_other(hosts, tunnel):
    first, second = hosts
    first.known_hosts.write_text(first.known_line() + second.known_line())
    machines = [(first.text, 2), (second.text, 2)]
    with within(40), sd.addprocs(machines, tunnel=tunnel, **first.params()) as pids:
        here = {pid: sd.procs(pid) for pid in pids}
        by_host = sorted({tuple(group) for group in here.values()})
        assert [len(group) for group in by_host] == [2, 2] and 1 not in by_host[0]
        a, c = by_host[0][0], by_host[1][0]
        own = [first.address, second.address]
        assert sd.remotecall_fetch(addresses, a)[0] in (["127.0.0.1"] if tunnel else own)
        array = np.arange(1 << 18)
        for one, other in ((a, c), (c, a), (by_host[0][1], c), by_host[0]):
            there = sd.remotecall_fetch(sd.remotecall_fetch, one, np.negative, other, array)
            assert np.array_equal(there, -array)
        # References of one host's worker are used on the other.
        future = sd.remotecall(np.ones, a, 1000)
        assert sd.remotecall_fetch(lambda f: f.fetch().sum(), c, future) == 1000
        doubled = sd.distributed(np.add)(lambda i: 2 * i)
        assert doubled(range(100)) == 9900
        # One of them ends: the other one's calls to it do too.
        call = sd.remotecall(sd.remotecall_fetch, a, helpers.sleep_long, c)
        sd.remotecall(exit_now, c)
        with pytest.raises(sd.ProcessExitedException):
            call.fetch(timeout=10)
        del future


def exit_now():
    os._exit(0)


def test_the_login_is_used_where_there_is_no_direct_way(hosts):
    """The worker listens where process 1 does not get."""
    (server, _) = hosts
    with within(20), sd.addprocs([f"{server.text} 127.0.0.1"], **server.params()) as (pid,):
        assert sd.remotecall_fetch(addresses, pid) == ["127.0.0.1"]
        assert sd.remotecall_fetch(np.negative, pid, np.ones(3)).tolist() == [-1.0] * 3


def has_ipv6():
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("tunnel", [False, True])
def test_by_ipv6(sshd, tmp_path, tunnel):
    """The login, and the workers' own links."""
    server = Sshd(tmp_path / "server", sshd.user_key, address="::1")
    try:
        with within(30), sd.addprocs([(f"{server.text} [::1]", 2)], tunnel=tunnel, **server.params()) as pids:
            assert sd.remotecall_fetch(addresses, pids[0]) == ["::1"]
            array = np.arange(1 << 20, dtype=float)
            assert np.array_equal(sd.remotecall_fetch(np.negative, pids[0], array), -array)
            assert sd.remotecall_fetch(sd.remotecall_fetch, pids[0], sd.myid, pids[1]) == pids[1]
            assert sd.pmap(abs, range(-20, 0)) == list(range(20, 0, -1))
    finally:
        server.stop()


def test_nothing_is_left_of_a_cluster(sshd):
    with sd.addprocs([sshd.text], tunnel=True, **sshd.params()):
        pass
    before = descriptors()
    for tunnel in (False, True):
        with sd.addprocs([(sshd.text, 2)], tunnel=tunnel, **sshd.params()) as pids:
            ospids = [sd.remotecall_fetch(os.getpid, pid) for pid in pids]
        until(lambda: not any(map(helpers.is_alive, ospids)))  # noqa: B023 - called here alone
    until(lambda: descriptors() <= before, what=f"no more than {before} descriptors")
    until(lambda: not threads_of_logins(), what="no thread is left")
