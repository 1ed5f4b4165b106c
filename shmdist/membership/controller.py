"""Process 1's side of the cluster: adds workers, announces them, removes them, and notes how each ended.

A worker comes in three steps: its process is launched, its link is made and proven, and it
is asked to join; then all are told of all. It goes when its link ends, which is where every
way of going leads: being asked to exit, being killed, or dying by itself.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from shmdist._log import Log
from shmdist.errors import (
    REMOVAL,
    SILENCE,
    LaunchWorkerError,
    ProcessExitedException,
    ShmdistError,
    describe_exit,
)
from shmdist.managers.base import ClusterManager, WorkerConfig, refusal
from shmdist.membership import relay
from shmdist.memory.limits import out_of_memory_kills
from shmdist.runtime.environment import host_identity
from shmdist.runtime.interrupts import current
from shmdist.runtime.node import Node, current_node
from shmdist.serialization import codec
from shmdist.transport import listener, versions
from shmdist.transport.link import Link, LinkClosed
from shmdist.transport.messages import WANT_VALUE, Join, Kind, PeerInfo
from shmdist.transport.versions import Versions

_EXIT_TIMEOUT = 3.0  # a worker gets to end when it is asked to, before it is killed
_EXIT_CAUSE_SECONDS = 0.5  # for a worker to end after its link: the thread that waits for it must go on soon
_ATEXIT = 1.0  # the same when the program ends
_FINALIZER_SECONDS = 1.0  # that finalizers of what is garbage get then, before the workers end
_log = Log("cluster")


class WorkerRecord:
    """What process 1 knows of a worker besides what all know."""

    __slots__ = ("config", "leaving", "manager", "oom_before", "pidfd")

    def __init__(self, manager: ClusterManager, config: WorkerConfig) -> None:
        self.manager = manager
        self.config = config
        self.leaving = False
        self.pidfd = -1
        self.oom_before = out_of_memory_kills()


class ClusterController:
    """Process 1's side of the cluster; a part of its node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.members: dict[int, WorkerRecord] = {}  # under `changing`, but for reads of one entry
        self.changing = threading.RLock()  # guards adding and removing: one at a time
        self.arriving: dict[int, PeerInfo] = {}  # workers that have joined and are not introduced yet
        self.next_pid = 2
        #: Workers whose going the program has asked for, or took note of by adding or removing others.
        self.settled: set[int] = set()
        #: One for all workers, where process 1's environment has none: texts have one hash on all.
        self.hash_seed = str(random.SystemRandom().randrange(1, 1 << 32))
        self.oom_told = 0  # how many of the system's kills for lack of memory are accounted for
        node.peers.find_exit_cause = self.find_exit_cause
        node.peers.lost_hooks.append(self.on_lost)
        node.router.register(
            Kind.RELAY, lambda frame: node.reactor.start(lambda: relay.serve(node, self.members, frame))
        )
        me = PeerInfo(1, host_identity(), _hostname(), os.getpid(), (), None)
        node.peers.members[1] = me
        atexit.register(self.at_exit)

    # ------------------------------------------------------------------ coming

    def add(self, manager: ClusterManager, params: dict[str, Any]) -> list[int]:
        """Launch, connect and take in the workers of `manager`."""
        topology = params["topology"]
        if not self.node.cookie:
            import secrets

            self.node.cookie = secrets.token_hex(32).encode()
        first = self.next_pid  # whatever happens, no half-made member stays
        gone = set(self.node.peers.leaving)
        joined: list[tuple[int, Any]] = []
        pids: list[int] = []
        failures: list[LaunchWorkerError] = []
        try:
            told = {"cookie": self.node.cookie.decode(), "hash_seed": self.hash_seed}
            launching = manager.launch({**params, **told})
            try:
                for config in launching:
                    try:
                        joined.append(self._connect(manager, config, params))
                    except LaunchWorkerError as error:
                        failures.append(error)  # the others are none the worse for it
            except LaunchWorkerError as error:
                failures.append(error)
            finally:
                if hasattr(launching, "close"):
                    launching.close()  # ends what has been started and is not up
            for pid, reply in joined:
                try:
                    self._take_in(pid, reply)
                    pids.append(pid)
                except LaunchWorkerError as error:
                    failures.append(error)
                    self._end([pid], 0.0)
        except BaseException:
            with contextlib.suppress(Exception):
                self._end(range(first, self.next_pid), 0.0)
            raise
        if pids:
            self.settled |= gone
        self._introduce(pids, topology, params["lazy"])
        if failures:
            failure = failures[0]
            if len(failures) > 1:
                text = f"{len(failures)} launches failed; the first: {failure.message}"
                failure = LaunchWorkerError(text, causes=failures)
            failure.pids = tuple(pids)
            raise failure
        return pids

    def _connect(
        self, manager: ClusterManager, config: WorkerConfig, params: dict[str, Any]
    ) -> tuple[int, Any]:
        """Connect to a launched worker, and ask it to join; its answer is not waited for."""
        thread_state = current()
        pid, self.next_pid = self.next_pid, self.next_pid + 1
        phase = "connect"
        connection = None
        try:
            connection = manager.connect(pid, config)
            phase = "handshake"
            machine = listener.authenticate_as_client(connection, self.node.cookie, 1)
            self._check_versions(pid, config, Versions(machine.peer_version, machine.peer_python))
            thread_state.enter()  # Ctrl-C is for the waits before and after what follows
        except BaseException as error:
            self._dismiss(manager, pid, config)
            if connection is not None:
                connection.close()
            if isinstance(error, LaunchWorkerError) or not isinstance(error, Exception):
                raise
            raise LaunchWorkerError(
                f"worker {pid} was launched, but could not be reached: {refusal(error)}",
                host=config.host,
                phase=phase,
            ) from error
        try:
            return pid, self._take_on(pid, connection, manager, config, params)
        finally:
            thread_state.leave()

    def _take_on(
        self,
        pid: int,
        connection: Connection,
        manager: ClusterManager,
        config: WorkerConfig,
        params: dict[str, Any],
    ) -> Any:
        """Make a worker a member, and ask it to join."""
        node = self.node
        member = self.members[pid] = WorkerRecord(manager, config)
        if hasattr(config.userdata, "close"):
            node.inherited.append(config.userdata)
        link = Link(connection, pid)
        if config.io is not None:
            for fd, error_stream, rest in zip(config.io, (False, True), config.io_rest, strict=True):
                node.outputs.add(fd, pid, error=error_stream, rest=rest)
                node.reactor.poller.add_output(fd)
        node.peers.add_link(link)
        if config.process is not None and hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                member.pidfd = config.process.pidfd = os.pidfd_open(config.process.pid)
                # What it wrote is read to its end though a child of its own may hold the link open.
                node.reactor.watch(member.pidfd, link.shut)
        join = Join(
            pid,
            params["lazy"],
            params["topology"],
            tuple(node.peers.members.values()),
            carried=link.bridged,
            prefix=sys.prefix if link.is_local else None,
            parent=None if config.process is None else os.getpid(),
        )
        return node.requests.request(pid, int(Kind.JOIN), 0, codec.dumps(join))

    @staticmethod
    def _check_versions(pid: int, config: WorkerConfig, theirs: Versions) -> None:
        """Refuse a worker whose versions do not go with this process's."""
        where = f"worker {pid}" + (f" on {config.host}" if config.host else "")
        why = versions.conflict(versions.own_versions(numpy=theirs.numpy is not None), theirs, where)
        if why is not None:
            raise LaunchWorkerError(why, host=config.host, phase="versions")

    @staticmethod
    def _dismiss(manager: ClusterManager, pid: int, config: WorkerConfig) -> None:
        """End a worker that was launched and is not to be a member."""
        with contextlib.suppress(Exception):
            manager.kill(pid, config)
        with contextlib.suppress(Exception):
            manager.manage(pid, config, "finalize")
        for fd in config.io or ():
            with contextlib.suppress(OSError):
                os.close(fd)
        if config.page is not None:
            config.page.close()
        if hasattr(config.userdata, "close"):
            with contextlib.suppress(OSError):
                config.userdata.close()

    def _take_in(self, pid: int, reply: Any) -> None:
        """Wait for a worker's answer to the invitation."""
        node = self.node
        timeout = float(os.environ.get("SHMDIST_WORKER_TIMEOUT", "60"))
        member = self.members[pid]
        thread_state = current()
        thread_state.enter()
        try:
            joined = node.requests.wait(reply, timeout)
        finally:
            thread_state.leave()
        if not joined:
            raise LaunchWorkerError(
                f"worker {pid} did not join within {timeout:g} s", host=member.config.host, phase="join"
            )
        try:
            info, told = node.requests.open(reply, "joining the cluster")
        except ProcessExitedException as error:
            raise LaunchWorkerError(
                f"worker {pid} ended while it joined: {error}", host=member.config.host, phase="join"
            ) from error
        self._check_versions(pid, member.config, Versions(*told))
        place = member.config.connect_at
        if not info.addresses and place is not None:  # a manager's own, which its workers may know to use
            info = info._replace(addresses=(place,))
        self.arriving[pid] = info
        if member.config.page is not None:
            node.pages[pid] = member.config.page

    def _introduce(self, pids: list[int], topology: str, lazy: bool) -> None:
        """Make the new workers known to all, and all to them.

        Process 1 counts them among its peers when all have been told, no earlier: a call that
        follows from that, on whichever process, finds that who is called is known there.
        """
        node, thread_state = self.node, current()
        new = {pid: self.arriving.pop(pid) for pid in pids if pid in self.arriving}
        _choose_links(new, {pid: self.members[pid].config for pid in pids if pid in self.members}, topology)
        with current(), node.lock:
            new = {pid: info for pid, info in new.items() if pid not in node.peers.lost}
            everybody = (*node.peers.members.values(), *new.values())
        payload = codec.dumps(everybody)
        for pid in list(self.members):
            link = node.peers.links.get(pid)
            if link is not None:
                with contextlib.suppress(LinkClosed), thread_state:
                    link.send(codec.frame(int(Kind.PEERS), 0, 0, 0, payload), thread_state.interrupted)
        with current(), node.lock:
            node.peers.members.update((pid, info) for pid, info in new.items() if pid not in node.peers.lost)
        for pid in pids:
            member = self.members.get(pid)
            if member is not None:
                member.manager.manage(pid, member.config, "register")
        for hook in list(node.peers.joined_hooks):
            hook(pids)
        if not lazy:
            self._connect_all(pids)

    def _connect_all(self, pids: list[int]) -> None:
        """Have the new workers connect to all older ones, and wait for it."""
        node, replies = self.node, []
        with current():
            try:
                for pid in pids:
                    older = [other for other in self.members if other < pid]
                    payload = codec.dumps_call(_connect_to, (older,), {})
                    replies.append(node.requests.request(pid, int(Kind.CALL), WANT_VALUE, payload))
                for reply in replies:
                    node.requests.wait(reply)
            except BaseException:
                for reply in replies:
                    node.requests.cancel(reply)
                raise

    # ------------------------------------------------------------------ going

    def fallen(self) -> list[int]:
        """Return the workers that have died since the program last added or removed some."""
        return sorted(self.node.peers.leaving - self.settled)

    def find_exit_cause(self, pid: int) -> BaseException:
        """Find out how a worker ended whose link did."""
        member = self.members.get(pid)
        node = self.node
        info = node.peers.members.get(pid)
        if member is None:
            return ProcessExitedException(pid)
        process = member.config.process
        exitcode = signal_name = None
        oom = False
        silent = pid in node.heartbeat.silent
        if silent:
            pass  # nobody is there to tell, and who waits has waited long enough
        elif process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_EXIT_CAUSE_SECONDS)
            exitcode, signal_name = describe_exit(getattr(process, "exit_status", process.poll)())
            oom = signal_name == "SIGKILL" and self._out_of_memory(member)
        elif hasattr(member.config.userdata, "wait"):  # its login tells, and has its last words
            exitcode, signal_name = describe_exit(member.config.userdata.wait(1.0))
        node.outputs.drain(pid)
        if member.config.page is not None:
            node.peers.last_progress[pid] = member.config.page.copy()
        return ProcessExitedException(
            pid,
            host=info.name if info is not None else member.config.host,
            ospid=member.config.ospid,
            exitcode=exitcode,
            signal=signal_name,
            stderr_tail=() if member.leaving else node.outputs.tail(pid),
            oom=oom,
            what=SILENCE if silent else REMOVAL if member.leaving else None,
        )

    def _out_of_memory(self, member: WorkerRecord) -> bool:
        """Return whether the system has ended a process for lack of memory that was no other worker."""
        told = max(self.oom_told, member.oom_before)
        if out_of_memory_kills() <= told:
            return False
        self.oom_told = told + 1
        return True

    def on_lost(self, pid: int) -> None:
        """Tell the other workers, and give back what this one had."""
        node = self.node
        payload = codec.dumps((pid, node.peers.lost[pid], node.peers.last_progress.get(pid)))
        for other, link in list(node.peers.links.items()):
            if other != pid:
                node.reactor.post(link, int(Kind.LOST), 0, 0, payload)
        member = self.members.pop(pid, None)
        self.arriving.pop(pid, None)
        if member is None:
            return
        for op in ("deregister", "finalize"):
            try:
                member.manager.manage(pid, member.config, op)
            except Exception:
                _log.exception("manage(%d, %r) failed", pid, op)
        if member.pidfd >= 0:
            node.reactor.unwatch(member.pidfd)
            member.config.process.pidfd = -1
            os.close(member.pidfd)
        for fd in node.outputs.fds(pid):
            node.outputs.close(fd)
        node.outputs.forget(pid)
        if member.config.page is not None:
            node.pages.pop(pid, None)
            member.config.page.close()
        if hasattr(member.config.userdata, "close"):
            node.inherited.remove(member.config.userdata)
            with contextlib.suppress(OSError):
                member.config.userdata.close()

    def ask_to_exit(self, pids: Sequence[int]) -> None:
        """Ask workers to end."""
        self.settled.update(pids)
        self.node.peers.leaving.update(pids)
        for pid in pids if not self.node.peers.exiting else ():
            for hook in list(self.node.peers.leaving_hooks):
                hook(pid)
        for pid in pids:
            member = self.members.get(pid)
            link = self.node.peers.links.get(pid)
            if member is None:
                continue
            member.leaving = True
            if link is not None:
                self.node.reactor.post(link, int(Kind.EXIT), 0, 0)

    def _end(self, pids: Sequence[int], patience: float) -> None:
        """Ask workers to end, kill those that do not in `patience` seconds, and wait for all."""
        self.ask_to_exit(pids)
        left = self._wait_gone(pids, patience)
        for pid in left:
            member = self.members.get(pid)
            if member is not None:
                _log.warning("worker %d did not end when asked; it is killed", pid)
                member.manager.kill(pid, member.config)
        left = self._wait_gone(left, 5.0)
        for pid in left:  # killed, and still its link is open: a child of its own holds it
            for link in list(self.node.peers.all_links.get(pid, ())):
                link.shut()
        self._wait_gone(left, 5.0)

    def _wait_gone(self, pids: Sequence[int], timeout: float) -> list[int]:
        """Wait until workers are gone; returns those that are not in time."""
        deadline = time.monotonic() + timeout
        thread_state = current()
        if thread_state.runtime_depth:
            thread_state.refresh_signal_handlers()
        pause = 0.001
        while True:
            left = [pid for pid in pids if pid in self.members]
            if not left or time.monotonic() >= deadline:
                return left
            if thread_state.has_deferred:
                thread_state.raise_deferred()
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)

    def remove(self, pids: Sequence[int], waitfor: float | None) -> None:
        """Remove workers; see :func:`rmprocs`."""
        if waitfor is None:
            self._end(pids, _EXIT_TIMEOUT)
            return
        self.ask_to_exit(pids)
        left = self._wait_gone(pids, waitfor)
        if left:
            self.node.reactor.start(lambda: self._end(left, 0.0))
            raise TimeoutError(f"workers {left} did not end within {waitfor:g} s; they are being killed")

    def at_exit(self) -> None:
        """End all workers with the program; promptly, silently, whatever they do."""
        node = self.node
        if node.peers.closed or os.getpid() != node.ospid:
            return
        with contextlib.suppress(BaseException):  # Ctrl-C, or no thread
            self._finalize()
        thread_state = current()
        thread_state.enter()
        try:
            node.peers.exiting = True
            try:
                self._end(list(self.members), _ATEXIT)
            except BaseException:
                for member in list(self.members.values()):
                    with contextlib.suppress(Exception):
                        member.manager.kill(0, member.config)
            node.outputs.finish()
            node.peers.closed = True
            node.reactor.close()
        finally:
            thread_state.interrupt_pending = False  # what Ctrl-C was for, has been done
            thread_state.leave()

    def _finalize(self) -> None:
        """Have finalizers of what is garbage run now: when Python runs them, the workers have ended.

        On this thread, as Python does, for there are objects that must not end on another one (Tk's). If that
        takes long, one may wait for a worker for ever: then they end all the same, and it gets an error.
        """
        if not self.members or not gc.isenabled():
            return
        over = threading.Lock()
        over.acquire()

        def watch() -> None:
            if not over.acquire(timeout=_FINALIZER_SECONDS):
                self._end(list(self.members), _ATEXIT)

        self.node.reactor.start(watch)
        try:
            gc.collect()
        finally:
            over.release()


def _choose_links(new: dict[int, PeerInfo], configs: dict[int, WorkerConfig], topology: str) -> None:
    """Enter which other workers each of the new ones may be connected with."""
    if topology == "all_to_all":
        return
    links: dict[int, frozenset[int]] = dict.fromkeys(new, frozenset())
    if topology == "custom":
        idents = {config.ident: pid for pid, config in configs.items()}
        for pid, config in configs.items():
            for ident in config.connect_idents or ():
                other = idents.get(ident)
                if other is not None:  # a connection that either side names is one of both
                    links[pid] |= {other}
                    links[other] |= {pid}
    for pid in new:
        new[pid] = new[pid]._replace(links=links[pid])


def _connect_to(pids: list[int]) -> None:
    """Make links to other workers; on a worker."""
    node = current_node()
    for pid in pids:
        with contextlib.suppress(ConnectionError, ShmdistError, ValueError):
            node.peers.link_to(pid)


def _hostname() -> str:
    import socket

    return socket.gethostname()
