"""A worker's life: listen, be taken into a cluster, serve, end.

How it ends
-----------
It ends when process 1 says so, and also when process 1 is gone, however it went and
whatever this process is doing:

- the link to process 1 ends: whoever reads finds it, and ends the process;
- process 1's own death is watched as well, for a child that it forked may still hold the
  link open;
- a thread that holds the interpreter for minutes lets nobody read.  So the pipe on which
  the cookie came is kept, and the system is asked to kill this process when its other
  end closes.
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
from types import ModuleType
from typing import TYPE_CHECKING, Any

from shmdist._version import __version__
from shmdist.memory.segment import Page
from shmdist.runtime import node as node_module
from shmdist.runtime import roads
from shmdist.runtime.node import Node
from shmdist.runtime.strand import current
from shmdist.wire import codec, door
from shmdist.wire.link import Link, LinkClosed
from shmdist.wire.messages import Frame, Hello, Join, Kind, PeerInfo

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from typing import TextIO

_PATIENCE = 0.2  # seconds a busy main thread gets to come back when the worker is told to end


def host_identity() -> str:
    """Return a text that is equal for processes that can share memory and local sockets."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        # Abstract sockets belong to the network namespace, so it is part of the identity.
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}/{os.getuid()}"
    except OSError:
        import uuid

        return f"{uuid.getnode():x}/{socket.gethostname()}/{os.getuid()}"


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
        The address to listen on by TCP; default: one by which other hosts reach this one.
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
        shmdist_worker:9009#192.168.1.20
    """
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
    _prepare(settings, close_stdin, stderr_to_stdout)
    node = init_worker(cookie)
    if "page" in settings:
        page = node.settings["page"] = Page(settings["page"])
        page.close_fd()
    me = _Worker(node)
    address = me.listen(local, bind_addr, port)
    out = out or sys.stdout
    out.write(f"shmdist_worker:{address}\n")
    out.flush()
    me.serve()


def init_worker(cookie: str | bytes, manager: object = None) -> Node:
    """Make this process a worker that is not yet a member of a cluster.

    For cluster managers with a transport of their own, which then give each connection
    to :func:`process_messages`. Others call :func:`start_worker`.

    Parameters
    ----------
    cookie : str or bytes
        The cluster's cookie.
    manager : ClusterManager, optional
        Connects this worker with others, instead of the built-in sockets.

    Raises
    ------
    RuntimeError
        This process is in a cluster already.
    """
    if node_module._current is not None and (node_module._current.links or node_module._current.pid != 1):
        raise RuntimeError(
            "this process belongs to a cluster already: init_worker comes before anything else"
        )
    if isinstance(cookie, str):
        cookie = cookie.encode()
    node = Node(0)
    node.is_worker = True
    node.cookie = cookie
    node.settings["manager"] = manager
    node_module.set_current(node)
    return node


def _prepare(settings: dict[str, Any], close_stdin: bool, stderr_to_stdout: bool) -> None:
    """Make this process a place where users' functions can run."""
    if "path" in settings:
        sys.path[:] = settings["path"]
    if "pythonpath" in settings:  # ours was for finding shmdist; users' child processes get theirs
        if settings["pythonpath"] is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = settings["pythonpath"]
    if close_stdin:
        _keep_lifeline(settings.get("parent"))
    if stderr_to_stdout:
        os.dup2(1, 2)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    sys.argv = [""]


_lifeline = -1


def _keep_lifeline(parent: int | None) -> None:
    """Move standard input away, and die with its other end."""
    global _lifeline
    if parent is None:
        return
    try:
        import fcntl

        _lifeline = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        # Its process group, when that is its own: a Pool of the user's functions say, whose processes
        # wait for ever for a worker that was killed.
        owner = -os.getpid() if os.getpgrp() == os.getpid() else os.getpid()
        fcntl.fcntl(_lifeline, fcntl.F_SETOWN, owner)
        fcntl.fcntl(_lifeline, fcntl.F_SETSIG, int(signal.SIGKILL))
        flags = fcntl.fcntl(_lifeline, fcntl.F_GETFL)
        fcntl.fcntl(_lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)
    except (AttributeError, OSError, ImportError):
        pass  # not Linux: the link's end and the watched parent remain
    if os.getppid() != parent:
        os._exit(1)  # it died before we could ask to be told


