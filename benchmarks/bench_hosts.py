"""Workers that are reached by the network: direct TCP on one machine, beside bare sockets."""

import contextlib
import functools
import multiprocessing
import operator
import socket
from multiprocessing.connection import Client, Listener

import conftest
import numpy as np
import pytest

import shmdist as sd
from shmdist.wire import door

MIB = 1 << 20
BIG = 64 * MIB

measure = functools.partial(conftest.seconds, calls=200)


class ByTCP(sd.LocalManager):
    """Workers of this host that are reached as those of another one are: no AF_UNIX, no shared memory."""

    def default_params(self):
        return {**super().default_params(), "restrict": False}

    def connect(self, id, config):
        return door.knock(config.connect_at)


@pytest.fixture(scope="module")
def far():
    with sd.addprocs(ByTCP(1)) as [pid]:
        sd.remotecall_fetch(abs, pid, -1)
        from shmdist.runtime.node import current_node

        assert not current_node().links[pid].is_local
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
