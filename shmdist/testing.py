"""A test suite for cluster managers."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from shmdist.calls import remotecall, remotecall_fetch
from shmdist.cluster import addprocs, cluster_cookie, interrupt, rmprocs
from shmdist.errors import ProcessExitedException, RemoteException
from shmdist.managers.base import ClusterManager, WorkerConfig
from shmdist.processes import workers
from shmdist.runtime.node import current_node
from shmdist.transport import listener

_SOON_SECONDS = 10.0  # that anything may take which has begun


class ContractError(AssertionError):
    """A cluster manager does not keep the contract; the text says in what, and what to do."""


class _Recorder(ClusterManager):
    """Passes everything on to the manager under test, and notes it."""

    def __init__(self, manager: ClusterManager) -> None:
        self.manager = manager
        self.configs: list[Any] = []
        self.ops: list[tuple[str, int]] = []
        self.killed: list[int] = []
        self.errors: list[str] = []
        self.by_pid: dict[int, WorkerConfig] = {}

    def default_params(self) -> dict[str, Any]:
        return self.manager.default_params()

    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        for config in self.manager.launch(params):
            _expect(
                isinstance(config, WorkerConfig),
                f"launch() must yield WorkerConfigs, and yielded {config!r:.80}",
            )
            _expect(
                all(config is not other for other in self.configs),
                "launch() yielded one WorkerConfig twice: each worker needs its own",
            )
            self.configs.append(config)
            yield config

    def manage(self, id: int, config: WorkerConfig, op: str) -> None:
        self.ops.append((op, id))
        with self._noted(f"manage({id}, config, {op!r})"):
            self.manager.manage(id, config, op)

    def kill(self, id: int, config: WorkerConfig) -> None:
        self.killed.append(id)
        with self._noted(f"kill({id}, config)"):
            self.manager.kill(id, config)

    def connect(self, id: int, config: WorkerConfig) -> Connection:
        self.by_pid[id] = config
        return self.manager.connect(id, config)

    @contextlib.contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the library logs it and goes on; here it is what is looked for
            self.errors.append(f"{what} raised {type(error).__name__}: {error}")

    def told(self, pid: int) -> list[str]:
        """Return what was told of a worker, in order."""
        return [op for op, id in self.ops if id == pid]


class _Suite:
    def __init__(self, manager: ClusterManager, params: dict[str, Any]) -> None:
        self.manager, self.params = manager, params
        self.recorder = _Recorder(manager)
        self.passed: list[str] = []

    @contextlib.contextmanager
    def workers(self) -> Iterator[list[int]]:
        """Launch, and end what is left afterwards."""
        self.recorder = _Recorder(self.manager)
        pids = addprocs(self.recorder, **self.params)
        try:
            _expect(bool(pids), "launch() yielded no worker")
            yield list(pids)
            _expect(not self.recorder.errors, "; ".join(self.recorder.errors))
        finally:
            left = [pid for pid in pids if pid in workers()]
            if left:
                rmprocs(*left)

    # ------------------------------------------------------------------ the checks

    def parameters(self) -> None:
        """`default_params` returns all common parameters, and a dictionary of its own each time."""
        mine = self.manager.default_params()
        missing = set(ClusterManager.default_params(self.manager)) - set(mine)
        _expect(
            not missing,
            f"default_params() lacks {', '.join(sorted(missing))}: add yours to super().default_params()",
        )
        mine["no such parameter"] = 1
        _expect(
            "no such parameter" not in self.manager.default_params(),
            "default_params() returns the same dictionary each time: one caller's change is all callers'",
        )

    def joining(self) -> None:
        """Each configuration is a process of its own, is connected to itself, and is told of once."""
        with self.workers() as pids:
            _expect(
                len(pids) == len(self.recorder.configs),
                f"launch() yielded {len(self.recorder.configs)} workers, and {len(pids)} joined",
            )
            seen: dict[tuple[Any, int], int] = {}
            for pid in pids:
                _expect(remotecall_fetch(_myid, pid) == pid, f"connect({pid}, ...) leads to another worker")
                info = current_node().peers.members[pid]
                other = seen.setdefault((info.host, info.ospid), pid)
                _expect(other == pid, f"workers {other} and {pid} are one process")
                _expect(
                    self.recorder.told(pid) == ["register"],
                    f"after joining, worker {pid} should have been told of by manage 'register' alone",
                )

    def secrecy(self) -> None:
        """The cookie is on no command line and in no environment, where others can read it."""
        with self.workers() as pids:
            for pid in pids:
                words = remotecall_fetch(_readable, pid)
                _expect(
                    not any(cluster_cookie() in word for word in words),
                    f"worker {pid} has the cookie on its command line or in its environment, where other "
                    "users can read it: send it on standard input",
                )

    def strangers(self) -> None:
        """`connect` can be asked again, and a worker lets in nobody who does not know the cookie."""
        with self.workers() as pids:
            for pid in pids:
                again = self.manager.connect(pid, self.recorder.by_pid[pid])
                try:
                    listener.authenticate_as_client(again, b"not the cookie", 1, _SOON_SECONDS)
                except Exception:
                    pass
                else:
                    again.close()
                    raise ContractError(f"worker {pid} lets in one who does not know the cookie")
                again = self.manager.connect(pid, self.recorder.by_pid[pid])
                try:
                    listener.authenticate_as_client(again, current_node().cookie, 1, _SOON_SECONDS)
                except Exception as error:
                    raise ContractError(
                        f"a second connection to worker {pid} cannot be made: {type(error).__name__}: {error}"
                    ) from error
                again.close()
                _expect(remotecall_fetch(abs, pid, -1) == 1, f"worker {pid} is the worse for a stranger")

    def calls(self) -> None:
        """Calls, large values, errors, and calls from one worker to another work."""
        with self.workers() as pids:
            big = bytes(1 << 20) * 3
            for pid in pids:
                _expect(remotecall_fetch(len, pid, big) == len(big), f"a large value to worker {pid}")
                _expect(remotecall_fetch(bytes, pid, 3 << 20) == big, f"a large value from worker {pid}")
                try:
                    remotecall_fetch(divmod, pid, 1, 0)
                except RemoteException as error:
                    _expect(isinstance(error, ZeroDivisionError), f"the error of worker {pid} is {error!r}")
                else:
                    raise ContractError(f"an error on worker {pid} was lost")
            for first, second in itertools.pairwise(pids):
                found = remotecall(remotecall_fetch, first, _myid, second).fetch(timeout=3 * _SOON_SECONDS)
                _expect(found == second, f"worker {first} calls worker {second}, and gets worker {found}")

    def interrupting(self) -> None:
        """`interrupt` ends what runs, harms no idle worker, and is told to `manage`."""
        with self.workers() as pids:
            pid = pids[0]
            call = remotecall(time.sleep, pid, 60)
            remotecall_fetch(abs, pid, -1)  # a lane of its own: the call before it has been read
            interrupt(*pids)
            try:
                call.fetch(timeout=_SOON_SECONDS)
            except RemoteException as error:
                _expect("KeyboardInterrupt" in str(error), f"the interrupted call ended in {error!r}")
            except TimeoutError:
                raise ContractError(f"interrupt({pid}) did not end the call that runs there") from None
            for each in pids:
                _expect("interrupt" in self.recorder.told(each), f"manage({each}, ..., 'interrupt')")
                try:
                    _expect(remotecall_fetch(abs, each, -1) == 1, "calls work after an interrupt")
                except (ProcessExitedException, RemoteException) as error:
                    raise ContractError(
                        f"worker {each} did not survive interrupt(): manage 'interrupt' must leave "
                        f"the process alone, or interrupt only the calls ({error})"
                    ) from error

    def removal(self) -> None:
        """A worker that is removed is told of, deregistered and finalized, and its process ends."""
        with self.workers() as pids:
            ends = [_ending(pid) for pid in pids]
            rmprocs(*pids)
            for pid, ended in zip(pids, ends, strict=True):
                self._expect_gone(pid, ended, "rmprocs")

    def death(self) -> None:
        """A worker that dies is found, whoever waits for it is told, and the others live."""
        with self.workers() as pids:
            pid, ended = pids[-1], _ending(pids[-1])
            call = remotecall(os.kill, pid, current_node().peers.members[pid].ospid, signal.SIGKILL)
            try:
                call.fetch(timeout=_SOON_SECONDS)
            except ProcessExitedException:
                pass
            except TimeoutError:
                raise ContractError(f"worker {pid} was killed, and nobody was told") from None
            self._expect_gone(pid, ended, "its death")
            for other in pids[:-1]:
                _expect(remotecall_fetch(abs, other, -1) == 1, f"worker {other} lives on")

    def killing(self) -> None:
        """`kill` ends a worker that does not listen any more."""
        with self.workers() as pids:
            pid, ended = pids[0], _ending(pids[0])
            ospid = current_node().peers.members[pid].ospid
            remotecall(os.kill, pid, ospid, signal.SIGSTOP)
            try:
                time.sleep(0.2)
                rmprocs(pid)
                _expect(pid in self.recorder.killed, f"worker {pid} left though it was stopped")
                self._expect_gone(pid, ended, "kill()")
            finally:
                if not ended():
                    _kill_here(ospid)

    def leaks(self) -> None:
        """Launching and removing leaves no descriptors and no threads in process 1."""
        counts: list[int] = []
        for _ in range(2):  # the first time may bring what stays
            with self.workers() as pids:
                remotecall_fetch(abs, pids[0], -1)
            deadline = time.monotonic() + _SOON_SECONDS
            while counts and _open() > counts[0] and time.monotonic() < deadline:
                time.sleep(0.02)
            counts.append(_open())
        _expect(
            counts[1] <= counts[0],
            f"each launch leaves {counts[1] - counts[0]} descriptors in process 1: close them at 'finalize'",
        )

    def _expect_gone(self, pid: int, ended: Callable[[], bool], why: str) -> None:
        deadline = time.monotonic() + _SOON_SECONDS
        while time.monotonic() < deadline:
            if ended() and self.recorder.told(pid)[-1:] == ["finalize"]:
                break
            time.sleep(0.01)
        told = [op for op in self.recorder.told(pid) if op != "interrupt"]
        _expect(ended(), f"the process of worker {pid} is still there after {why}")
        _expect(
            told == ["register", "deregister", "finalize"],
            f"after {why}, worker {pid} has been told of by {told}",
        )


_CHECKS = (
    "parameters",
    "joining",
    "secrecy",
    "strangers",
    "calls",
    "interrupting",
    "removal",
    "death",
    "killing",
    "leaks",
)


def check_manager(manager: ClusterManager, *, skip: Sequence[str] = (), **params: Any) -> list[str]:
    """Check that a cluster manager keeps the contract of `ClusterManager`.

    It launches workers about ten times. Best with a manager that launches two.

    Parameters
    ----------
    manager : ClusterManager
        What to check. Its ``launch`` is called once for each check.
    skip : sequence of str
        Checks that do not apply, say ``"killing"`` where nothing can be killed.
    **params
        Passed on to ``addprocs``.

    Returns
    -------
    list of str
        The names of the checks that were made: ``parameters``, ``joining``, ``secrecy``, ``strangers``,
        ``calls``, ``interrupting``, ``removal``, ``death``, ``killing``, ``leaks``.

    Raises
    ------
    ContractError
        The manager fails a check. No worker of it is left, unless it cannot end them.

    Notes
    -----
    Runs on process 1. Whether a worker's process has ended is seen for workers on this host
    alone; of others it is believed when their link has ended.

    Examples
    --------
    In the tests of a manager::

        from shmdist.testing import check_manager


        def test_contract():
            check_manager(MyManager(2))
    """
    if not isinstance(manager, ClusterManager):
        raise ContractError(f"{manager!r:.80} is no ClusterManager: derive its class from it")
    unknown = set(skip) - set(_CHECKS)
    if unknown:
        raise ValueError(f"there are no checks {sorted(unknown)}; there are {', '.join(_CHECKS)}")
    suite = _Suite(manager, params)
    for name in _CHECKS:
        if name in skip:
            continue
        check = getattr(suite, name)
        try:
            check()
        except ContractError as error:
            raise ContractError(f"{name}: {error}\n{inspect.getdoc(check)}") from error
        except Exception as error:
            raise ContractError(
                f"{name}: {type(error).__name__}: {error}\n{inspect.getdoc(check)}"
            ) from error
        suite.passed.append(name)
    return suite.passed


def _expect(condition: bool, text: str) -> None:
    if not condition:
        raise ContractError(text)


# Run on workers; they import this module.


def _myid() -> int:
    return current_node().pid


def _readable() -> list[str]:
    """Return what other users can read of this process."""
    words = [*os.environ.values()]
    with contextlib.suppress(OSError), open("/proc/self/cmdline") as file:
        words.append(file.read())
    with contextlib.suppress(OSError), open("/proc/self/environ") as file:
        words.append(file.read())
    return words


# Of this process.


def _open() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return threading.active_count()  # elsewhere than on Linux, threads are all that is counted


def _ending(pid: int) -> Callable[[], bool]:
    """Return a function that tells whether the process of a worker has ended."""
    node = current_node()
    info = node.peers.members[pid]
    if info.host != node.peers.members[1].host:
        return lambda: pid not in node.peers.members

    def ended() -> bool:
        try:
            with open(f"/proc/{info.ospid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            pass
        try:
            os.kill(info.ospid, 0)
        except ProcessLookupError:
            return True
        return False

    return ended


def _kill_here(ospid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(ospid, signal.SIGKILL)


__all__ = ["ContractError", "check_manager"]
