"""Remote calls: where, when, and with what they run, and what comes back."""

import os
import threading

import numpy as np
import pytest

import shmdist as sd
from tests.integration.helpers import Script, log, meet_and_wait, note, take_log, within

FACTOR = 10  # a global of this module, used by a lambda below


def test_every_form_gives_the_value(cluster):
    pid = cluster[0]
    assert sd.remotecall(pow, pid, 2, 10).fetch() == 1024
    assert sd.remotecall_fetch(pow, pid, 2, 10) == 1024
    assert sd.remotecall_wait(pow, pid, 2, 10).fetch() == 1024
    assert sd.spawnat(pid, pow, 2, 10).fetch() == 1024
    assert sd.spawn(pow, 2, 10).fetch() == 1024
    assert sd.fetchfrom(pid, pow, 2, 10) == 1024
    assert sd.fetchany(pow, 2, 10) == 1024
    assert sd.remote(pow)(2, 10) == 1024
    assert sd.spawnat("any", pow, 2, 10).fetch() == 1024


def test_a_call_runs_on_the_process_named(cluster):
    for pid in [1, *cluster]:
        assert sd.remotecall_fetch(sd.myid, pid) == pid
        assert sd.remotecall(sd.myid, pid).fetch() == pid
        assert sd.fetchfrom(pid, os.getpid) == sd.spawnat(pid, os.getpid).fetch()


def test_spawn_runs_on_a_worker(cluster):
    assert sd.fetchany(sd.myid) in sd.workers()
    assert sd.spawn(sd.myid).fetch() in sd.workers()


def test_decorators_bind_the_name_to_the_future(cluster):
    @sd.spawnat(cluster[1])
    def there():
        return sd.myid()

    @sd.spawn
    def anywhere():
        return sd.myid()

    assert isinstance(there, sd.Future)
    assert there.fetch() == cluster[1]
    assert anywhere.fetch() in sd.workers()


def test_keywords_belong_to_the_function(cluster):
    def collect(*args, **kwargs):
        return args, kwargs

    names = {
        "f": 3,
        "where": 4,
        "pid": 1,
        "timeout": 2,
        "pool": 5,
        "args": 6,
        "self": 7,
        "name": 8,
        "function": 9,
    }
    expected = ((1,), names)
    for pid in (1, cluster[0]):
        assert sd.remotecall(collect, pid, 1, **names).fetch() == expected
        assert sd.remotecall_fetch(collect, pid, 1, **names) == expected
        assert sd.remotecall_wait(collect, pid, 1, **names).fetch() == expected
        assert sd.spawnat(pid, collect, 1, **names).fetch() == expected
        assert sd.fetchfrom(pid, collect, 1, **names) == expected
    assert sd.spawn(collect, 1, **names).fetch() == expected
    assert sd.fetchany(collect, 1, **names) == expected
    assert sd.remote(collect)(1, **names) == expected


def test_remote_do_runs_and_forgets(cluster):
    done = sd.RemoteChannel(lambda: sd.Channel(5))
    for pid in (1, cluster[0]):
        assert sd.remote_do(lambda channel, **names: channel.put(names), pid, done, f=1, where=2) is None
        assert done.take(timeout=5) == {"f": 1, "where": 2}


def test_lambdas_closures_and_globals_go_along(cluster):
    offset = 3
    assert sd.remotecall_fetch(lambda x: x * FACTOR + offset, cluster[0], 2) == 23

    def recursive(n):
        return 1 if n == 0 else n * recursive(n - 1)

    assert sd.remotecall_fetch(recursive, cluster[0], 5) == 120

    class Local:
        def __init__(self, value):
            self.value = value

        def double(self):
            return Local(self.value * 2)

    assert sd.remotecall_fetch(Local(4).double, cluster[0]).value == 8
    assert sd.remotecall_fetch(Local, cluster[0], 5).value == 5


def test_callables_of_all_kinds(cluster):
    import functools

    class Adder:
        def __init__(self, n):
            self.n = n

        def __call__(self, x):
            return x + self.n

    assert sd.remotecall_fetch(Adder(3), cluster[0], 4) == 7
    assert sd.remotecall_fetch(functools.partial(pow, 2), cluster[0], 5) == 32
    assert sd.remotecall_fetch("{}-{}".format, cluster[0], 1, 2) == "1-2"
    assert sd.remotecall_fetch(np.add, cluster[0], 1, 2) == 3


def test_numpy_integers_are_process_ids(cluster):
    pid = np.int64(cluster[0])
    assert sd.remotecall_fetch(sd.myid, pid) == cluster[0]
    assert sd.spawnat(pid, sd.myid).fetch() == cluster[0]
    assert sd.RemoteChannel(pid).where == cluster[0]
    assert sd.Future(pid).where == cluster[0]


