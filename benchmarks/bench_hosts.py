"""Workers that are reached by the network: direct TCP beside bare sockets, the tunnel beside ``ssh``."""

import contextlib
import fcntl
import functools
import multiprocessing
import operator
import shlex
import shutil
import socket
import subprocess
import sys
from multiprocessing.connection import Client, Listener

import conftest
import numpy as np
import pytest

import shmdist as sd
from shmdist.transport import listener
from tests.integration import sshd

MIB = 1 << 20
BIG = 64 * MIB

measure = functools.partial(conftest.seconds, calls=200)


class ByTCP(sd.LocalManager):
    """Workers of this host that are reached as those of another one are: no AF_UNIX, no shared memory."""

    def default_params(self):
        return {**super().default_params(), "restrict": False}

    def connect(self, id, config):
        return listener.connect(("tcp", (config.bind_addr, config.port)))


@pytest.fixture(scope="module")
def far():
    with sd.addprocs(ByTCP(1)) as [pid]:
        sd.remotecall_fetch(abs, pid, -1)
        from shmdist.runtime.node import current_node

        assert not current_node().peers.links[pid].is_local
        yield pid


def echo(address):
    with Client(address) as connection:
        while True:
            connection.send(connection.recv())


@pytest.fixture
def bare():
    """A TCP connection to a process that sends back what it gets."""
    with Listener(("127.0.0.1", 0)) as listener:
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=echo, args=(listener.address,), daemon=True)
        process.start()
        connection = listener.accept()
    for end in (connection,):
        sock = socket.socket(fileno=end.fileno())
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.detach()
    yield connection
    process.kill()
    process.join()
    connection.close()


def bench_call_by_tcp(compare, bare, far):
    def round_trip():
        bare.send(1)
        bare.recv()

    compare(
        "call of a no-op by TCP",
        lambda: sd.remotecall_fetch(operator.neg, far, 1),
        round_trip,
        peer_name="bare echo by TCP",
        most=1.5,
        rounds=25,
        measure=measure,
    )


def take(address, nbytes):
    room = memoryview(bytearray(nbytes))
    with socket.create_connection(address) as sock:
        while True:
            done = 0
            while done < nbytes:
                count = sock.recv_into(room[done:])
                if not count:
                    return
                done += count
            sock.sendall(b"x")


@contextlib.contextmanager
def sinks(count):
    """Sockets to processes that receive 64 MiB into the same memory again and again."""
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as server:
        processes = [
            context.Process(target=take, args=(server.getsockname(), BIG), daemon=True) for _ in range(count)
        ]
        for process in processes:
            process.start()
        socks = [server.accept()[0] for _ in processes]
    yield socks
    for sock in socks:
        sock.close()
    for process in processes:
        process.join()


@pytest.fixture
def sink():
    with sinks(1) as [sock]:
        yield sock


