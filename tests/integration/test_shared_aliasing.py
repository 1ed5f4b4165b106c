"""Who sees whose writes: values are everybody's own, shared arrays are everybody's."""

import threading

import numpy as np
import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from shmdist.runtime.sharing import LINE
from tests.integration.helpers import until
from tests.integration.test_shared_memory import warm

SIZES = [10, 5000, 200_000]  # numbers of 8 bytes: in the pickle, by the stream, through blocks

kept = {}  # on workers: what a call has kept


def keep(name, value):
    kept[name] = value


def kept_array():
    return kept["it"]


def take_kept_array():
    return kept.pop("it")


def kept_sum(name):
    return float(kept[name].sum())


def forget():
    kept.clear()


@pytest.fixture(autouse=True)
def _forget(cluster):
    yield
    for pid in cluster:
        sd.remotecall_wait(forget, pid)


@pytest.fixture(params=SIZES)
def array(request, cluster):
    array = np.arange(float(request.param))
    if array.nbytes >= LINE:
        for pid in cluster:
            warm(pid, array.nbytes)
    return array


# ---------------------------------------------------------------------- the sender writes


def count_kept():
    return len(kept)


SENDINGS = {
    "remotecall": lambda pid, a: sd.remotecall(keep, pid, "x", a),
    "remotecall_wait": lambda pid, a: sd.remotecall_wait(keep, pid, "x", a),
    "remote_do": lambda pid, a: sd.remote_do(keep, pid, "x", a),
    "closure": lambda pid, a: sd.remotecall(lambda: keep("x", a), pid),
    "pool": lambda pid, a: sd.remotecall(keep, sd.CachingPool([pid]), "x", a),
}


def test_the_sender_writes_as_soon_as_the_call_has_returned(cluster, array):
    pid = cluster[0]
    for turn, send in enumerate([*SENDINGS.values()] * 3):
        array[:] = turn
        send(pid, array)
        array[:] = -1
        until(lambda: sd.remotecall_fetch(count_kept, pid), 5)
        until(lambda turn=turn: sd.remotecall_fetch(kept_sum, pid, "x") == turn * len(array), 5)
        assert np.all(array == -1)


def test_the_sender_writes_after_a_put(cluster, array):
    for where in (1, cluster[0]):
        channel = sd.RemoteChannel(lambda: sd.Channel(3), where)
        for turn in range(3):
            array[:] = turn
            channel.put(array.copy() if where == 1 else array)  # a local channel keeps the object itself
            array[:] = -1
        for turn in range(3):
            item = channel.take()
            assert np.all(item == turn)
            item[:] = 7


def test_a_future_is_fetched_anew_each_time_by_each(cluster, array):
    a, b = cluster[:2]
    future = sd.remotecall(lambda x: x + 1, a, array)

    def fetch_and_write(future):
        value = future.fetch()
        first = value.sum()
        value[:] = -5
        return first

    assert sd.remotecall_fetch(fetch_and_write, b, future) == (array + 1).sum()
    assert sd.remotecall_fetch(fetch_and_write, b, future) == (array + 1).sum()
    mine = future.fetch()
    assert np.array_equal(mine, array + 1)


# ---------------------------------------------------------------------- several receivers


def test_many_receivers_of_one_closure_write_to_it(cluster, array):
    expected = array.sum()

    def write(n):
        before = array.sum()
        array[:] = 0
        array[0] = n
        return before, sd.myid()

    pool = sd.CachingPool(cluster)
    outcomes = sd.pmap(write, pool, range(12), batch_size=1)
    first = {}
    for before, pid in outcomes:
        first.setdefault(pid, before)
    # Each worker has its own, and keeps it from call to call.
    assert all(before == expected for before in first.values())
    assert np.array_equal(array, np.arange(len(array)))


def test_the_same_worker_gets_the_same_broadcast_twice(cluster, array):
    """A function is sent once for each pool: two copies of its array, apart from each other."""
    pid = cluster[0]
    pools = [sd.CachingPool([pid]) for _ in range(2)]

    def step():
        array[:] += 1
        return float(array[0]), array

    for turn in (1.0, 2.0):
        for pool in pools:
            first, back = sd.remotecall_fetch(step, pool)
            assert first == turn
            back[:] = 99
    assert array[0] == 0