@pytest.mark.parametrize("start", [sd.remotecall, sd.remotecall_fetch, sd.remotecall_wait, sd.remote_do])
def test_wrong_places_and_functions_are_told_at_once(cluster, start):
    with pytest.raises(ValueError, match="no process 999"):
        start(abs, 999, 1)
    for place in ("2", None, 2.0, True):
        with pytest.raises(TypeError, match="process id"):
            start(abs, place, 1)
    with pytest.raises(TypeError, match="callable"):
        start(5, cluster[0])
    for pid in (0, -1):
        with pytest.raises(ValueError):
            start(abs, pid, 1)


def test_calls_from_one_caller_start_in_order(cluster):
    futures = [sd.remotecall(note, cluster[0], n) for n in range(300)]
    for future in futures:
        future.wait(timeout=10)
    assert sd.remotecall_fetch(take_log, cluster[0]) == list(range(300))


def test_mixed_forms_start_in_order(cluster):
    for n in range(0, 60, 3):
        sd.remote_do(note, cluster[0], n)
        sd.remotecall(note, cluster[0], n + 1)
        sd.remotecall_fetch(note, cluster[0], n + 2)
    assert sd.remotecall_fetch(take_log, cluster[0]) == list(range(60))


def test_calls_on_one_worker_run_side_by_side(cluster):
    started, gate = sd.RemoteChannel(lambda: sd.Channel(100)), sd.RemoteChannel(lambda: sd.Channel(100))
    blocked = [sd.remotecall(meet_and_wait, cluster[0], started, gate) for _ in range(40)]
    threads = {started.take(timeout=5) for _ in blocked}
    assert len(threads) == 40
    assert sd.remotecall_fetch(abs, cluster[0], -1) == 1  # others go on meanwhile
    assert not any(future.isready() for future in blocked)
    for n in range(40):
        gate.put(n)
    assert sorted(future.fetch(timeout=5) for future in blocked) == list(range(40))


def test_a_call_that_blocks_outside_the_runtime_holds_up_none(cluster):
    def wait_for_file(fd_path):
        with open(fd_path) as file:
            return file.read()

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "fifo")
        os.mkfifo(path)
        blocked = sd.remotecall(wait_for_file, cluster[0], path)
        with within(2):
            assert [sd.remotecall_fetch(abs, cluster[0], -n) for n in range(20)] == list(range(20))
        assert not blocked.isready()
        with open(path, "w") as file:
            file.write("at last")
        assert blocked.fetch(timeout=5) == "at last"


def test_nested_calls_go_round_all_workers(cluster):
    def descend(path):
        here = sd.myid()
        return [here, *(sd.remotecall_fetch(descend, path[0], path[1:]) if path else [])]

    a, b, c = cluster[:3]
    path = [a, b, c, a, 1, b, 1, a, a, c]
    assert sd.remotecall_fetch(descend, path[0], path[1:]) == path
    assert sd.remotecall(descend, path[0], path[1:]).fetch(timeout=5) == path


def test_a_worker_calls_back_while_its_caller_waits(cluster):
    def ask_back(rounds):
        return sum(sd.remotecall_fetch(abs, 1, -n) for n in range(rounds))

    assert sd.remotecall_fetch(ask_back, cluster[0], 50) == sum(range(50))


def test_workers_call_one_another_at_once(cluster):
    def chat(others, rounds):
        return sum(sd.remotecall_fetch(abs, pid, n) for n in range(rounds) for pid in others)

    futures = [sd.remotecall(chat, pid, [1, *cluster], 20) for pid in cluster]
    assert [future.fetch(timeout=10) for future in futures] == [190 * (len(cluster) + 1)] * len(cluster)


def test_calls_on_this_process_run_here(cluster):
    here = threading.get_ident()
    assert sd.remotecall_fetch(threading.get_ident, 1) == here
    assert sd.remotecall(os.getpid, 1).fetch() == os.getpid()
    sd.remotecall_fetch(note, 1, "here")
    assert take_log() == ["here"]
    assert log == []


def test_arguments_are_copied_before_the_call_returns(cluster):
    gate = sd.RemoteChannel(lambda: sd.Channel(1))
    data = [1, 2, 3]
    array = np.arange(300_000)
    future = sd.remotecall(lambda g, d, a: (g.take(), d, int(a.sum()))[1:], cluster[0], gate, data, array)
    expected = int(array.sum())
    data.append(4)
    array[:] = 0
    gate.put(None)
    assert future.fetch(timeout=5) == ([1, 2, 3], expected)


