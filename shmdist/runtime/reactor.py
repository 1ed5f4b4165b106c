"""The reactor. One thread at a time, the leader, polls all connections; it resigns before it runs a call.

A hop from one thread to another costs as much as a hop between processes, so no thread
reads for another when that can be helped.

The lead
---------
One thread at a time reads the links of this process: the holder of ``_leader_lock``.
- A thread that waits for an answer takes the lead when it is free, and reads until its
  answer is there.  Answers to others that come meanwhile it hands out; calls that come
  it gives to other threads, for it must not be held up by them.
- A worker's main thread, in :meth:`serve`, reads and runs the calls itself, one after
  the other.  While it runs one it has given up the lead.
- A standby thread sleeps in the poller and takes the lead when a message comes while
  no thread reads.  It runs calls itself too, for another standby thread is behind it.

A thread that finds the lead taken waits in ``_followers``, and is woken when its answer
has come or when the reader leaves: then it reads.

*Whenever the lead is free and no follower has been woken to take it, the poller is
armed or a standby thread is awake that will look.*  Hence somebody always reads, no
matter what blocks, and a write that waits for the other side's reading makes progress.

Armed means for the ring segment (``transport.ring``) that its word says that nobody looks, and that
it was looked into once more after that was said. Who takes the lead says that he looks.

Late handing over
-----------------
Handing the reading over costs more than most calls, so it is done late. Each time the
lead is let go, `_turns` counts and `_last` notes when. A standby thread that is woken
within `OVERTAKE_SECONDS` of that naps: who let go is probably back in microseconds, to read on or
with the next of a queue of short calls, which belongs to the thread that is working
through it. It naps on while the count moves, the longer the faster, or while the thread that
let go is in no user's code, and reads when the lead has lain free for a whole nap: the call
that runs is a long one.
One thread naps at a time. While it does, nothing need be armed, for it will look by itself; so
when the lead changes hands very often, one is woken just to nap. Threads that wait for answers
cut the nap short.

Errors
------
*Whoever reads goes on reading, or gives up the lead, whatever raises*: `_holder` is the thread that
has it, from the statement after the taking to the one before the letting go. What was read stays in the
inbox until it is handed out. What raises outside of ``runtime.poll_set`` is raised where one waits.

*No call is run without a thread behind it that will read.* Where none can be had it is refused.

Death
-----
Whoever reads finds the end of a link or of a watched process; what follows is another
thread's (``Peers.link_ended``): it may wait for an exit code.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from shmdist._log import Log
from shmdist.errors import FinalizerError
from shmdist.runtime.interrupts import ThreadState, current
from shmdist.runtime.own_calls import OwnCalls
from shmdist.runtime.peers import Peers
from shmdist.runtime.poll_set import Events, PollSet
from shmdist.runtime.reserve import Reserve
from shmdist.runtime.serial_queues import Call, SerialQueues
from shmdist.runtime.threads import Attempt, ThreadPool, surely
from shmdist.runtime.waiting import Waiter, WakeCallback
from shmdist.transport.messages import Frame

SPIN_SECONDS = 50e-6  # a reader polls before it sleeps
OVERTAKE_SECONDS = 1e-3  # a call may run before the reading is taken over from it
_MAX_NAPS = 20  # so many times that, when the thread that had the reading runs no call
_MAX_NAP_SECONDS = 8 * OVERTAKE_SECONDS  # that it may run where it follows many short ones
_SHORT_CALLS_PER_SECOND = 10_000  # calls a second that are short, for that
_MAX_SLEEP_SECONDS = 1e6  # of one sleep: a system call takes no more than 24 days
_MAX_LEFT_CALLS = 3  # times that calls are left to it while it does not come
_log = Log("reactor")
_now = time.perf_counter
_yield = getattr(os, "sched_yield", lambda: None)


class Reactor(PollSet):
    """The threads of one process of the cluster."""

    # Rarely used ones. CPython keeps 29 others inline, where a call finds them sooner than in a dict.
    __slots__ = tuple(
        ["_events", "_housekeeping", "_kicker", "closing", "later", "outcomes", "own", "soon", "start"]
    )

    def __init__(self, peers: Peers, reserve: Reserve) -> None:
        super().__init__(peers, reserve)
        self._leader_lock = threading.Lock()  # held by the one thread that reads
        self._holder: ThreadState | None = None  # that thread
        self._inbox: deque[Any] = deque()  # tasks and operations read, not yet run; the leader's
        self._followers: deque[Waiter] = deque()  # woken to take the lead; append and pop are atomic
        self._leader: Waiter | None = None  # what the reading thread waits for itself
        self._turns = 0  # how often the lead was let go, more or less: it is counted without a lock
        self._last = 0.0  # when it was, last
        self._lively = 0.0  # and when it was some turns ago
        self._runner: ThreadState | None = None  # who gave up the lead last, to run a call
        self._napping = False  # a standby thread is awake and will try the lead
        self._left = 0  # how often calls were left to a worker's main thread since it last read
        self._main: ThreadState | None = None  # a worker's main thread
        self._main_waiter: Waiter | None = None  # a worker's main thread, waiting for the lead or a job
        self._main_jobs: deque[Call] = deque()
        self.lanes = SerialQueues(reserve)
        self.threads = ThreadPool(self._stand_by, self.poller.wake)
        self.start, self.soon, self.later = self.threads.start, self.threads.soon, self.threads.later
        self.own = OwnCalls(self)
        #: What is done when an outcome has come: callbacks of futures, which are users' code.
        self.outcomes = OwnCalls(self)
        self._kicker = WakeCallback(self.poller.kick)
        self._arm, self._disarm = self.poller.arm, self.poller.disarm
        self.closing = False

    def connect(self, events: Events) -> None:
        """Be told what to call; before the first link."""
        self._events = events
        self._housekeeping = surely(events.woken)

    def __repr__(self) -> str:
        lead = f"lead={'held' if self._leader_lock.locked() else 'free'} links={len(self._links)}"
        return f"<Reactor {lead} inbox={len(self._inbox)} {self.lanes!r} {self.threads!r}>"

    # ------------------------------------------------------------------ outcomes

    def complete(self, waiter: Waiter) -> None:
        """Complete a waiter from any thread; its thread may be asleep, or reading. Raises nothing."""
        waiter.done = True
        try:
            if waiter.locks:
                waiter.wake()
            # The thread that reads need not wake itself.
            if self._leader is waiter and not current().leading:
                self.poller.kick()
        except Exception:
            waiter.wake()
            self.poller.kick()

    # ------------------------------------------------------------------ the lead

    def _take(self) -> bool:
        """Take the lead if it is free."""
        if self._leader_lock.acquire(False):
            try:
                self._disarm()
                inbound = self.rings.inbound
                if inbound is not None:
                    inbound.mark_awake()
            except BaseException:
                self._release(promote=True)
                raise
            return True
        return False

    def _arm_standby(self, left: bool = False) -> None:
        """Let the next message wake a standby thread, and also what is there already or `left` unrun."""
        self._arm()
        inbound = self.rings.inbound
        if (inbound is not None and inbound.mark_asleep()) or left:
            self.poller.nudge()

    def _release(self, *, promote: bool) -> None:
        """Give up the lead, and see to it that somebody reads.

        `promote` wakes a follower to do so; without it this thread will soon be back.
        """
        held = True
        self._holder = None
        try:
            # Asked while the lead is still held: the inbox is its holder's.
            left = bool(self._inbox)
            turns = self._turns = self._turns + 1
            last = self._last = _now()
            if not turns & 3:
                # Many in a short time: a standby thread that naps beside them makes arming needless.
                left = left or last - self._lively < OVERTAKE_SECONDS
                self._lively = last
            self._leader_lock.release()
            held = False
            if promote:
                if self._followers:
                    try:
                        self._followers.popleft().wake()
                        return
                    except IndexError:
                        pass  # it has left
                waiter = self._main_waiter
                if waiter is not None:
                    waiter.wake()
                    return
            if not self._napping:
                self._arm_standby(left)
        except Exception:
            if held:
                self._leader_lock.release()
            self._wake_all()

    def _wake_all(self) -> None:
        """See to it that somebody reads, by the plainest means."""
        self._napping = False
        for waiter in [*self._followers, self._main_waiter]:
            if waiter is not None:
                waiter.wake()
        self.poller.nudge()

    def _recover(self, thread_state: ThreadState) -> None:
        """Give up the lead after an error if it is this thread's still."""
        if self._holder is thread_state:
            if self._leader is not None:
                self._resign(self._leader, thread_state)
            self._release(promote=True)

    # ------------------------------------------------------------------ waiting threads

    def wait(self, waiter: Waiter, timeout: float | None = None, *, spin: float = SPIN_SECONDS) -> bool:
        """Wait until `waiter` is done, reading the links meanwhile.

        The caller is inside the runtime (``thread_state.runtime_depth`` > 0).

        Parameters
        ----------
        waiter : Waiter
            A reply, or anything else that somebody will complete.
        timeout : float, optional
            Seconds, after which it returns False.
        spin : float
            Seconds to poll before sleeping; none for what takes longer, whose worker may want the processor.

        Raises
        ------
        BaseException
            What a handler of a signal raises; the waiter is as it was.
        """
        thread_state = current()
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if waiter.done:
                return True
            if self._holder is thread_state:
                raise FinalizerError("a finalizer cannot wait here: it is on the thread that reads messages")
            if thread_state.has_deferred:
                thread_state.raise_deferred()
                continue
            left = -1.0 if deadline is None else min(deadline - time.monotonic(), _MAX_SLEEP_SECONDS)
            if deadline is not None and left <= 0:
                return False
            if self._take() or self._follow(waiter, left, thread_state):
                self._holder = thread_state
                try:
                    self._lead(waiter, left, thread_state, spin)
                except BaseException:  # of a signal handler set a moment ago, or no memory
                    self._recover(thread_state)
                    raise

    def _resign(self, waiter: Waiter, thread_state: ThreadState) -> None:
        """Take note that this thread reads for `waiter` no more; it holds the lead still."""
        thread_state.leading = False
        self._leader = None
        if not waiter.kicked:
            waiter.remove(self._kicker)

    def _lead(self, waiter: Waiter, timeout: float, thread_state: ThreadState, spin: float) -> None:
        """Read with the lead held, until `waiter` is done or something else wants the thread."""
        self._leader = waiter
        if not waiter.kicked:
            waiter.add(self._kicker)
        thread_state.kick = self.poller.kick
        thread_state.leading = True
        poll, inbox, looked = self._poll, self._inbox, False
        came, spin_until = True, 0.0  # the time is looked at only when nothing has come
        until = _now() + timeout if timeout >= 0 else float("inf")
        while not waiter.done and not thread_state.has_deferred and not inbox:
            if poll(0):
                came = True
                if timeout >= 0 and _now() > until:  # answers to others may come without a pause
                    break
            elif came or _now() < spin_until:
                if came:
                    came, spin_until = False, _now() + spin
                inbound = self.rings.inbound
                if inbound is None or not inbound.spin():
                    _yield()
            elif not looked:
                thread_state.refresh_signal_handlers()
                looked = True
            elif not poll(timeout if timeout < 0 else max(0.0, until - _now())):
                break
        self._resign(waiter, thread_state)
        if not inbox:
            self._release(promote=True)
            return
        mine: list[Any] = []
        try:
            while inbox:
                item = inbox[0]
                if type(item) is Frame or not self._hand_off(item):
                    mine.append(item)
                del inbox[0]
        except BaseException:
            inbox.extendleft(reversed(mine))
            raise
        if not mine:
            self._release(promote=waiter.done)
            return
        self._release(promote=False)  # they never block: operations and refusals
        for item in mine:
            self._begin(item, thread_state)
        if waiter.done and self._followers:
            self._pass_on()

    def _follow(self, waiter: Waiter, timeout: float, thread_state: ThreadState) -> bool:
        """Sleep until `waiter` is done or the lead is this thread's; True with the lead."""
        thread_state.refresh_signal_handlers()
        lock = threading.Lock()
        lock.acquire()
        waiter.add(lock)
        thread_state.waits_for = waiter
        leads = False
        try:
            self._followers.append(waiter)
            # Looked at again now that the reader can see us: it may have left before.
            if not waiter.done and not thread_state.has_deferred and not (leads := self._take()):
                lock.acquire(timeout=timeout)
        except BaseException:
            self._unfollow(waiter, lock, thread_state)
            self._pass_on()
            raise
        try:
            self._unfollow(waiter, lock, thread_state)
        except Exception:
            self._unfollow(waiter, lock, thread_state)
        if leads or (not waiter.done and not thread_state.has_deferred and self._take()):
            return True
        self._pass_on()
        return False

    def _unfollow(self, waiter: Waiter, lock: Any, thread_state: ThreadState) -> None:
        """Take back what `_follow` has entered; may be done again."""
        with contextlib.suppress(ValueError):
            self._followers.remove(waiter)
        thread_state.waits_for = None
        waiter.remove(lock)

    def _pass_on(self) -> None:
        """Pass on the lead that may have been this thread's to take, and that it does not need."""
        if not self._leader_lock.locked():
            try:
                self._followers.popleft().wake()
            except IndexError:
                self._arm_standby()

    # ------------------------------------------------------------------ serving threads

    def serve(self) -> None:
        """Serve as a worker's main thread until the node is closed."""
        thread_state = self._main = current()
        thread_state.runtime_depth = 1
        waiter = Waiter()
        while not self.closing:
            try:
                if self._take():
                    self._left = 0
                    self._holder = thread_state
                    self._serve(thread_state, waiter, forever=True)
                else:
                    self._wait_for_turn(thread_state, waiter)
            except Exception as error:
                self._reserve.open()
                _log.exception("an error in the main thread: %r", error)
                self._main_waiter = None
                self._recover(thread_state)

    def _wait_for_turn(self, thread_state: ThreadState, waiter: Waiter) -> None:
        """Wait, on a worker's main thread, for the lead to be free, or for a call."""
        lock = threading.Lock()
        lock.acquire()
        waiter.add(lock)
        try:
            self._main_waiter = waiter
            if not (self._main_jobs or not self._leader_lock.locked() or bool(self.closing)):
                lock.acquire()
        finally:
            self._main_waiter = None
            waiter.remove(lock)
        if self._main_jobs and not self._leader_lock.locked():
            # Whoever let go of it may have left it to this thread, which now runs something else.
            self._arm_standby(bool(self._inbox))
        while self._main_jobs:
            self._begin(self._main_jobs.popleft(), thread_state)

    def _serve(self, thread_state: ThreadState, waiter: Waiter, *, forever: bool, leave: bool = True) -> None:
        """Read and run calls with the lead held; returns without it.

        `leave` what comes to a worker's main thread if that is between two calls.
        """
        inbox, poll = self._inbox, self._poll
        self._leader = waiter
        spin_until = _now() + SPIN_SECONDS if forever else 0.0
        while not self.closing:
            if not forever and (self._main_waiter is not None or (leave and inbox and self._main_returns())):
                self._left += bool(inbox)
                break  # the main thread is free, and the better one: signals reach it
            if inbox:
                item = inbox.popleft()
                try:
                    self._leader = None
                    if not forever:
                        self._runner = thread_state
                    self._release(promote=False)
                    self._run(item, thread_state)
                except Exception as error:
                    self._refuse(item, error, thread_state)
                    raise
                finally:
                    if not forever and self._runner is thread_state:
                        self._runner = None
                if not self._take():
                    return
                self._holder = thread_state
                if forever:
                    self._left = 0
                self._leader = waiter
                spin_until = _now() + SPIN_SECONDS
            elif poll(0):
                if not inbox:
                    spin_until = _now() + SPIN_SECONDS
            elif _now() < spin_until:
                inbound = self.rings.inbound
                if inbound is None or not inbound.spin():
                    _yield()
            elif forever:
                poll(-1)
            else:
                break
        self._leader = None
        self._release(promote=True)

    def _run(self, item: Any, thread_state: ThreadState) -> None:
        """Run an operation, or a task and its lane after it, or refuse them."""
        if type(item) is Frame:
            try:
                self._events.operate(item)
            except Exception as error:
                self._fail(item, error)
            return
        if not self.threads.parked and not self.threads.ensure_standby() and item.refusal is None:
            item.refusal = self.threads.refusal("none could be started to read meanwhile")
        self.lanes.run(self._events, item, thread_state)

    def _begin(self, item: Any, thread_state: ThreadState) -> None:
        """Run an operation or a task, or answer with the error that kept it from being begun."""
        try:
            self._run(item, thread_state)
        except Exception as error:
            self._refuse(item, error, thread_state)

    def _refuse(self, item: Any, error: Exception, thread_state: ThreadState) -> None:
        """Answer with an error for what could not even be begun."""
        if type(item) is Frame:
            self._fail(item, error)
        else:
            item.refusal = item.refusal or error
            self.lanes.run(self._events, item, thread_state)

    def _hand_off(self, task: Call) -> bool:
        """Let another thread run `task`, a worker's main thread when it is free; False when it is refused."""
        if task.refusal is not None:
            return False
        waiter = self._main_waiter
        if waiter is not None and not self._main_jobs:
            self._main_jobs.append(task)
            waiter.wake()
            if self._main_waiter is waiter:
                return True
            # It has just left, and perhaps without the job.
            try:
                task = self._main_jobs.popleft()
            except IndexError:
                return True
        try:
            self.start(
                Attempt(
                    lambda: self._run(task, current()), lambda error: self._refuse(task, error, current())
                )
            )
        except Exception as error:
            task.refusal = self.threads.refusal(error)
            return False
        return True

    # ------------------------------------------------------------------ standing by

    def _stand_by(self, thread_state: ThreadState, leave_post: Callable[[], None]) -> None:
        """Sleep in the poller; when a message comes and no thread reads, serve until it is quiet."""
        woken = False
        try:
            try:
                if not self._leader_lock.locked() and not self._napping:
                    self._arm_standby()
                woken = self.poller.park()
            finally:
                leave_post()
            if self.closing:
                return
            if woken:
                self.poller.unwake()
                self.threads.guarded(self._housekeeping)
            # A main thread that was waited for in vain, or told us so, is busy with a long answer.
            leave = self._left < _MAX_LEFT_CALLS
            if leave and _now() - self._last < OVERTAKE_SECONDS and not self._followers:
                if self._napping:
                    return  # one is enough
                leave = self._wait_for_previous_leader()
            if self._take():
                self._holder = thread_state
                self._serve(thread_state, Waiter(), forever=False, leave=leave)
        except Exception as error:
            self._reserve.open()
            _log.exception("an error in a thread that stands by: %r", error)
            if woken:
                self.poller.wake()  # what was asked for may not be done yet
            self._recover(thread_state)
            if not self._leader_lock.locked():
                self._wake_all()
        self._reserve.fill()

    def _main_returns(self) -> bool:
        """Return whether a worker's main thread has ended a call, and is about to read or run the next."""
        main = self._main
        return main is not None and main.task is None and main.runtime_depth > 0

    def _wait_for_previous_leader(self) -> bool:
        """Leave the reading to the thread that had the lead a moment ago; False if it stays away long."""
        self._napping = True
        turns, naps, nap = self._turns - 1, 0, 0.0
        try:
            while not self.closing and not self._followers and self._left < _MAX_LEFT_CALLS:
                # Who runs no user code is about to be back, though the system may let it wait. A worker's
                # main thread: calls had better run there, where interrupts reach all of them. The last one to
                # run a call: with a thread more for each that is late, all are later still.
                either = self._main, self._runner
                late = any(state is not None and state.runtime_depth for state in either)
                if turns == self._turns and (not late or naps > _MAX_NAPS):
                    break
                if self._turns - turns > _SHORT_CALLS_PER_SECOND * nap > 0:
                    nap = min(2 * nap, _MAX_NAP_SECONDS)  # calls are short, and each look holds one up
                else:
                    # Where many calls block, each new one probably will as well.
                    nap = OVERTAKE_SECONDS if len(self.threads) < 8 else OVERTAKE_SECONDS / 10
                turns, naps = self._turns, naps + 1
                time.sleep(nap)
        finally:  # or nobody would be woken any more
            self._napping = False
        return naps <= _MAX_NAPS and self._left < _MAX_LEFT_CALLS

    def held_up(self) -> bool:
        """Take note that this thread waits to write an answer; False, for that is not to be given up."""
        if self._main is current():
            self._left = _MAX_LEFT_CALLS
        elif self._runner is current():
            self._runner = None
        return False

    # ------------------------------------------------------------------ end

    def stop_serving(self) -> None:
        """Let the main thread leave :meth:`serve`."""
        self.closing = True
        self._events.stopping()
        self.threads.close()
        waiter = self._main_waiter
        if waiter is not None:
            waiter.wake()
        self.poller.kick()
        self.poller.wake()

    def close(self) -> None:
        """End the threads, and close the links and the poller."""
        self._events.closing()
        self.rings.close()
        self.stop_serving()
        ended = self.threads.join(1.0)
        self._close_links()
        self._reserve.open()
        if ended:  # else one may still be in a system call with its descriptors
            self.poller.close()

    def abandon(self) -> None:
        """Give all descriptors back in a forked child, whose parent goes on using them."""
        self.closing = True
        self._abandon_links()
        self.rings.abandon()
        self.poller.close()