def bench_64_mib_by_tcp(compare, sink, far):
    big = np.ones(BIG // 8)

    def bare():
        sink.sendall(big)
        sink.recv(1)

    compare(
        "argument of 64 MiB by TCP",
        lambda: sd.remotecall_fetch(len, far, big),
        bare,
        peer_name="sendall, recv_into",
        most=1.3,
        rounds=25,
    )


def bench_64_mib_to_four_of_one_host(compare):
    """The bytes go to one of the four; the others see them there."""
    big = np.ones(BIG // 8)

    def bare():
        for sock in socks:
            sock.sendall(big)
        for sock in socks:
            sock.recv(1)

    with sinks(4) as socks, sd.addprocs(ByTCP(4)) as pids:
        compare(
            "64 MiB to four workers of one other host",
            lambda: sd.everywhere("", pids, big=big),
            bare,
            peer_name="sendall to each",
            most=0.4,
            rounds=25,
        )


def bench_result_of_64_mib_by_tcp(compare, far):
    """What is got is new memory each time, as with the bare sockets here."""
    sd.remotecall_eval("__main__", far, "import numpy; big = numpy.ones(8 << 20)")
    with socket.create_server(("127.0.0.1", 0)) as server:
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=give, args=(server.getsockname(), BIG), daemon=True)
        process.start()
        sock, _ = server.accept()

    def bare():
        sock.sendall(b"x")
        room = memoryview(np.empty(BIG, "B"))
        done = 0
        while done < BIG:
            done += sock.recv_into(room[done:])

    try:
        compare(
            "result of 64 MiB by TCP",
            lambda: sd.remotecall_fetch(the_big_one, far),
            bare,
            peer_name="sendall, recv_into",
            most=1.3,
            rounds=25,
        )
    finally:
        sock.close()
        process.join()


def the_big_one():
    import __main__

    return __main__.big


def give(address, nbytes):
    data = bytes(nbytes)
    with socket.create_connection(address) as sock:
        while sock.recv(1):
            sock.sendall(data)


# ---------------------------------------------------------------------- through a login

CIPHER = "aes128-gcm@openssh.com"  # the tunnel's, unless the server will not have it
# What runs at the other end of `ssh`: it takes 64 MiB and says so, or gives 64 MiB when it is told.
TAKE = f"""
import sys
room = memoryview(bytearray({BIG}))
while True:
    done = 0
    while done < {BIG}:
        done += sys.stdin.buffer.readinto1(room[done:]) or sys.exit()
    sys.stdout.buffer.write(b"x")
    sys.stdout.buffer.flush()
"""
GIVE = f"""
import sys
data = bytes({BIG})
while sys.stdin.buffer.read(1):
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if sshd.why_not() is not None or shutil.which("ssh") is None:
        pytest.skip(sshd.why_not() or "there is no ssh: apt-get install openssh-client")
    folder = tmp_path_factory.mktemp("sshd")
    running = sshd.Sshd(folder, sshd.make_key(folder / "keys" / "id_ed25519"), f"Ciphers {CIPHER}")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def tunnelled(server):
    with sd.addprocs([server.text], tunnel=True, **server.params()) as [pid]:
        sd.remotecall_eval("__main__", pid, "import numpy; big = numpy.ones(8 << 20)")
        yield pid


@contextlib.contextmanager
def by_ssh(server, code):
    """Run a program at the other end of `ssh`; yields its two pipes, as large as the system lets them be."""
    command = ["ssh", "-F", "none", "-i", str(server.user_key), "-p", str(server.port), "-c", CIPHER]
    command += ["-o", f"UserKnownHostsFile={server.known_hosts}", f"root@{server.address}"]
    command += [shlex.join([sys.executable, "-c", code])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, bufsize=0, **pipes) as process:
        for pipe in (process.stdin, process.stdout):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 20)
        try:
            yield process.stdin, process.stdout
        finally:
            process.kill()


def bench_64_mib_by_tunnel(compare, server, tunnelled):
    big = np.ones(BIG // 8)
    with by_ssh(server, TAKE) as (there, back):

        def bare():
            left = memoryview(big).cast("B")
            while left:
                left = left[there.write(left) :]
            assert back.read(1) == b"x"

        compare(
            "argument of 64 MiB by tunnel",
            lambda: sd.remotecall_fetch(len, tunnelled, big),
            bare,
            peer_name="ssh, same cipher",
            most=1.3,
            rounds=25,
        )


def bench_result_of_64_mib_by_tunnel(compare, server, tunnelled):
    with by_ssh(server, GIVE) as (there, back):

        def bare():
            there.write(b"x")
            room = memoryview(np.empty(BIG, "B"))
            done = 0
            while done < BIG:
                done += back.readinto(room[done:])

        compare(
            "result of 64 MiB by tunnel",
            lambda: sd.remotecall_fetch(the_big_one, tunnelled),
            bare,
            peer_name="ssh, same cipher",
            most=1.7,  # paramiko alone takes 1.2: it decrypts in this process; then a socket pair leads to the link
            rounds=25,
        )