def test_threads_call_at_once(cluster):
    wrong = []

    def work(me):
        for n in range(60):
            pid = cluster[(me + n) % len(cluster)]
            if sd.remotecall_fetch(lambda a, b: (a, b), pid, me, n) != (me, n):
                wrong.append((me, n))

    threads = [threading.Thread(target=work, args=(me,)) for me in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert wrong == []


def test_remote_keeps_the_functions_name(cluster):
    def twice(x):
        "Two of it."
        return 2 * x

    far = sd.remote(twice)
    assert far.__name__ == "twice" and far.__doc__ == "Two of it."
    assert far(4) == 8


def test_results_of_none_and_falsy_values(cluster):
    for value in (None, 0, "", [], (), {}, False, b""):
        assert sd.remotecall_fetch(lambda v: v, cluster[0], value) == value
        assert sd.remotecall(lambda v: v, cluster[0], value).fetch() == value


def test_many_calls_in_flight(cluster):
    futures = [sd.remotecall(divmod, cluster[n % len(cluster)], n, 7) for n in range(2000)]
    assert [future.fetch(timeout=10) for future in futures] == [divmod(n, 7) for n in range(2000)]


def test_deep_structures_and_shared_objects(cluster):
    shared = [1]
    a, b = sd.remotecall_fetch(lambda x, y: (x, y), cluster[0], shared, shared)
    assert a is b
    ring = []
    ring.append(ring)
    back = sd.remotecall_fetch(lambda x: x, cluster[0], ring)
    assert back[0] is back


def test_a_call_gets_a_generator_only_as_an_error(cluster):
    with pytest.raises(sd.SerializationError, match="generator"):
        sd.remotecall_fetch(sum, cluster[0], (n for n in range(3)))


def test_random_numbers_are_each_process_s_own(cluster):
    """`random.random` is a method of a generator, which must not go along with its state."""
    import random

    for function, args in ((random.random, ()), (random.randrange, (1 << 60,)), (np.random.rand, ())):
        numbers = [sd.remotecall_fetch(function, pid, *args) for pid in cluster for _ in range(2)]
        assert len({*numbers, function(*args)}) == len(numbers) + 1
        assert len(set(sd.pmap(lambda _, f=function, a=args: f(*a), range(20)))) == 20
    sd.remotecall_wait(random.seed, cluster[0], 5)
    own = random.Random(5)
    assert sd.remotecall_fetch(random.random, cluster[0]) == own.random()
    assert sd.remotecall_fetch(own.random, cluster[0]) == own.random(), "a program's own is a value"


def test_a_main_thread_that_writes_a_long_answer_is_not_waited_for():
    # By the stream to a process that stands still, so it never ends.
    Script(
        """
import os, signal, time
import numpy as np
import shmdist as sd
from shmdist.runtime import reactor as dispatch
from shmdist.runtime.node import current_node
from tests.integration.helpers import until

writer, stopped = sd.addprocs(2)
sd.remotecall_fetch(sd.remotecall_fetch, stopped, abs, writer, -1)
ospid = current_node().peers.members[stopped].ospid

def stop():
    def writes():
        from shmdist.transport import link
        link.most_queued = lambda: 1 << 20  # more is not queued
        os.kill(ospid, signal.SIGSTOP)
        return np.zeros(1 << 23)
    sd.remotecall_fetch(writes, writer)

call = sd.remotecall(stop, stopped)
def left():
    reactor = current_node().reactor
    return reactor._main.task is None and reactor._left
until(lambda: "(stopped)" in open(f"/proc/{ospid}/status").read(), 10)
time.sleep(1)  # it writes, and the system takes no more
for _ in range(20):
    assert sd.remotecall_fetch(left, writer) >= dispatch._MAX_LEFT_CALLS
os.kill(ospid, signal.SIGCONT)
until(lambda: sd.remotecall_fetch(left, writer) is False, 10, "the main thread runs calls again")
call.wait()
""",
        env={"SHMDIST_ARENA_LIMIT": "0"},
    ).end(60).clean()


def test_functions_of_the_program_mean_what_they_mean_when_they_are_called():
    Script(
        """
import operator
import shmdist as sd

sd.addprocs(2)
N, K = 0, 5

def count():
    global N
    N += 1
    return N

def body(i):
    return i + count()

def add(a, b):
    return a + b + N  # what the bodies of the chunk did

def factorial(n):
    return 1 if n < 2 else n * factorial(n - 1)

def is_it(f):
    return f is factorial

def fail():
    raise ValueError(K)

for turn in range(6):
    assert [sd.remotecall_fetch(count, 2) for _ in range(4)] == [1] * 4  # each has its own
    assert sd.remotecall_fetch(factorial, 2, 6) == 720
    assert sd.remotecall_fetch(is_it, 2, factorial) and sd.remotecall_fetch(is_it, 2, f=factorial)
    assert sd.remotecall_fetch(lambda x: x + K, 3, 1) == K + 1 == sd.remotecall(lambda: K + 1, 3).fetch()
    assert sd.pmap(lambda x: x + K, [1, 2]) == [K + 1, K + 2]
    assert sd.distributed(operator.add)(lambda i: K)(range(2)) == 2 * K
    assert sd.pmap(body, range(2), pool=sd.WorkerPool([2]), batch_size=1) == [1, 3]  # one for the map
    # Reducer and body of a chunk see each other's: counts 1 and 2, then 0 + 1 + (1 + 2) + 2.
    assert sd.distributed(add)(body)(range(2), pool=sd.WorkerPool([2])) == 6
    try:
        sd.remotecall_fetch(fail, 2)
        assert False
    except ValueError as error:
        assert "in fail" in str(error) and f"ValueError: {K}" in str(error)
    K += 1

def factorial(n):
    return n

assert sd.remotecall_fetch(factorial, 2, 6) == 6
"""
    ).end(60).clean()