class _Worker:
    """The threads and handlers of a worker around its node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.doors: list[door.Door] = []
        self.addresses: list[tuple[str, Any]] = []
        self.born = time.monotonic()
        self._dialing = threading.Lock()  # guards the making of links to peers; not held while one reads
        node.connector = self.connect_peer
        node.master_gone = self.end_now
        node.controls.update(
            {
                Kind.HELLO: self._on_hello,
                Kind.JOIN: self._on_join,
                Kind.PEERS: self._on_peers,
                Kind.LOST: self._on_lost,
                Kind.EXIT: self._on_exit,
            }
        )
        self.stopping = False
        self._known: dict[int, PeerInfo] = {}

    # ------------------------------------------------------------------ listening

    def listen(self, local: bool, bind_addr: str | None, port: int) -> str:
        """Open the doors; returns ``PORT#ADDRESS`` for the line that tells where."""
        unix = door.private_address()
        self._open("AF_UNIX", unix)
        self.addresses.append(("unix", unix))
        if local:
            return f"0#unix:{unix.replace(chr(0), '@')}"
        host = bind_addr or _own_address()
        family = "AF_INET6" if ":" in host else "AF_INET"
        address = self._open(family, (host, port))
        self.addresses.append(("tcp", (host, address[1])))
        return f"{address[1]}#{host}"

    def _open(self, family: str, address: Any) -> Any:
        node = self.node
        opened = door.Door(family, address, node.cookie, lambda: node.pid, node.dispatcher.start, self._admit)
        self.doors.append(opened)
        threading.Thread(target=opened.run, name="shmdist-door", daemon=True).start()
        return opened.address

    def _admit(self, connection: Connection) -> None:
        """Take a proven connection; its first frame says who it is."""
        link = Link(connection, -1)
        self.node.dispatcher.add(link)

    def _on_hello(self, frame: Frame) -> None:
        hello: Hello = pickle.loads(frame.body)
        frame.link.pid = hello.pid
        if hello.host != host_identity():  # relayed: no memory is shared with it, whatever the socket
            frame.link.is_local, frame.link.sharing = False, None
        node = self.node
        with node.lock:
            node.all_links.setdefault(hello.pid, set()).add(frame.link)
            if hello.pid in node.graves:
                frame.link.shut()
                return
            node.links.setdefault(hello.pid, frame.link)

    # ------------------------------------------------------------------ membership

    def _on_join(self, frame: Frame) -> None:
        join: Join = pickle.loads(frame.body)
        node = self.node
        node.pid = join.pid
        node.settings.update(join.settings)
        me = PeerInfo(
            join.pid, host_identity(), socket.gethostname(), os.getpid(), tuple(self.addresses), None
        )
        self._learn(join.peers)
        if frame.link.pid == -1:
            self._on_hello_from_master(frame.link)
        versions = (__version__, sys.version_info[:3])
        node.post(frame.link, int(Kind.RESULT), 0, frame.call_id, codec.dumps((me, versions)))
        if "parent" in join.settings:
            self._watch_parent(join.settings["parent"])

    def _on_hello_from_master(self, link: Link) -> None:
        link.pid = 1
        self.node.all_links.setdefault(1, set()).add(link)
        self.node.links.setdefault(1, link)

    def _on_peers(self, frame: Frame) -> None:
        peers: tuple[PeerInfo, ...] = pickle.loads(frame.body)
        new = self._learn(peers)
        for hook in self.node.joined_hooks:
            hook(new)
        if not self.node.settings.get("lazy", True):
            # Of two workers the younger connects, so that each pair gets one link.
            self.node.dispatcher.start(lambda: self._connect_all([pid for pid in new if pid < self.node.pid]))

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
                if peer.pid not in node.graves and peer.pid not in node.peers:
                    node.peers[peer.pid] = peer
                    new.append(peer.pid)
        return new

    def _on_lost(self, frame: Frame) -> None:
        pid, error, words = pickle.loads(frame.body)
        node = self.node
        if words is not None:
            node.last_words[pid] = words  # before the news: who waits for that looks at these next
        node.news[pid] = error
        links = list(node.all_links.get(pid, ()))
        if not links:
            node.dispatcher.start(lambda: node.lost(pid, error))
        for link in links:
            link.shut()  # what it wrote is read to its end all the same

    def _may_connect(self, pid: int) -> bool:
        peer, me = self.node.peers.get(pid), self.node.peers.get(self.node.pid)
        if peer is None or me is None:
            return False
        return (me.links is None or pid in me.links) and (peer.links is None or self.node.pid in peer.links)

    def connect_peer(self, pid: int) -> Link:
        """Make a link to another worker."""
        node = self.node
        with self._dialing:
            link = node.links.get(pid)
            if link is not None:
                return link
            node.check_member(pid)
            if not self._may_connect(pid):
                raise ConnectionError(
                    f"processes {node.pid} and {pid} are not connected in this cluster's topology; "
                    f"call from process 1, or add workers with topology='all_to_all'"
                )
            peer = node.peers[pid]
            here = node.peers[node.pid].host
            errors = []
            for family, place in roads.reachable(peer, here):
                try:
                    connection = door.knock((family, place), roads.DIRECT)
                    door.prove(connection, node.cookie, node.pid)
                except Exception as error:
                    errors.append(f"{family} {place}: {error}")
                    continue
                link = Link(connection, pid)
                link.send(codec.frame(int(Kind.HELLO), 0, 0, 0, codec.dumps(Hello(node.pid, here))))
                return node.add_link(link)
            relayed = roads.by_master(node, pid)
            if not isinstance(relayed, str):
                return relayed
            errors.append(relayed)
        node.hearsay(pid)  # it may be gone, and the news of it on its way
        if pid in node.graves or pid in node.news:
            raise copy.copy(node.graves.get(pid) or node.news[pid])
        raise ConnectionError(f"process {node.pid} cannot connect to process {pid}: {'; '.join(errors)}")

    # ------------------------------------------------------------------ serving and ending

    def serve(self) -> None:
        """Serve on the main thread, then end the process."""
        node = self.node
        strand = current()
        strand.main = False
        strand.signalled = True
        signal.signal(signal.SIGINT, strand.on_signal)
        node.dispatcher.threads.ensure_standby()
        node.dispatcher.start(self._give_up_alone)
        node.dispatcher.serve()
        self.end()

    def _give_up_alone(self) -> None:
        """End when nobody takes this worker into a cluster; and see to C's buffers meanwhile."""
        timeout = float(os.environ.get("SHMDIST_WORKER_TIMEOUT", "60"))
        while not self.node.pid and time.monotonic() - self.born < timeout:
            time.sleep(0.05)
        if not self.node.pid:
            print(f"shmdist worker: nobody took it into a cluster within {timeout:g} s", file=sys.stderr)  # noqa: T201
            os._exit(1)
        _buffer_c_output_by_line()

    def _watch_parent(self, ospid: int) -> None:
        """End with the process that started this one."""
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self.node.dispatcher.watch(os.pidfd_open(ospid), self.end_now)
                return

    def _on_exit(self, frame: Frame) -> None:
        self.stopping = True
        self.node.dispatcher.stop_serving()
        threading.Thread(target=self._end_late, name="shmdist-end", daemon=True).start()

    def _end_late(self) -> None:
        """End though the main thread is busy."""
        time.sleep(_PATIENCE)
        if self.node.tasks.running:
            self.end_now()
        time.sleep(2.0)  # the main thread is at its atexit handlers
        self.end_now()

    def end(self) -> None:
        """End in order: users' atexit handlers run."""
        for opened in self.doors:
            opened.close()
        sys.exit(0)

    def end_now(self) -> None:
        """End at once, from any thread, whatever the others do."""
        with contextlib.suppress(Exception):
            self.node.flush_own_output()
        os._exit(0)


