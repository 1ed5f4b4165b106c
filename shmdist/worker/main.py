"""The life of a worker: it listens, joins a cluster, serves, and ends.

How it ends
-----------
It ends when process 1 says so, and also when process 1 is gone, however it went and
whatever this process is doing:

- the link to process 1 ends: whoever reads finds it, and ends the process;
- process 1's own death is watched as well, for a child that it forked may still hold the
  link open;
- the host of process 1 has been silent for too long (``runtime.heartbeat``);
- a thread that holds the interpreter for minutes lets nobody read.  So the pipe on which
  the cookie came is kept, and the system is asked to kill this process when its other
  end closes.  A worker on another host is killed when the SSH server's process of its login
  ends, and by its watchdog when the path is cut (``worker.watchdog``).
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from shmdist import errors
from shmdist._log import Log
from shmdist.membership import connector
from shmdist.membership.connector import PeerConnections
from shmdist.memory.progress_page import ProgressPage
from shmdist.runtime import imports, resource_tracker
from shmdist.runtime import node as node_module
from shmdist.runtime.daemon_thread import DaemonThread
from shmdist.runtime.environment import buffer_c_output_by_line, host_identity, own_address, prepare
from shmdist.runtime.interrupts import current
from shmdist.runtime.node import Node
from shmdist.serialization import codec
from shmdist.transport import listener
from shmdist.transport.link import Link, LinkClosed
from shmdist.transport.messages import Frame, Hello, Join, Kind, PeerInfo
from shmdist.transport.versions import own_versions
from shmdist.worker.main_module import MainModule

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from typing import TextIO

    from shmdist.worker.watchdog import Watchdog

_log = Log("worker")
_MAIN_THREAD_SECONDS = 0.2  # a busy main thread gets to come back when the worker is told to end
_EXIT_TIMEOUT = 3.0  # that a worker whose listener is closed may take to end, and process 1 to tell


def start_worker(
    cookie: str | bytes | None = None,
    out: TextIO | None = None,
    *,
    bind_addr: str | None = None,
    port: int = 0,
    local: bool = False,
    close_stdin: bool = True,
    stderr_to_stdout: bool = False,
) -> None:
    """Be a worker: listen, tell where, and serve until process 1 ends it or is gone.

    Cluster managers run it in the processes that they start. It does not return.

    Parameters
    ----------
    cookie : str or bytes, optional
        The cluster's cookie. ``None`` reads it from standard input: one line, either the
        cookie or a JSON object with the member ``cookie``.
    out : file, optional
        Where the line ``shmdist_worker:PORT#ADDRESS`` is written; default ``sys.stdout``.
    bind_addr : str, optional
        The address to listen on by TCP; default: the loopback interface. ``"auto"``: one by
        which other hosts reach this one.
    port : int
        The TCP port; 0 lets the system choose.
    local : bool
        Listen by AF_UNIX alone. The line's port is then 0, and its address ``unix:NAME``.
    close_stdin : bool
        Give the worker's functions an empty standard input.
    stderr_to_stdout : bool
        Send what goes to standard error to standard output.

    Notes
    -----
    A worker that nobody takes into a cluster within ``SHMDIST_WORKER_TIMEOUT`` seconds
    (60) ends.

    References
    ----------
    Julia manual, `start_worker` in "Distributed Computing".

    Examples
    --------
    Usually from a shell, with the cookie on standard input::

        $ echo mycookie | python -m shmdist worker
        shmdist_worker:9009#127.0.0.1
    """
    be_worker(
        cookie,
        out,
        bind_addr=bind_addr,
        port=port,
        local=local,
        close_stdin=close_stdin,
        stderr_to_stdout=stderr_to_stdout,
    )


def be_worker(
    cookie: str | bytes | None,
    out: TextIO | None,
    *,
    bind_addr: str | None,
    port: int,
    local: bool = False,
    close_stdin: bool,
    stderr_to_stdout: bool = False,
    watchdog: Watchdog | None = None,
) -> None:
    """Do what :func:`start_worker` says, with a watchdog when there is one."""
    settings: dict[str, Any] = {}
    if cookie is None:
        line = sys.stdin.readline().strip()
        if not line:
            sys.exit("shmdist worker: the cookie must come on standard input, as one line")
        settings = json.loads(line) if line.startswith("{") else {"cookie": line}
        cookie = settings.pop("cookie")
    if isinstance(cookie, str):
        cookie = cookie.encode()
    local = settings.get("local", local)
    bind_addr = settings.get("bind_addr", bind_addr)
    prepare(settings, close_stdin, stderr_to_stdout)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = MainModule()
    node = init_worker(cookie)
    if "authkey" in settings:
        resource_tracker.set_authkey(settings["authkey"])
        resource_tracker.use_tracker_of_process_1(node)
    if watchdog is not None:
        node.part(WorkerProcess).watchdog = watchdog
        node.inherited.append(watchdog)
    if "page" in settings:
        page = node.tasks.page = ProgressPage(settings["page"])
        page.close_fd()
    me = node.part(WorkerProcess)
    address = me.listen(local, bind_addr, port, tell_unix=bool(settings.get("tell_unix")))
    out = out or sys.stdout
    out.write(f"shmdist_worker:{address}\n")
    out.flush()
    _load_for_errors()
    me.serve()


def _load_for_errors() -> None:
    """Load what tells an error: when one has come there may be no descriptor left to read a module by."""
    import traceback  # noqa: F401 - as above

    package = sys.modules["shmdist"]
    for name in errors.__all__:
        setattr(package, name, getattr(errors, name))


def init_worker(cookie: str | bytes, manager: object = None) -> Node:
    """Make this process a worker that is not yet a member of a cluster.

    For cluster managers with a transport of their own, which then give each connection
    to :func:`process_messages`. Others call :func:`start_worker`.

    Parameters
    ----------
    cookie : str or bytes
        The cluster's cookie.
    manager : ClusterManager, optional
        Its ``connect`` makes this worker's connections to others. Where it cannot, or there is
        none, process 1 joins them.

    Raises
    ------
    RuntimeError
        This process is in a cluster already.
    """
    if node_module._current is not None and (
        node_module._current.peers.links or node_module._current.pid != 1
    ):
        raise RuntimeError(
            "this process belongs to a cluster already: init_worker comes before anything else"
        )
    if isinstance(cookie, str):
        cookie = cookie.encode()
    imports.one_at_a_time()
    node = Node(0)
    node.peers.is_worker = True
    node.cookie = cookie
    node.part(PeerConnections).manager = manager
    node_module.set_current(node)
    return node


class WorkerProcess:
    """The threads and handlers of a worker around its node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.doors: list[listener.Listener] = []
        self.addresses: list[tuple[str, Any]] = []
        self.born = time.monotonic()
        self._dialing = threading.Lock()  # guards the making of links to peers; not held while one reads
        node.peers.connector = self.connect_peer
        node.peers.master_gone = self.end_now
        for kind, handler in (
            (Kind.HELLO, self._on_hello),
            (Kind.JOIN, self._on_join),
            (Kind.PEERS, self._on_peers),
            (Kind.LOST, self._on_lost),
            (Kind.EXIT, self._on_exit),
        ):
            node.router.register(kind, handler)
        self.watchdog: Watchdog | None = None
        self._lazy = True
        self.stopping = False
        self.serving = False  # on the main thread, which ends the process in order
        self._known: dict[int, PeerInfo] = {}

    # ------------------------------------------------------------------ listening

    def listen(self, local: bool, bind_addr: str | None, port: int, *, tell_unix: bool = False) -> str:
        """Open the doors; returns ``PORT#ADDRESS`` for the line that tells where, or both addresses."""
        unix = listener.private_address()
        self._open("AF_UNIX", unix)
        self.addresses.append(("unix", unix))
        by_unix = f"unix:{unix.replace(chr(0), '@')}"
        if local:
            return f"0#{by_unix}"
        host = own_address() if bind_addr == "auto" else bind_addr or "127.0.0.1"
        family = "AF_INET6" if ":" in host else "AF_INET"
        address = self._open(family, (host, port))
        self.addresses.append(("tcp", (host, address[1])))
        return f"{address[1]}#{host}#{by_unix}" if tell_unix else f"{address[1]}#{host}"

    def _open(self, family: str, address: Any) -> Any:
        node = self.node
        opened = listener.Listener(
            family, address, node.cookie, lambda: node.pid, node.reactor.start, self._admit
        )
        self.doors.append(opened)
        DaemonThread(opened.run, "shmdist-listener").start()
        return opened.address

    def _admit(self, connection: Connection) -> None:
        """Take a proven connection; its first frame says who it is."""
        link = Link(connection, -1)
        self.node.reactor.add(link)

    def _on_hello(self, frame: Frame) -> None:
        hello: Hello = pickle.loads(frame.body)
        frame.link.pid = hello.pid
        if hello.host != host_identity():  # relayed: no memory is shared with it, whatever the socket
            frame.link.is_local, frame.link.sharing = False, self.node.sharing.copies
        node = self.node
        with node.lock:
            node.peers.all_links.setdefault(hello.pid, set()).add(frame.link)
            if hello.pid in node.peers.lost:
                frame.link.shut()
                return
            node.peers.links.setdefault(hello.pid, frame.link)

    # ------------------------------------------------------------------ membership

    def _on_join(self, frame: Frame) -> None:
        join: Join = pickle.loads(frame.body)
        node = self.node
        node.peers.pid = join.pid
        self._lazy = join.lazy
        node.heartbeat.carried = join.carried
        me = PeerInfo(
            join.pid, host_identity(), socket.gethostname(), os.getpid(), tuple(self.addresses), None
        )
        self._learn(join.peers)
        if frame.link.pid == -1:
            self._on_hello_from_master(frame.link)
        if self.watchdog is not None:
            self.watchdog.watch(frame.link.socket, node.heartbeat.carried)
        # Where the interpreter is process 1's own, so is its numpy: no need to look for that.
        mine = own_versions(numpy=join.prefix != sys.prefix)
        node.reactor.post(frame.link, int(Kind.RESULT), 0, frame.call_id, codec.dumps((me, tuple(mine))))
        if join.parent is not None:
            self._watch_parent(join.parent)

    def _on_hello_from_master(self, link: Link) -> None:
        link.pid = 1
        self.node.peers.all_links.setdefault(1, set()).add(link)
        self.node.peers.links.setdefault(1, link)

    def _on_peers(self, frame: Frame) -> None:
        peers: tuple[PeerInfo, ...] = pickle.loads(frame.body)
        new = self._learn(peers)
        for hook in self.node.peers.joined_hooks:
            hook(new)
        if not self._lazy:
            # Of two workers the younger connects, so that each pair gets one link.
            self.node.reactor.soon(lambda: self._connect_all([pid for pid in new if pid < self.node.pid]))

    def _connect_all(self, pids: list[int]) -> None:
        for pid in pids:
            if self._may_connect(pid):
                with contextlib.suppress(Exception):  # it may be gone by now; a call will tell
                    self.connect_peer(pid)

    def _learn(self, peers: tuple[PeerInfo, ...]) -> list[int]:
        node = self.node
        new = []
        with node.lock:
            for peer in peers:
                if peer.pid not in node.peers.lost and peer.pid not in node.peers.members:
                    node.peers.members[peer.pid] = peer
                    new.append(peer.pid)
        return new

    def _on_lost(self, frame: Frame) -> None:
        pid, error, words = pickle.loads(frame.body)
        node = self.node
        if words is not None:
            node.peers.last_progress[pid] = (
                words  # before the news: the thread that waits for it reads these next
            )
        node.peers.reported_exits[pid] = error
        links = list(node.peers.all_links.get(pid, ()))
        if not links:
            node.reactor.soon(lambda: node.peers.lose(pid, error))
        for link in links:
            link.shut()  # what it wrote is read to its end all the same

    def _may_connect(self, pid: int) -> bool:
        peer, me = self.node.peers.members.get(pid), self.node.peers.members.get(self.node.pid)
        if peer is None or me is None:
            return False
        return (me.links is None or pid in me.links) and (peer.links is None or self.node.pid in peer.links)

    def connect_peer(self, pid: int) -> Link:
        """Make a link to another worker."""
        node = self.node
        with self._dialing:
            link = node.peers.links.get(pid)
            if link is not None:
                return link
            node.peers.check_member(pid)
            if not self._may_connect(pid):
                raise ConnectionError(
                    f"processes {node.pid} and {pid} are not connected in this cluster's topology; "
                    f"call from process 1, or add workers with topology='all_to_all'"
                )
            peer = node.peers.members[pid]
            errors: list[str] = []
            for connection in connector.connections(node, peer, errors):
                try:
                    return self.introduce(connection, pid)
                except LinkClosed as error:
                    errors.append(str(error))
            relayed = connector.connect_via_relay(node, pid)
            if not isinstance(relayed, str):
                return relayed
            errors.append(relayed)
        node.peers.exit_cause_from_master(pid, _EXIT_TIMEOUT)  # it may be gone, and the news of it on its way
        if pid in node.peers.lost or pid in node.peers.reported_exits:
            raise copy.copy(node.peers.lost.get(pid) or node.peers.reported_exits[pid])
        raise ConnectionError(f"process {node.pid} cannot connect to process {pid}: {'; '.join(errors)}")

    def introduce(self, connection: Connection, pid: int) -> Link:
        """Say who we are by a connection that we have made, and that is proven; it is a link now."""
        node = self.node
        hello = codec.dumps(Hello(node.pid, node.peers.members[node.pid].host))
        with current():
            link = Link(connection, pid)
            try:
                link.send(codec.frame(int(Kind.HELLO), 0, 0, 0, hello))
            except LinkClosed:
                link.close()
                raise
            return node.peers.add_link(link)

    # ------------------------------------------------------------------ serving and ending

    def serve(self) -> None:
        """Serve on the main thread, then end the process."""
        node = self.node
        self.serving = True
        thread_state = current()
        thread_state.main = False
        thread_state.signalled = True
        signal.signal(signal.SIGINT, thread_state.on_signal)
        node.reactor.threads.ensure_standby()
        node.reactor.start(self._give_up_alone)
        node.reactor.serve()
        self.end()

    def _give_up_alone(self) -> None:
        """End when nobody takes this worker into a cluster; and see to C's buffers meanwhile."""
        timeout = float(os.environ.get("SHMDIST_WORKER_TIMEOUT", "60"))
        while not self.node.pid and time.monotonic() - self.born < timeout:
            time.sleep(0.05)
        if not self.node.pid:
            print(f"shmdist worker: nobody took it into a cluster within {timeout:g} s", file=sys.stderr)  # noqa: T201 - its master's log
            os._exit(1)
        buffer_c_output_by_line()

    def _watch_parent(self, ospid: int) -> None:
        """End with the process that started this one."""
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self.node.reactor.watch(os.pidfd_open(ospid), self.end_now)
                return

    def _on_exit(self, frame: Frame) -> None:
        self.stopping = True
        self.node.reactor.stop_serving()
        DaemonThread(self._end_late, "shmdist-end").start()

    def _end_late(self) -> None:
        """End though the main thread is busy."""
        time.sleep(_MAIN_THREAD_SECONDS)
        if self.node.tasks.running or not self.serving:
            self.end_now()
        time.sleep(2.0)  # the main thread is at its atexit handlers
        self.end_now()

    def end(self) -> None:
        """End in order: atexit handlers run, and finalizers, which may do what they may in user code."""
        current().runtime_depth = 0
        for opened in self.doors:
            opened.close()
        sys.exit(0)

    def end_now(self) -> None:
        """End at once, from any thread, whatever the others do."""
        with contextlib.suppress(Exception):
            self.node.flush_own_output()
        os._exit(0)