def test_one_array_in_many_elements_of_a_map(cluster, array):
    def write(a):
        before = a.sum()
        a[:] = -1
        return before

    assert set(sd.pmap(write, [array] * 20, batch_size=1)) == {array.sum()}
    views = [array[n:] for n in range(5)] * 3
    assert sd.pmap(write, views, batch_size=1) == [view.sum() for view in views]
    assert sd.pmap(lambda a: a, [array] * 4, batch_size=2)[3][1] == 1
    assert np.array_equal(array, np.arange(len(array)))


def test_results_of_one_batch_are_apart_from_each_other_and_from_the_arguments(cluster, array):
    columns = [array + n for n in range(6)]
    for batch_size in (1, 3):
        back = sd.pmap(lambda a: a, columns, batch_size=batch_size)
        for n, one in enumerate(back):
            assert np.array_equal(one, columns[n])
            one[:] = -n
        for n, one in enumerate(back):
            assert np.all(one == -n) and columns[n][1] == 1 + n


# ---------------------------------------------------------------------- results that are arguments


def return_it(a):
    return a


def keep_and_return(a):
    kept["it"] = a
    return a


def change_kept():
    kept["it"][:] = -3
    return float(kept["it"].sum())


def test_an_argument_that_is_kept_and_returned(cluster, array):
    pid = cluster[0]
    for _ in range(2):
        back = sd.remotecall_fetch(keep_and_return, pid, array)
        sd.remotecall_fetch(change_kept, pid)
        assert np.array_equal(back, array)
        back[:] = 5
        assert sd.remotecall_fetch(kept_sum, pid, "it") == -3 * len(array)


def test_an_argument_of_which_a_part_is_kept(cluster, array):
    pid = cluster[0]
    back = sd.remotecall_fetch(keep_a_part, pid, array)
    sd.remotecall_fetch(change_kept, pid)
    assert np.array_equal(back, array)


def keep_a_part(a):
    kept["it"] = a[::2]
    return a


