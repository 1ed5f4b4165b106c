"""The interface of cluster managers: configurations, operations, connections, topologies."""

import dataclasses
import os
import subprocess
import sys
import time

import pytest

import shmdist as sd
from shmdist.membership.connector import PeerConnections
from shmdist.runtime.node import current_node
from tests.integration import helpers
from tests.integration.helpers import until, within


class Noting(sd.LocalManager):
    """A manager that notes what it is asked, and names its workers."""

    def __init__(self, n, connect=lambda ident: None, fail=None):
        super().__init__(n)
        self.ops, self.connected, self.killed, self.configs = [], [], [], []
        self._wanted, self._fail = connect, fail

    def launch(self, params):
        self.params = params
        for number, config in enumerate(super().launch(params)):
            config.ident = f"w{number}"
            config.connect_idents = self._wanted(config.ident)
            self.configs.append(config)
            yield config

    def connect(self, id, config):
        self.connected.append(id)
        if config.ident == self._fail:
            raise ConnectionError("no road")
        return super().connect(id, config)

    def manage(self, id, config, op):
        self.ops.append((op, id, config.ident))
        super().manage(id, config, op)

    def kill(self, id, config):
        self.killed.append(id)
        super().kill(id, config)


def test_the_fields_are_julias():
    wanted = (
        "io host port count exename exeflags userdata tunnel multiplex forward bind_addr sshflags max_parallel "
        "connect_at process ospid environ ident connect_idents enable_threaded_blas"
    )
    fields = {field.name: field.default for field in dataclasses.fields(sd.WorkerConfig)}
    assert list(fields)[: len(wanted.split())] == wanted.split()
    assert all(fields[name] is None for name in wanted.split())


def test_operations_in_their_order(fresh):
    manager = Noting(2)
    first, second = fresh(manager)
    assert manager.ops == [("register", first, "w0"), ("register", second, "w1")]
    assert manager.connected == [first, second]
    assert manager.params["cookie"] == sd.cluster_cookie() and "exename" in manager.params
    call = sd.remotecall(time.sleep, second, 30)
    assert sd.remotecall_fetch(abs, second, -1) == 1
    manager.ops.clear()
    sd.interrupt(second)
    assert manager.ops == [("interrupt", second, "w1")]
    with within(5), pytest.raises(sd.RemoteException, match="KeyboardInterrupt"):
        call.fetch()
    manager.ops.clear()
    sd.rmprocs(first)
    assert manager.ops == [("deregister", first, "w0"), ("finalize", first, "w0")]
    manager.ops.clear()
    sd.remote_do(os._exit, second, 3)
    until(lambda: len(manager.ops) == 2)
    assert manager.ops == [("deregister", second, "w1"), ("finalize", second, "w1")]
    assert manager.killed == []


def test_one_that_cannot_be_reached_is_killed_and_finalized(fresh):
    manager = Noting(2, fail="w0")
    with pytest.raises(sd.LaunchWorkerError, match="no road") as caught:
        fresh(manager)
    [second] = caught.value.pids
    first = manager.connected[0]
    assert caught.value.phase == "connect"
    assert manager.killed == [first]
    assert ("finalize", first, "w0") in manager.ops and ("register", first, "w0") not in manager.ops
    assert not helpers.is_alive(manager.configs[0].ospid)
    assert sd.remotecall_fetch(abs, second, -1) == 1
    sd.rmprocs(second)


def reaches(first, second):
    try:
        return sd.remotecall_fetch(sd.remotecall_fetch, first, sd.myid, second) == second
    except ConnectionError as error:
        assert "not connected in this cluster's topology" in str(error)
        return False


def test_a_custom_topology(fresh):
    """A connection that either side names is one of both; all others are none."""
    wanted = {"w0": ["w1"], "w1": [], "w2": ["w0", "nobody"], "w3": None}
    manager = Noting(4, connect=wanted.get)
    pids = fresh(manager, topology="custom")
    allowed = {(a, b) for a in range(4) for b in range(4) if a != b and reaches(pids[a], pids[b])}
    assert allowed == {(0, 1), (1, 0), (0, 2), (2, 0)}
    assert all(sd.remotecall_fetch(abs, pid, -1) == 1 for pid in pids)


def test_a_custom_topology_made_at_once(fresh):
    wanted = {"w0": ["w1"], "w1": [], "w2": []}
    pids = fresh(Noting(3, connect=wanted.get), topology="custom", lazy=False)
    links = sd.remotecall_fetch(links_of, pids[0])
    assert pids[1] in links and pids[2] not in links


def links_of():
    return sorted(current_node().peers.links)


