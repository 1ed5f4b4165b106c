"""Hosts on one network with a firewall each, which lets nothing in but SSH."""

import contextlib
import itertools
import operator
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

import shmdist as sd
from tests.integration import helpers
from tests.integration.helpers import until, within
from tests.integration.sshd import can_make_hosts, kill, needs_sshd, refused

pytestmark = needs_sshd

WALL = """
table inet shmdist {
    chain input {
        type filter hook input priority 0; policy drop;
        iif lo accept
        ct state established,related accept
        tcp dport 22 accept
    }
}
"""
_numbers = itertools.count()


def run(command, **options):
    return subprocess.run(command.split(), check=True, capture_output=True, text=True, **options)


class Network:
    """This host and two others at one switch."""

    SUBNET = "10.213.221"

    def __init__(self):
        unique = f"{os.getpid() % 100000}b{next(_numbers)}"
        self.switch = f"sd{unique}"
        self.addresses = [f"{self.SUBNET}.{number}" for number in (2, 3)]
        self.names = [f"shmdist{unique}h{number}" for number in (2, 3)]
        run(f"ip link add {self.switch} type bridge")
        run(f"ip address add {self.SUBNET}.1/24 dev {self.switch}")
        run(f"ip link set {self.switch} up")
        for name, address in zip(self.names, self.addresses, strict=True):
            port = f"{self.switch}p{address[-1]}"
            run(f"ip netns add {name}")
            run(f"ip link add {port} type veth peer name eth0 netns {name}")
            run(f"ip link set {port} master {self.switch} up")
            run(f"ip -n {name} address add {address}/24 dev eth0")
            run(f"ip -n {name} link set eth0 up")
            run(f"ip -n {name} link set lo up")

    def wall_off(self):
        for name in self.names:
            run(f"ip netns exec {name} nft -f -", input=WALL)

    def remove(self):
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                for ospid in run(f"ip netns pids {name}").stdout.split():
                    kill(int(ospid))
                run(f"ip netns delete {name}")
        with contextlib.suppress(subprocess.CalledProcessError):
            run(f"ip link delete {self.switch}")


@pytest.fixture(scope="module", autouse=True)
def _pool():
    sd.default_worker_pool()  # made on first use, and it has a channel


@pytest.fixture
def network():
    if not can_make_hosts():
        pytest.skip("this machine does not let us make network namespaces (ip netns, from iproute2)")
    if shutil.which("nft") is None:
        pytest.skip("there is no nft: apt-get install nftables")
    made = Network()
    try:
        made.wall_off()
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"this machine takes no firewall: {error.stderr}")
    yield made
    made.remove()


@pytest.fixture
def servers(network, start):
    """Their servers, which know each other's key files: one set of parameters is for both."""
    return start_both(network, start)


def start_both(network, start, settings=""):
    both = [
        start(name, settings, address=address, port=22, prefix=("ip", "netns", "exec", name))
        for name, address in zip(network.names, network.addresses, strict=True)
    ]
    both[0].known_hosts.write_text("".join(server.known_line() for server in both))
    return both


def knock(address, port):
    """Say what comes of a connection; quick where something answers."""
    try:
        socket.create_connection((address, port), 0.5).close()
    except OSError as error:
        return type(error).__name__
    return "open"


def test_the_wall_is_one(network, servers):
    """What these tests are worth."""
    second = network.addresses[1]
    assert [knock(address, 22) for address in network.addresses] == ["open"] * 2
    assert [knock(address, 9999) for address in network.addresses] == ["TimeoutError"] * 2
    source = f"from tests.integration.test_firewall import knock; print(knock({second!r}, 22), knock({second!r}, 9999))"
    command = ["ip", "netns", "exec", network.names[0], sys.executable, "-c", source]
    env = {**os.environ, "PYTHONPATH": str(helpers.ROOT)}
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    assert said.stdout.split() == ["open", "TimeoutError"]


def use(pids):
    """Everything that goes from host to host."""
    a, b, c, d = pids
    array = np.arange(1 << 20, dtype=float)
    for pid in pids:
        assert sd.remotecall_fetch(sd.myid, pid) == pid
        there = sd.remotecall_fetch(np.multiply, pid, array, 2.0)
        assert np.array_equal(there, array * 2)
    assert sd.pmap(lambda x: x * x, range(100)) == [x * x for x in range(100)]
    assert sum(sd.pmap(np.sum, [array] * 8)) == 8 * array.sum()
    assert sd.distributed(operator.add)(lambda i: 2 * i)(range(1000)) == 999000
    for one, other in ((a, c), (a, d), (c, a), (a, b)):
        there = sd.remotecall_fetch(sd.remotecall_fetch, one, np.negative, other, array)
        assert np.array_equal(there, -array)
    future = sd.remotecall(np.ones, a, 1000)
    assert sd.remotecall_fetch(lambda f: f.fetch().sum(), d, future) == 1000
    channel = sd.RemoteChannel(lambda: sd.Channel(2), c)
    sd.remote_do(lambda: [channel.put(array[:n]) for n in range(9)], b)
    assert [len(channel.take(timeout=20)) for _ in range(9)] == list(range(9))
    # One of the other host ends in the middle of a call.
    call = sd.remotecall(sd.remotecall_fetch, a, helpers.sleep_long, c)
    ospid = sd.remotecall_fetch(os.getpid, c)
    until(lambda: sd.remotecall_fetch(helpers.settled_state, c)["running"], 10)
    kill(ospid)
    with pytest.raises(sd.ProcessExitedException):
        call.fetch(timeout=10)
    assert sd.remotecall_fetch(sd.remotecall_fetch, a, abs, d, -1) == 1


def add(servers, **params):
    return sd.addprocs([(server.text, 2) for server in servers], **servers[0].params(**params))


def by_host(pids):
    """Return the ids, those of one host beside one another."""
    return sorted(pids, key=lambda pid: (min(sd.procs(pid)), pid))


def test_by_tunnel(servers):
    with within(30), add(servers, tunnel=True) as pids:
        use(by_host(pids))


def test_without_tunnel_the_login_is_used_and_that_is_told(network, servers):
    """Soon: nobody answers, so there is no being refused."""
    with within(15), pytest.warns(RuntimeWarning, match="tunnel=True") as caught:
        pids = add(servers)
    [warning] = caught
    assert warning.filename == __file__
    text = str(warning.message)
    assert any(f"{address} port " in text for address in network.addresses) and "timed out" in text
    assert "1 more hosts alike" in text
    with within(30), pids:
        use(by_host(pids))


@pytest.mark.parametrize("tunnel", [False, True])
def test_a_server_that_carries_nothing(network, start, tunnel):
    servers = start_both(network, start, "AllowTcpForwarding no")
    error = refused([servers[0].text], **servers[0].params(tunnel=tunnel))
    text = str(error)
    assert "AllowTcpForwarding" in text and error.phase == "connect"
    assert ("timed out" in text and f"no direct way to {network.addresses[0]} port" in text) != tunnel