def _buffer_c_output_by_line() -> None:
    """Let what C code prints come out at each newline, as Python's own output does."""
    with contextlib.suppress(Exception):
        import ctypes

        libc = ctypes.CDLL(None)
        libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, 1, 0)


def _own_address() -> str:
    """Return the address of this host by which others reach it."""
    # No packet is sent: connecting a datagram socket only chooses the interface.
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("192.0.2.1", 9))
        address: str = sock.getsockname()[0]
        return address
    return "127.0.0.1"


def process_messages(connection: Connection, incoming: bool = True) -> None:
    """Serve a connection that a custom transport made; returns at once.

    Parameters
    ----------
    connection : multiprocessing.connection.Connection
        Over a stream socket. It is the library's from now on.
    incoming : bool
        True when the other side connected: it must prove the cookie first.

    References
    ----------
    Julia manual, `process_messages` in "Distributed Computing".

    Examples
    --------
    In a worker of a manager with its own transport::

        init_worker(cookie)
        process_messages(my_connection)
    """
    node = node_module.current_node()
    worker = node.settings.get("worker")
    if worker is None:
        worker = node.settings["worker"] = _Worker(node)
    from shmdist.wire.door import _exchange
    from shmdist.wire.handshake import Acceptor

    def admit() -> None:
        if incoming:
            _exchange(connection, Acceptor(node.cookie, node.pid), b"", door.DEADLINE)
        worker._admit(connection)

    node.dispatcher.threads.ensure_standby()
    node.dispatcher.start(admit)


__all__ = ["LinkClosed", "host_identity", "init_worker", "process_messages", "start_worker"]