def process_messages(connection: Connection, incoming: bool = True) -> None:
    """Serve a connection that a custom transport made; returns at once.

    The program then waits, for ever: it ends when process 1 says so, or is gone.

    Parameters
    ----------
    connection : multiprocessing.connection.Connection
        Over a stream socket. It is the library's from now on.
    incoming : bool
        True when the other side speaks first, as process 1 always does: it must prove that it
        knows the cookie. False when this one does, as to another worker that it connects to.
        A connection whose other side does not know the cookie is closed.

    References
    ----------
    Julia manual, `process_messages` in "Distributed Computing".

    Examples
    --------
    In a worker of a manager with its own transport::

        init_worker(cookie)
        process_messages(my_connection)
        threading.Event().wait()
    """
    node = node_module.current_node()
    worker = node.part(WorkerProcess)

    def admit() -> None:
        try:
            if incoming:
                listener.check(connection, node.cookie, node.pid)
            else:
                machine = listener.authenticate_as_client(connection, node.cookie, node.pid)
                if node.pid and machine.peer_pid > 0:
                    worker.introduce(connection, machine.peer_pid)
                    return
        except Exception as error:
            _log.info("a connection of the manager's was refused: %s", error)
            return
        worker._admit(connection)

    node.reactor.threads.ensure_standby()
    node.reactor.start(admit)


__all__ = ["LinkClosed", "host_identity", "init_worker", "process_messages", "start_worker"]