VIEWS = {
    "itself": lambda a: a,
    "a pair": lambda a: (a, a[: len(a) // 2]),
    "a pair of halves": lambda a: (a[: len(a) // 2], a[len(a) // 2 :]),
    "twice": lambda a: [a, a],
    "overlapping": lambda a: (a[:-1], a[1:]),
    "with a small part": lambda a: (a, a[:2]),
    "small part": lambda a: a[3:7],
    "slice": lambda a: a[2:-2],
    "reshaped": lambda a: a.reshape(-1, 2),
    "transposed": lambda a: a.reshape(-1, 2).T,
    "strided": lambda a: a[::2],
    "reversed": lambda a: a[::-1],
    "other dtype": lambda a: a.view("i8"),
    "odd bytes": lambda a: a.view("B")[3:-2],
    "in a dict": lambda a: {"deep": [a]},
    "twice in two shapes": lambda a: (a, a.reshape(2, -1)),
}


def test_a_result_that_is_a_view_of_an_argument(cluster, array):
    for make in VIEWS.values():
        return_a_view(cluster, array, make)


def return_a_view(cluster, array, make):
    expected = make(array.copy())

    def leaves(value):
        if isinstance(value, np.ndarray):
            return [value]
        return [
            leaf for each in (value.values() if isinstance(value, dict) else value) for leaf in leaves(each)
        ]

    for _ in range(3):
        back = sd.remotecall_fetch(make, cluster[0], array)
        for one, other in zip(leaves(back), leaves(expected), strict=True):
            assert one.dtype == other.dtype and np.array_equal(one, other)
            assert one.flags.writeable
        apart = {id(leaf): leaf for leaf in leaves(back)}.values()
        for n, leaf in enumerate(apart):
            leaf[...] = n
        for n, leaf in enumerate(apart):
            assert np.all(leaf == n), "two arrays of one result share memory"
        assert np.array_equal(array, np.arange(len(array)))


def test_a_result_that_is_an_argument_of_the_call_before(cluster, array):
    pid = cluster[0]
    sd.remotecall_wait(keep, pid, "it", array)
    first = sd.remotecall_fetch(kept_array, pid)
    first[:] = 1
    second = sd.remotecall_fetch(take_kept_array, pid)
    assert np.array_equal(second, array)


def test_a_value_goes_round_through_many_processes(cluster, array):
    """Each hop copies or hands over; nobody's copy changes with another's."""
    a, b, c = cluster

    def hop(array, rest):
        array += 1
        mine = array.copy()
        back = sd.remotecall_fetch(hop, rest[0], array, rest[1:]) if rest else array
        assert np.array_equal(array, mine) or not rest
        array[:] = -1
        return back

    sd.remotecall_fetch(hop, a, array, [b, c, a, b])
    assert np.array_equal(array, np.arange(len(array)))


# ---------------------------------------------------------------------- shared arrays


@pytest.mark.parametrize("size", SIZES)
def test_all_see_writes_to_a_shared_array(cluster, size):
    shared = sd.shared.zeros(size)
    sd.pmap(lambda n: shared.__setitem__(n, n + 1.0), range(10), batch_size=1)
    assert shared[:10].tolist() == [n + 1.0 for n in range(10)]
    shared[:] = 3
    for pid in cluster:
        assert sd.remotecall_fetch(lambda a: float(a.sum()), pid, shared) == 3 * size
        back = sd.remotecall_fetch(lambda a: a[2:5], pid, shared)
        back[:] = pid
        assert np.all(shared[2:5] == pid) and sd.shared.is_shared(back)
        shared[:] = 3


@pytest.mark.parametrize("owner", ["here", "a worker"])
def test_a_shared_array_goes_from_worker_to_worker(cluster, owner):
    a, b, c = cluster
    shared = sd.shared.zeros(1000) if owner == "here" else sd.remotecall_fetch(sd.shared.zeros, a, 1000)
    assert sd.shared.is_shared(shared)

    def pass_on(array, rest):
        array[sd.myid()] += 1
        return sd.remotecall_fetch(pass_on, rest[0], array, rest[1:]) if rest else array[5:]

    back = sd.remotecall_fetch(pass_on, b, shared, [c, a, b, c])
    assert shared[a] == 1 and shared[b] == 2 and shared[c] == 2
    back[0] = 42
    assert shared[5] == 42
    assert sd.remotecall_fetch(lambda x: float(x[0]), a, back) == 42


def test_copies_of_shared_arrays_are_values(cluster):
    shared = sd.shared.zeros(50_000)
    for value in (shared.copy(), shared + 0, shared[np.arange(50_000)], shared.astype("f4")):
        assert not sd.shared.is_shared(value)
        back = sd.remotecall_fetch(lambda a: a.__iadd__(1), cluster[0], value)
        assert back[0] == 1 and value[0] == 0
        assert not sd.shared.is_shared(back)


def test_values_and_shared_arrays_in_one_message(cluster, array):
    shared = sd.shared.zeros(len(array))

    def change(value, shared, again):
        value += 1
        shared += 1
        again += 1
        return value, shared, again[1:]

    value, back, part = sd.remotecall_fetch(change, cluster[0], array, shared, shared[:])
    assert np.array_equal(value, array + 1) and np.array_equal(array, np.arange(len(array)))
    assert np.all(shared == 2) and np.all(back == 2)
    part[:] = 9
    assert np.all(shared[1:] == 9) and shared[0] == 2


def test_recycled_blocks_do_not_show_through(cluster):
    """Values that come and go in all directions at once never show each other's bytes."""
    wrong = []

    def mirror(a):
        later = [pid for pid in cluster if pid > sd.myid()]
        return a, sd.remotecall_fetch(lambda a: a + 1, (later or cluster)[0], a)

    def traffic(number, pid):
        kept_here = []
        for turn in range(25):
            value = np.full(LINE // 8 + 512 * ((number + turn) % 7), number * 100.0 + turn)
            one, two = sd.remotecall_fetch(mirror, pid, value)
            kept_here = [*kept_here[-3:], (one, number * 100.0 + turn), (two, number * 100.0 + turn + 1)]
            wrong.extend((number, turn) for each, content in kept_here if not np.all(each == content))

    threads = [threading.Thread(target=traffic, args=(n, cluster[n % 3])) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    current_node().sharing.state()
