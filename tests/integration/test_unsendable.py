"""Errors of what cannot be sent name it as the user knows it, by whichever way it was to go."""

import ctypes
import multiprocessing.connection
import operator
import os
import threading

import pytest

import shmdist as sd

LOCK = threading.Lock()


def add(a, b):
    return a + b


def path_of(call, *args, **kwargs):
    with pytest.raises(sd.SerializationError) as caught:
        call(*args, **kwargs)
    error = caught.value
    assert not isinstance(error, sd.RemoteException) and error.path in str(error)
    assert error.obj_type == "_thread.lock"
    return error.path


def by_value():
    """Return functions that use, and capture, what cannot be sent."""
    lock = LOCK
    namespace = {"__name__": "__main__", "L": LOCK}
    exec("def f(*args): return L", namespace)
    return {"the function uses global L": namespace["f"], "the function captures lock": lambda *args: lock}


def test_elements_of_maps(cluster):
    element = {"k": LOCK}
    assert path_of(sd.pmap, len, [element]) == "element 0['k']"
    assert path_of(sd.pmap, len, [[], [], element, []]) == "element 2['k']"
    assert path_of(sd.pmap, len, [[], LOCK], batch_size=2) == "element 1"
    assert path_of(sd.pmap, len, ([] if n != 40 else element for n in range(50))) == "element 40['k']"
    assert path_of(sd.pmap, add, [1, 2], [1, [LOCK]]) == "element 1[1][0]"
    assert path_of(lambda: list(sd.pgenerate(len, [[], element]))) == "element 1['k']"


def test_each_element_is_told_of(cluster):
    errors = []
    elements = [[], [LOCK], [1], LOCK] * 5
    assert (
        sd.pmap(len, elements, on_error=lambda error: errors.append(error.path) or -1) == [0, -1, 1, -1] * 5
    )
    places = [(n, "[0]" if n % 4 == 1 else "") for n in range(20) if n % 2]
    assert sorted(errors) == sorted(f"element {n}{rest}" for n, rest in places)


@pytest.mark.parametrize("path", by_value())
def test_functions(cluster, path):
    f = by_value()[path]
    assert path_of(sd.pmap, f, [1, 2]) == path
    assert path_of(sd.pmap, f, [1, 2], [3, 4]) == path
    assert path_of(lambda: list(sd.pgenerate(f, [1]))) == path
    assert path_of(sd.pmap, f, [1], pool=sd.CachingPool(cluster)) == path
    assert path_of(sd.remotecall, f, sd.CachingPool(cluster)) == path
    assert path_of(sd.remotecall, f, cluster[0]) == path.removeprefix("the ")
    for schedule in ("static", "dynamic"):
        assert path_of(sd.distributed(max, schedule=schedule)(f), range(10)) == path
        reducer = path.replace("function", "reducer")
        assert path_of(sd.distributed(f, range(10), schedule=schedule), abs) == reducer
    assert path_of(sd.distributed(f)(abs).__call__, range(3)) == path.replace("function", "reducer")


@pytest.mark.parametrize(
    "options", [{}, {"chunk": 3}, {"schedule": "dynamic"}, {"schedule": "dynamic", "chunk": 3}]
)
def test_elements_of_loops(cluster, options):
    elements = [[n] for n in range(20)]
    elements[13] = {"k": LOCK}
    loop = sd.distributed(operator.add, **options)(len)
    assert path_of(loop, elements) == "element 13['k']"
    assert (
        path_of(sd.distributed(operator.add, vectorized=True, **options)(len), elements) == "element 13['k']"
    )


@pytest.mark.parametrize("several", [True, False])
def test_bindings_of_everywhere(cluster, several):
    procs = cluster if several else cluster[0]
    assert path_of(sd.everywhere, "1", procs, q=LOCK) == "q"
    assert path_of(sd.everywhere, "1", procs, p=1, q={"k": [LOCK]}) == "q['k'][0]"
    assert path_of(sd.everywhere, "1", [cluster[0]], p=1, q=LOCK) == "q"


def test_definitions_of_everywhere(cluster):
    for path, f in by_value().items():
        f.__name__ = "f"
        assert path_of(sd.everywhere, f) == path.replace("the function", "f")
    assert path_of(sd.everywhere, add, q=[LOCK]) == "q[0]"