class AtAPort(sd.ClusterManager):
    """A manager that says host and port of its workers, and has no `connect` of its own."""

    def __init__(self, n, **fields):
        self.n, self.fields, self.processes = n, fields, []

    def launch(self, params):
        for _ in range(self.n):
            process = subprocess.Popen(
                [sys.executable, "-m", "shmdist", "worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=helpers.ROOT,
            )
            self.processes.append(process)
            process.stdin.write(params["cookie"] + "\n")
            process.stdin.close()
            port = int(process.stdout.readline().partition(":")[2].partition("#")[0])
            process.stdout.close()
            yield sd.WorkerConfig(**{"port": port, "process": process, **self.fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"host": "127.0.0.1"},
        {"host": "somebody@localhost", "multiplex": True},
        {"host": "no.such.host.invalid", "bind_addr": "127.0.0.1"},
    ],
)
def test_host_and_port_are_enough(fresh, fields):
    manager = AtAPort(2, **fields)
    first, second = fresh(manager)
    assert sd.remotecall_fetch(sd.remotecall_fetch, first, sd.myid, second) == second
    sd.rmprocs(first, second)
    assert [process.wait(5) for process in manager.processes] == [0, 0]


def test_no_place_at_all_is_told(fresh):
    manager = AtAPort(1, host="127.0.0.1", port=None)
    with pytest.raises(sd.LaunchWorkerError, match="neither host and port nor connect_at"):
        fresh(manager)
    for process in manager.processes:
        process.kill()
        process.wait(5)


# ---------------------------------------------------------------------- a transport of its own, on workers too

WORKER = """
import os, socket, sys, threading
from multiprocessing.connection import Connection, Listener
import shmdist as sd

class Roads(sd.ClusterManager):
    asked = []

    def launch(self, params):
        return iter(())

    def connect(self, id, config):
        self.asked.append((id, config.connect_at))
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(config.connect_at[1])
        return Connection(sock.detach())

folder, number = sys.argv[1:]
path = os.path.join(folder, number)
sd.init_worker(sys.stdin.readline().strip(), Roads())
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen()
print("ready", flush=True)
while True:
    sock, _ = server.accept()
    sd.process_messages(Connection(sock.detach()), True)
"""


class ByFiles(sd.ClusterManager):
    """Workers that listen at sockets in a folder, by a protocol that only they know."""

    def __init__(self, n, folder):
        self.n, self.folder = n, folder

    def launch(self, params):
        for number in range(self.n):
            process = subprocess.Popen(
                [sys.executable, "-c", WORKER, str(self.folder), str(number)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=helpers.ROOT,
                start_new_session=True,
            )
            process.stdin.write(params["cookie"] + "\n")
            process.stdin.close()
            assert process.stdout.readline() == "ready\n"
            process.stdout.close()
            place = ("files", str(self.folder / str(number)))
            yield sd.WorkerConfig(host="localhost", process=process, ospid=process.pid, connect_at=place)

    def connect(self, id, config):
        import socket
        from multiprocessing.connection import Connection

        sock = socket.socket(socket.AF_UNIX)
        sock.connect(config.connect_at[1])
        return Connection(sock.detach())

    def kill(self, id, config):
        config.process.kill()

    def manage(self, id, config, op):
        if op == "finalize":
            config.process.wait(5)


def asked():
    return current_node().part(PeerConnections).manager.asked


def test_workers_connect_by_the_manager_given_to_init_worker(fresh, tmp_path):
    first, second = fresh(ByFiles(2, tmp_path))
    assert sd.remotecall_fetch(sd.remotecall_fetch, first, sd.myid, second) == second
    assert sd.remotecall_fetch(asked, first) == [(second, ("files", str(tmp_path / "1")))]
    with within(3):  # it need not be killed, though its main thread is the manager's own
        sd.rmprocs(first, second)


def test_where_the_manager_fails_process_1_joins_them(fresh, tmp_path):
    first, second = fresh(ByFiles(2, tmp_path))
    sd.remotecall_fetch(break_roads, first)
    assert sd.remotecall_fetch(sd.remotecall_fetch, first, sd.myid, second) == second
    sd.rmprocs(first, second)


def break_roads():
    def connect(id, config):
        raise ConnectionError("the road is closed")

    current_node().part(PeerConnections).manager.connect = connect


def test_the_contract(tmp_path):
    from shmdist.testing import check_manager

    class Fresh(ByFiles):
        def launch(self, params):
            for path in tmp_path.iterdir():
                path.unlink()
            return super().launch(params)

    assert "strangers" in check_manager(Fresh(2, tmp_path), skip=["killing"])


def test_process_messages_the_other_way_round(fresh, tmp_path):
    """One worker connects to another by itself, and speaks first."""
    first, second = fresh(ByFiles(2, tmp_path))
    sd.remotecall_fetch(dial_and_process, first, str(tmp_path / "1"))
    until(lambda: second in sd.remotecall_fetch(links_of, first))
    assert sd.remotecall_fetch(sd.remotecall_fetch, first, sd.myid, second) == second
    assert sd.remotecall_fetch(sd.remotecall_fetch, second, sd.myid, first) == first
    assert sd.remotecall_fetch(asked, first) == sd.remotecall_fetch(asked, second) == []
    sd.rmprocs(first, second)


def dial_and_process(path):
    import socket
    from multiprocessing.connection import Connection

    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    sd.process_messages(Connection(sock.detach()), incoming=False)
