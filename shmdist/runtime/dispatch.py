"""Who reads the links, who runs the calls, and when the reading changes hands.

A hop from one thread to another costs as much as a hop between processes, so no thread
reads for another when that can be helped.

The baton
---------
One thread at a time reads the links of this process: the holder of ``_baton``.
- A thread that waits for an answer takes the baton when it is free, and reads until its
  answer is there.  Answers to others that come meanwhile it hands out; calls that come
  it gives to other threads, for it must not be held up by them.
- A worker's main thread, in :meth:`serve`, reads and runs the calls itself, one after
  the other.  While it runs one it has let go of the baton.
- A standby thread sleeps in the poller and takes the baton when a message comes while
  nobody reads.  It runs calls itself too, for another standby thread is behind it.

A thread that finds the baton taken waits in ``_followers``, and is woken when its answer
has come or when the reader leaves: then it reads.

*Whenever the baton is free and no follower has been woken to take it, the poller is
armed or a standby thread is awake that will look.*  Hence somebody always reads, no
matter what blocks, and a write that waits for the other side's reading makes progress.

Armed means for the mailbox (``wire.mailbox``) that its word says that nobody looks, and that
it was looked into once more after that was said. Who takes the baton says that he looks.

Late handing over
-----------------
Handing the reading over costs more than most calls, so it is done late. Each time the
baton is let go, `_turns` counts and `_last` notes when. A standby thread that is woken
within `GRACE` of that naps: who let go is probably back in microseconds, to read on or
with the next of a queue of short calls, which belongs to the thread that is working
through it. It naps on while the count moves, and reads when the baton has lain free for a
whole nap: the call that runs is a long one. While it naps nothing need be armed, for it
will look by itself; so when the baton changes hands very often, one is woken just to nap.
Threads that wait for answers cut the nap short.

Death
-----
Whoever reads finds the end of a link or of a watched process; what follows is another
thread's (``node.link_ended``): it may wait for an exit code.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shmdist._log import Log
from shmdist.runtime.lanes import Lanes
from shmdist.runtime.owncalls import OwnCalls
from shmdist.runtime.replies import Operation
from shmdist.runtime.sources import Sources
from shmdist.runtime.strand import Cell, Kicker, Strand, current
from shmdist.runtime.threads import Threads
from shmdist.wire.messages import HAS_REFS, Frame, Kind

if TYPE_CHECKING:
    from shmdist.runtime.node import Node
    from shmdist.runtime.task import Task

SPIN = 50e-6  # seconds a reader polls before it sleeps
GRACE = 1e-3  # seconds a call may run before the reading is taken over from it
_NAPS = 20  # so many times that, when the thread that had the reading runs no call
_PATIENCE = 3  # times that calls are left to it while it does not come
_CALL, _OP, _RESULT, _CANCEL = int(Kind.CALL), int(Kind.OP), int(Kind.RESULT), int(Kind.CANCEL)
_log = Log("dispatch")
_now = time.perf_counter
_yield = getattr(os, "sched_yield", lambda: None)


class Dispatcher(Sources):
    """The threads of one process of the cluster."""

    __slots__ = ("_kicker", "closing", "later", "own", "start")  # as in Node

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._baton = threading.Lock()  # held by the one thread that reads
        self._inbox: deque[Any] = deque()  # tasks and OP frames read, not yet run; the baton's holder's
        self._followers: deque[Cell] = deque()  # woken to take the baton; append and pop are atomic
        self._leader: Cell | None = None  # what the reading thread waits for itself
        self._turns = 0  # how often the baton was let go, more or less: it is counted without a lock
        self._last = 0.0  # when it was, last
        self._lively = 0.0  # and when it was some turns ago
        self._napping = False  # a standby thread is awake and will try the baton
        self._left = 0  # how often calls were left to a worker's main thread since it last read
        self._main: Strand | None = None  # a worker's main thread
        self._main_cell: Cell | None = None  # a worker's main thread, waiting for the baton or a job
        self._main_jobs: deque[Callable[[], None]] = deque()
        self._lanes = Lanes()
        self.threads = Threads(self._stand_by)
        self.start, self.later = self.threads.start, self.threads.later  # run a job on another thread
        self.own = OwnCalls(self)
        self._kicker = Kicker(self.poller.kick)
        self._arm, self._disarm = self.poller.arm, self.poller.disarm
        self.closing = False

    def __repr__(self) -> str:
        baton = "held" if self._baton.locked() else "free"
        sizes = f"links={len(self._links)} followers={len(self._followers)} inbox={len(self._inbox)}"
        return f"<Dispatcher baton={baton} {sizes} {self._lanes!r} {self.threads!r}>"

    # ------------------------------------------------------------------ what was read

    def _route(self, frame: Frame) -> None:
        """Give a frame to who waits for it; never runs user code, never blocks."""
        kind = frame.kind
        if frame.flags & HAS_REFS and not self._node.arrived(frame):
            return
        if kind == _RESULT:
            reply = self._node.pending.pop(frame.call_id, None)
            if reply is None:
                self._node.unclaimed(frame)
                return
            reply.frame = frame
            try:
                callback = reply.callback
                if callback is not None:
                    reply.callback = None  # a Future that holds the reply must not be held by it
                    callback(reply)
            finally:
                reply.done = True
                if reply.locks:
                    reply.wake()
        elif kind == _CALL:
            task = self._node.tasks.accept(frame)
            if frame.lane and not self._lanes.enter(task):
                return  # it follows the one before it in its lane
            task.ticket = frame.link.calls_read
            frame.link.calls_read += 1
            self._inbox.append(task)
        elif kind == _OP:
            node, link, call_id = self._node, frame.link, frame.call_id
            node.waiting[link.pid, call_id] = Operation(node, link, call_id)  # it can be withdrawn now
            self._inbox.append(frame)
        else:
            self._node.control(frame)

    def complete(self, cell: Cell) -> None:
        """Complete a cell from any thread; its waiter may be asleep, or reading."""
        cell.done = True
        if cell.locks:
            cell.wake()
        # The thread that reads need not wake itself.
        if self._leader is cell and not current().leading:
            self.poller.kick()

    # ------------------------------------------------------------------ the baton

    def _take(self) -> bool:
        """Take the baton if it is free."""
        if self._baton.acquire(False):
            self._disarm()
            box = self.mail.box
            if box is not None:
                box.wake()
            return True
        return False

    def _rest(self, left: bool = False) -> None:
        """Let the next message wake a standby thread, and also what is there already or `left` unrun."""
        self._arm()
        box = self.mail.box
        if (box is not None and box.sleep()) or left:
            self.poller.nudge()

    def _release(self, *, promote: bool) -> None:
        """Let go of the baton, and see to it that somebody reads.

        `promote` wakes a follower to do so; without it this thread will soon be back.
        """
        # Asked while the baton is still held: the inbox is its holder's.
        left = bool(self._inbox)
        turns = self._turns = self._turns + 1
        last = self._last = _now()
        if not turns & 3:
            # Many in a short time: a standby thread that naps beside them makes arming needless.
            left = left or last - self._lively < GRACE
            self._lively = last
        self._baton.release()
        if promote:
            if self._followers:
                try:
                    self._followers.popleft().wake()
                    return
                except IndexError:
                    pass  # it has left
            cell = self._main_cell
            if cell is not None:
                cell.wake()
                return
        if not self._napping:
            self._rest(left)

    # ------------------------------------------------------------------ waiting threads

    def wait(self, cell: Cell, timeout: float | None = None, *, spin: float = SPIN) -> bool:
        """Wait until `cell` is done, reading the links meanwhile.

        The caller is inside the runtime (``strand.depth`` > 0).

        Parameters
        ----------
        cell : Cell
            A reply, or anything else that somebody will complete.
        timeout : float, optional
            Seconds, after which it returns False.
        spin : float
            Seconds to poll before sleeping: none for what takes longer, for those who work on it may
            want the processor.

        Raises
        ------
        BaseException
            What a handler of a signal raises; the cell is as it was.
        """
        strand = current()
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if cell.done:
                return True
            if strand.pending:
                strand.deliver()
                continue
            left = -1.0
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
            if self._take() or self._follow(cell, left, strand):
                try:
                    self._lead(cell, left, strand, spin)
                except BaseException:  # of a handler that was set a moment ago (`Strand.look`)
                    if strand.leading:
                        self._let_go(cell, strand)
                        self._release(promote=True)
                    raise

    def _let_go(self, cell: Cell, strand: Strand) -> None:
        """Take note that this thread reads for `cell` no more; it holds the baton still."""
        strand.leading = False
        self._leader = None
        if not cell.kicked:
            cell.remove(self._kicker)

    def _lead(self, cell: Cell, timeout: float, strand: Strand, spin: float) -> None:
        """Read with the baton held, until `cell` is done or something else wants the thread."""
        self._leader = cell
        if not cell.kicked:
            cell.add(self._kicker)
        strand.kick = self.poller.kick
        strand.leading = True
        poll, inbox, looked = self._poll, self._inbox, False
        spin_until = _now() + spin
        until = spin_until + timeout if timeout >= 0 else float("inf")
        while not cell.done and not strand.pending and not inbox:
            if poll(0):
                spin_until = _now() + spin
                if spin_until > until:  # answers to others may come without a pause
                    break
            elif _now() < spin_until:
                box = self.mail.box
                if box is None or not box.watch():
                    _yield()
            elif not looked:
                strand.look()
                looked = True
            elif not poll(timeout if timeout < 0 else max(0.0, until - _now())):
                break
        self._let_go(cell, strand)
        if not inbox:
            self._release(promote=True)
            return
        operations = []
        for item in inbox:
            if type(item) is Frame:
                operations.append(item)
            else:
                self._hand_off(item)
        inbox.clear()
        if not operations:
            self._release(promote=cell.done)
            return
        # Operations never block, so they are run here.
        self._release(promote=False)
        for frame in operations:
            self._node.operate(frame)
        if cell.done and self._followers:
            try:
                self._followers.popleft().wake()
            except IndexError:
                pass

    def _follow(self, cell: Cell, timeout: float, strand: Strand) -> bool:
        """Sleep until `cell` is done or the baton is this thread's; True with the baton."""
        strand.look()
        lock = threading.Lock()
        lock.acquire()
        cell.add(lock)
        strand.cell = cell
        self._followers.append(cell)
        leads = False
        # Looked at again now that the reader can see us: it may have left before.
        if not cell.done and not strand.pending:
            leads = self._take()
            if not leads:
                lock.acquire(timeout=timeout)
        with contextlib.suppress(ValueError):
            self._followers.remove(cell)
        strand.cell = None
        cell.remove(lock)
        if not leads:
            if not cell.done and not strand.pending and self._take():
                return True
            if not self._baton.locked():
                # It was ours to take, but there is no need: pass it on.
                try:
                    self._followers.popleft().wake()
                except IndexError:
                    self._rest()
        return leads

    # ------------------------------------------------------------------ serving threads

    def serve(self) -> None:
        """Serve as a worker's main thread until the node is closed."""
        strand = self._main = current()
        strand.depth = 1
        cell = Cell()
        while not self.closing:
            if self._take():
                self._left = 0
                self._serve(strand, cell, forever=True)
                continue
            lock = threading.Lock()
            lock.acquire()
            cell.add(lock)
            self._main_cell = cell
            if not (self._main_jobs or not self._baton.locked() or bool(self.closing)):
                lock.acquire()
            self._main_cell = None
            cell.remove(lock)
            if self._main_jobs and not self._baton.locked():
                # Whoever let go of it may have left it to this thread, which now runs something else.
                self._rest(bool(self._inbox))
            while self._main_jobs:
                self._main_jobs.popleft()()

    def _serve(self, strand: Strand, cell: Cell, *, forever: bool, leave: bool = True) -> None:
        """Read and run calls with the baton held; returns without it.

        `leave` what comes to a worker's main thread if that is between two calls.
        """
        inbox, poll = self._inbox, self._poll
        self._leader = cell
        spin_until = _now() + SPIN if forever else 0.0
        while not self.closing:
            if not forever and (self._main_cell is not None or (leave and inbox and self._main_returns())):
                self._left += bool(inbox)
                break  # the main thread is free, and the better one: signals reach it
            if inbox:
                item = inbox.popleft()
                if not self.threads.parked:
                    self.threads.ensure_standby()
                self._leader = None
                self._release(promote=False)
                self._run(item, strand)
                if not self._take():
                    return
                if forever:
                    self._left = 0
                self._leader = cell
                spin_until = _now() + SPIN
            elif poll(0):
                spin_until = _now() + SPIN
            elif _now() < spin_until:
                box = self.mail.box
                if box is None or not box.watch():
                    _yield()
            elif forever:
                poll(-1)
            else:
                break
        self._leader = None
        self._release(promote=True)

    def _run(self, item: Any, strand: Strand) -> None:
        """Run an operation, or a task and its lane after it."""
        if type(item) is Frame:
            self._node.operate(item)
            return
        task: Task | None = item
        while task is not None:
            self._node.tasks.run(task, strand)
            task = self._lanes.leave(task) if task.frame.lane else None

    def _hand_off(self, task: Task) -> None:
        """Let another thread run `task`: a worker's main thread when it is free."""
        cell = self._main_cell
        if cell is not None and not self._main_jobs:
            self._main_jobs.append(lambda: self._run(task, current()))
            cell.wake()
            if self._main_cell is not cell:
                # It has just left, and perhaps without the job.
                with contextlib.suppress(IndexError):
                    self.start(self._main_jobs.popleft())
            return
        self.start(lambda: self._run(task, current()))

    # ------------------------------------------------------------------ standing by

    def _stand_by(self, strand: Strand) -> None:
        """Sleep in the poller; when a message comes and nobody reads, serve until it is quiet."""
        if not self._baton.locked():
            self._rest()
        woken = self.poller.park()
        self.threads.woken()
        if self.closing:
            return
        if woken:
            self.poller.unwake()
            self.threads.guarded(self._node.housekeeping)
        # A main thread that was waited for in vain, or told us so, is busy with a long answer.
        leave = self._left < _PATIENCE
        if leave and _now() - self._last < GRACE and not self._followers:
            leave = self._nap()
        if self._take():
            self._serve(strand, Cell(), forever=False, leave=leave)
        if self._node.has_output:
            self._node.print_output()

    def _main_returns(self) -> bool:
        """Tell whether a worker's main thread has ended a call, and is about to read or run the next."""
        main = self._main
        return main is not None and main.task is None and main.depth > 0

    def _nap(self) -> bool:
        """Leave the reading to the thread that had the baton a moment ago; False if it stays away long."""
        self._napping = True
        turns, naps = -1, 0
        while not self.closing and not self._followers and self._left < _PATIENCE:
            # A worker's main thread that runs no user code is about to be back, though the system may
            # let it wait: calls had better run there, where interrupts reach all of them.
            main = self._main
            if turns == self._turns and (main is None or not main.depth or naps > _NAPS):
                break
            turns, naps = self._turns, naps + 1
            # Where many calls block, each new one is probably going to block as well.
            time.sleep(GRACE if len(self.threads) < 8 else GRACE / 10)
        self._napping = False
        return naps <= _NAPS and self._left < _PATIENCE

    def held_up(self) -> bool:
        """Take note that this thread waits to write an answer; False, for that is not to be given up."""
        if self._main is current():
            self._left = _PATIENCE
        return False

    # ------------------------------------------------------------------ end

    def stop_serving(self) -> None:
        """Let the main thread leave :meth:`serve`."""
        self.closing = True
        self._node.heart.close()
        self.threads.close()
        cell = self._main_cell
        if cell is not None:
            cell.wake()
        self.poller.kick()
        self.poller.wake()

    def close(self) -> None:
        """End the threads, and close the links and the poller."""
        self._node.sharing.keeper.close()
        self.mail.close()
        self.stop_serving()
        ended = self.threads.join(1.0)
        for link in list(self._links.values()):
            self.poller.remove(link.fd)
            link.close()
        self._links.clear()
        if ended:  # else one may still be in a system call with its descriptors
            self.poller.close()

    def abandon(self) -> None:
        """Give all descriptors back in a forked child, whose parent goes on using them."""
        self.closing = True
        for link in list(self._links.values()):
            link.abandon()
        self._links.clear()
        self.mail.abandon()
        self.poller.close()