def test_what_is_put(cluster):
    channel, future = sd.RemoteChannel(cluster[0]), sd.Future(cluster[0])
    for ref in (channel, future):
        assert path_of(ref.put, {"k": LOCK}) == "the value['k']"
        assert path_of(ref.put, LOCK) == "the value"


def test_arguments(cluster):
    assert path_of(sd.remotecall, abs, cluster[0], {"q": [LOCK]}) == "args[0]['q'][0]"
    assert path_of(sd.remotecall, abs, sd.CachingPool(cluster), {"q": [LOCK]}) == "args[0]['q'][0]"
    assert path_of(sd.remotecall_fetch, abs, cluster[0], x=[LOCK]) == "argument x[0]"


class Wrapped:
    """Holds something in a slot, as objects of users do."""

    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner


@pytest.fixture
def connection():
    first, second = multiprocessing.Pipe()
    with first, second:
        yield first


def test_connections_on_every_road(cluster, connection):
    """One that were pickled as a number would close a descriptor of the worker's."""

    def capturing():
        return connection

    target = cluster[0]
    channel = sd.RemoteChannel(lambda: sd.Channel(5), target)
    roads = {
        "a call": lambda x: sd.remotecall_fetch(len, target, x),
        "a keyword": lambda x: sd.remotecall_fetch(dict, target, a=x),
        "a future": lambda x: sd.remotecall(len, target, [1, x]).fetch(),
        "remote_do": lambda x: sd.remote_do(len, target, x),
        "pmap": lambda x: sd.pmap(len, [[], [x]]),
        "pmap, whole batches": lambda x: sd.pmap(len, [[], [x]], batch_size=5),
        "pgenerate": lambda x: list(sd.pgenerate(len, [[x]])),
        "a loop": lambda x: sd.distributed(operator.add)(lambda i: 1)([1, x, 2]),
        "a loop's closure": lambda x: sd.distributed(operator.add)(lambda i: x and 1)(range(4)),
        "everywhere": lambda x: sd.everywhere("pass", procs=[target], conn=x),
        "a channel": channel.put,
        "a future's put": sd.Future(target).put,
        "an object": lambda x: sd.remotecall_fetch(id, target, Wrapped({"a": (x,)})),
        "a closure": lambda x: sd.remotecall_fetch(capturing, target),
    }
    for name, road in roads.items():
        with pytest.raises(
            sd.SerializationError, match=r"a Connection stays where it is.*RemoteChannel"
        ) as caught:
            road(connection)
        assert caught.value.obj_type == "multiprocessing.connection.Connection", name
    for pid in cluster:
        assert sd.remotecall_fetch(abs, pid, -1) == 1
    assert len(channel) == 0


def test_connections_in_results(cluster):
    def make():
        import multiprocessing

        return list(multiprocessing.Pipe())

    with pytest.raises(sd.SerializationError, match="Connection"):
        sd.remotecall_fetch(make, cluster[0])
    with pytest.raises(sd.SerializationError, match="Connection"):
        sd.remotecall(make, cluster[0]).fetch()
    with pytest.raises(sd.SerializationError, match="Connection"):
        sd.pmap(lambda i: make(), range(3))
    assert sd.remotecall_fetch(abs, cluster[0], -1) == 1


def test_locks_and_queues_of_multiprocessing(cluster):
    context = multiprocessing.get_context("fork")  # the others start a tracker, which stays
    queue = context.Queue()
    things = {
        "Lock": context.Lock(),
        "Semaphore": context.Semaphore(2),
        "Event": context.Event(),
        "Queue": queue,
        "SimpleQueue": context.SimpleQueue(),
        "CDLL": ctypes.CDLL(None),
    }
    for name, thing in things.items():
        with pytest.raises(sd.SerializationError, match=f"an? {name} stays where it is: ") as caught:
            sd.remotecall_fetch(len, cluster[0], [1, thing])
        assert caught.value.path == "args[0][1]"
    queue.close()
    queue.join_thread()


class Reopened(multiprocessing.connection.Connection):
    """A connection that knows how to travel."""

    def __reduce__(self):
        return str, ("reopened",)


def test_who_pickles_itself_is_sent(cluster):
    first, second = multiprocessing.Pipe()
    with first, second:
        reopened = Reopened(os.dup(first.fileno()))
        with reopened:
            assert sd.remotecall_fetch(str.upper, cluster[0], reopened) == "REOPENED"
