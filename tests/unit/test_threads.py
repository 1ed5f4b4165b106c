"""The threads of a node, at their begin and their end."""

import threading

import pytest

from shmdist.runtime import daemon_thread, interrupts
from shmdist.runtime.daemon_thread import DaemonThread
from shmdist.runtime.own_calls import OwnCalls
from shmdist.runtime.threads import ThreadPool

#: Where a thread that has no memory for its first steps dies.
FIRST_STEPS = [
    (threading.Thread, "_bootstrap"),
    (threading.Thread, "_bootstrap_inner"),
    (threading.Event, "set"),
    (DaemonThread, "run"),
]


@pytest.fixture
def dying(monkeypatch):
    """Have threads but this one die where it is told."""
    monkeypatch.setattr("sys.unraisablehook", lambda told: None)
    monkeypatch.setattr("threading.excepthook", lambda told: None)
    me = threading.get_ident()

    def die(owner, name):
        original = owner.__dict__[name]

        def dies(self, *args):
            if threading.get_ident() != me:
                raise MemoryError
            return original(self, *args)

        monkeypatch.setattr(owner, name, dies)

    return die


@pytest.mark.parametrize("place", FIRST_STEPS, ids=lambda place: place[1])
def test_a_thread_that_dies_in_its_first_steps(dying, monkeypatch, place):
    before, done = threading.enumerate(), []
    dying(*place)
    dead = DaemonThread(lambda: done.append("dead"), "dead")
    with pytest.raises(RuntimeError, match="no memory for its first steps"):
        dead.start()
    assert threading.enumerate() == before
    monkeypatch.undo()
    living = DaemonThread(lambda: done.append(threading.current_thread()), "living")
    living.start()
    living.join(5)
    assert done == [living] and living.name == "living" and not living.is_alive()


class _Word:
    """A lock that tells when it has been asked for in vain 20 times."""

    def __init__(self, lock):
        self.lock, self.left, self.asked = lock, 20, threading.Event()

    def acquire(self, timeout):
        if self.lock.acquire(timeout=timeout):
            return True
        self.left -= 1
        if not self.left:
            self.asked.set()
        return False

    def release(self):
        self.lock.release()


def test_a_thread_that_begins_late_is_not_taken_for_dead(monkeypatch):
    monkeypatch.setattr(daemon_thread, "_MAX_LOOK_SECONDS", 0.001)
    done = threading.Event()
    late = DaemonThread(done.set, "late")
    late._word = _Word(late._word)
    original = threading.Thread._bootstrap_inner

    def begins_late(self):
        assert late._word.asked.wait(5)
        original(self)

    monkeypatch.setattr(threading.Thread, "_bootstrap_inner", begins_late)
    late.start()
    assert late._word.left <= 0 and done.wait(5)
    late.join(5)


@pytest.mark.parametrize(
    "place", [*FIRST_STEPS, (interrupts.ThreadState, "__init__")], ids=lambda place: place[1]
)
def test_a_job_that_a_thread_died_with(dying, monkeypatch, place):
    ends, done = threading.Event(), []
    threads = ThreadPool(lambda thread_state, woken: (woken(), ends.wait(5))[1])
    dying(*place)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="can't start new thread"):
            threads.start(lambda: done.append("lost"))
    threads.soon(lambda: done.append("late"))
    assert not threads.ensure_standby()
    assert (len(threads), threads.parked, done) == (0, set(), [])
    monkeypatch.undo()
    happened = threading.Event()
    threads.start(lambda: (done.append("new"), happened.set())[0])
    assert happened.wait(5) and threads.ensure_standby()
    ends.set()
    threads.close()
    assert threads.join(5.0)
    assert done == ["new", "late"]


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_a_call_made_while_the_thread_of_the_one_before_died(error):
    """The second one's thread finds nobody who has the turn."""
    done, jobs = [], []

    class Reactor:
        threads = ThreadPool(lambda thread_state, woken: None)

        def start(self, job):
            if not jobs:
                jobs.append(job)
                own.put(lambda: done.append("second"))
                raise error
            jobs.append(job)

    own = OwnCalls(Reactor())
    with pytest.raises(error):
        own.put(lambda: done.append("first"))
    _, follow = jobs
    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    follower.join(5)
    assert done == ["second"] and not follower.is_alive()


def test_the_turn_is_not_lost_when_no_thread_can_follow():
    inside, ends, done, jobs = threading.Event(), threading.Event(), [], []

    class Reactor:
        threads = ThreadPool(lambda thread_state, woken: None)

        def start(self, job):
            if len(jobs) == 2:
                raise MemoryError
            jobs.append(job)
            threading.Thread(target=job, daemon=True).start()

    def blocks():
        inside.set()
        assert ends.wait(5)

    own = OwnCalls(Reactor())
    own.put(lambda: own._call(blocks, (), {}))
    assert inside.wait(5)
    own._lock.acquire()  # the follower waits for it until there are two
    last = threading.Event()
    for job in (lambda: done.append(1), lambda: (done.append(2), last.set())[0]):
        own._waiting.append((0, job))
    own._followed = True
    own._lock.release()
    own._reactor.start(own._follow)
    assert last.wait(5) and done == [1, 2]
    ends.set()


@pytest.mark.parametrize(
    "step", [(threading.Thread, "_bootstrap_inner"), (threading.Event, "set"), (DaemonThread, "run")]
)
def test_a_thread_is_inside_the_runtime_from_its_first_step(monkeypatch, step):
    """A finalizer that runs there must not wait: it would wait for who waits for this thread to begin."""
    owner, name = step
    original, me, depths = owner.__dict__[name], threading.get_ident(), []

    def look(self, *args):
        if threading.get_ident() != me:
            depths.append(interrupts.current().runtime_depth)
        return original(self, *args)

    monkeypatch.setattr(owner, name, look)
    threads = ThreadPool(lambda thread_state: None)
    done = threading.Event()
    threads.start(done.set)
    assert done.wait(5) and depths[0] == 1
    monkeypatch.undo()
    others = []
    thread = threading.Thread(target=lambda: others.append(interrupts.current().runtime_depth))
    thread.start()
    thread.join()
    assert others == [0] and interrupts.current().runtime_depth == 0
    threads.close()
    assert threads.join(5)


def test_a_thread_that_is_just_being_made_is_not_waited_for():
    threads = ThreadPool(lambda interrupts, leave_post: leave_post())
    done = threading.Event()
    threads.start(done.set)
    assert done.wait(5)
    threads._all.add(threading.Thread(target=print))  # between its making and its start
    threads.close()
    assert threads.join(5.0)
