"""Values with buffers of every kind, in every direction: equal, of one type, writable, the receiver's own."""

import numpy as np
import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from shmdist.runtime.sharing import LINE
from tests.integration import kinds
from tests.integration.helpers import until
from tests.integration.kinds import KINDS, VALUES, look, not_own, same, scribble

KIB = 1 << 10
EDGE = LINE // 8  # numbers of 8 bytes from which on a value goes through a block
SIZES = [4, 4 * KIB, EDGE - 4, EDGE, 4 * EDGE]  # of such numbers


def blocks_taken():
    return current_node().sharing.arena._serial


def taken_there(pid):
    return sd.remotecall_fetch(blocks_taken, pid)


def warm(pid, nbytes):
    """See to it that values of so many bytes go through blocks, to a worker and back."""
    value = np.ones(nbytes, "B")

    def goes_by_block():
        here, there = blocks_taken(), taken_there(pid)
        back = sd.remotecall_fetch(lambda a: a + 1, pid, value)
        assert back[-1] == 2
        return blocks_taken() > here and taken_there(pid) > there

    until(goes_by_block, 10, "a warm block in both directions")


def echo(value):
    return value


def raise_it(value):
    error = ValueError("with a value")
    error.value = value
    raise error


def argument_and_result(pid, value):
    back, wrong = sd.remotecall_fetch(look, pid, value)
    assert not wrong, f"on the worker: {wrong}"
    return back


def closure(pid, value):
    return sd.remotecall_fetch(lambda: value, pid)


def channel(pid, value):
    there = sd.RemoteChannel(lambda: sd.Channel(1), pid)
    there.put(value)
    return there.take()


def channel_here(pid, value):
    here = sd.RemoteChannel(lambda: sd.Channel(1), 1)
    sd.remotecall_wait(lambda value: here.put(value), pid, value)
    return here.take()


def future(pid, value):
    return sd.remotecall(echo, pid, value).fetch()


def everywhere(pid, value):
    sd.everywhere("None", pid, value_of_everywhere=value)
    try:
        return sd.remotecall_eval("__main__", pid, "value_of_everywhere")
    finally:
        sd.remotecall_eval("__main__", pid, "del value_of_everywhere")


def exception(pid, value):
    with pytest.raises(ValueError, match="with a value") as caught:
        sd.remotecall_fetch(raise_it, pid, value)
    back = caught.value.value
    caught.value.value = None
    return back


def worker_to_worker(pid, value):
    return sd.remotecall_fetch(
        lambda value: sd.remotecall_fetch(echo, sd.other_workers()[0], value), pid, value
    )


def map_and_back(pid, value):
    return sd.pmap(echo, sd.CachingPool([pid]), [value])[0]


ROADS = [
    argument_and_result,
    closure,
    channel,
    channel_here,
    future,
    everywhere,
    exception,
    worker_to_worker,
    map_and_back,
]


@pytest.mark.parametrize("size", SIZES)
def test_arrays(cluster, size):
    few = ("structured", "objects", "structure with objects", "text")  # they take long to make
    for kind, make in KINDS.items():
        value = make(np.arange(float(min(size, 40 * KIB) if kind in few else size)))
        before = value.copy()
        for _ in range(2):  # the second time there is a block for it
            back = argument_and_result(cluster[0], value)
            same(back, value)
            assert not not_own(back), kind
            assert kind != "F-order" or back.flags.f_contiguous
            scribble(back)
            same(value, before)


@pytest.mark.parametrize("road", ROADS)
def test_roads(cluster, road):
    pid = cluster[1]
    warm(pid, 16 * EDGE)
    for size in (100, 2 * EDGE):
        take_road(road, pid, size)


def take_road(road, pid, size):
    numbers = np.arange(float(size))
    names = [
        "f8",
        "strided",
        "F-order",
        "matrix",
        "recarray",
        "masked",
        "datetime",
        "read-only",
        "0-d",
        "empty",
        "big-endian",
    ]
    for kind, make in {**{name: KINDS[name] for name in names}, **VALUES}.items():
        value = make(numbers)
        back = road(pid, value)
        same(back, value)
        # An exception's own buffers are copied into its message, and need not be writable.
        assert road is exception or not not_own(back), kind


@pytest.mark.parametrize("size", [100, 128 * KIB])
def test_values(cluster, size):
    for kind, make in VALUES.items():
        value = make(np.arange(float(size)))
        for _ in range(3):
            back = argument_and_result(cluster[0], value)
            same(back, value)
            if kind == "bytearray":
                back[0] = 255
                back.append(1)
                assert value[0] == 0
            if kind == "arrays in a dict":
                assert back["a"] is back["again"]
                scribble(back)
                assert value["a"][1] == 1


def test_tens_of_mebibytes_cold_and_warm(cluster):
    numbers = np.arange(3.0 * (1 << 20))  # 24 MiB
    for kind in ("f8", "F-order", "strided", "broadcast", "masked"):
        value = KINDS[kind](numbers)
        for _ in range(2):
            back = argument_and_result(cluster[2], value)
            assert np.array_equal(back, value) and not not_own(back), kind
            scribble(back)
            assert value.max() > 0
    data = numbers.tobytes()
    assert sd.remotecall_fetch(echo, cluster[2], data) == data


def test_pandas(cluster):
    pd = pytest.importorskip("pandas")
    for rows in (3, 30_000):
        frame = pd.DataFrame(
            {
                "number": np.arange(rows),
                "real": np.arange(float(rows)),
                "more": np.arange(float(rows)) / 7,
                "when": pd.date_range("2020", periods=rows, freq="min"),
                "kind": pd.Categorical(["a", "b", "c"] * (rows // 3)),
                "text": ["x"] * rows,
            },
            index=np.arange(rows) * 2,
        )
        for value in (
            frame,
            frame["real"],
            frame.T.iloc[:, :3],
            frame.index,
            frame.set_index(["kind", "number"]),
        ):
            for _ in range(2):
                back = sd.remotecall_fetch(look, cluster[0], value)[0]
                same(back, value)
        back = sd.remotecall_fetch(look, cluster[0], frame)[0]
        back.loc[0, "real"] = -1.0
        back["more"] += 1
        assert frame.loc[0, "real"] == 0 and frame["more"].iloc[0] == 0


def test_sparse(cluster):
    sparse = pytest.importorskip("scipy.sparse")
    for size in (10, 1500):
        matrix = sparse.random(size, size, 0.01, random_state=1)
        for value in (matrix.tocsr(), matrix.tocsc(), matrix.tocoo(), sparse.csr_array(matrix)):
            for _ in range(2):
                back = argument_and_result(cluster[0], value)
                same(back, value)
                assert not not_own(back)
            back.data[:] = 0
            assert value.nnz == 0 or value.data.max() > 0


SHARED = {
    "all": lambda a: a,
    "slice": lambda a: a[10:20],
    "strided": lambda a: a[::3],
    "reversed": lambda a: a[::-1],
    "column": lambda a: a.reshape(-1, 4)[:, 2],
    "transposed": lambda a: a.reshape(-1, 4).T,
    "broadcast": lambda a: np.broadcast_to(a[5:6], (100, 100)),
    "element": lambda a: a[7:8].reshape(()),
    "bytes": lambda a: a.view("B")[3:],
    "structure": lambda a: a.view([("x", "f4"), ("y", "f4")])["y"],
    "read-only": lambda a: kinds._read_only(a[:]),
    "matrix": lambda a: a.view(np.matrix),
    "subclass": lambda a: a.view(kinds.Tagged),
    "masked": lambda a: np.ma.masked_where(np.zeros(len(a), bool), a, copy=False),
}


@pytest.mark.parametrize("view", SHARED)
def test_views_of_shared_arrays_by_every_road(cluster, view):
    """They arrive as views of the same memory, whatever their size, and come back as such."""
    for size in (40, 40_000):
        take_roads_with_shared(cluster, view, size)


def take_roads_with_shared(cluster, view, size):
    base = sd.shared.array(np.arange(float(size)))
    value = SHARED[view](base)

    def facts(a):
        return (
            np.array(a),
            a.flags.writeable,
            sd.shared.is_shared(a.data if isinstance(a, np.ma.MaskedArray) else a),
        )

    for road in (closure, channel, channel_here, future, worker_to_worker, map_and_back):
        there, writable, shared = sd.remotecall_fetch(facts, cluster[0], value)
        assert np.array_equal(there, value) and writable == value.flags.writeable and shared, view
        back = road(cluster[0], value)
        same(np.array(back), np.array(value))
        assert type(back) is type(value)
        first = base.copy()
        base += 1
        assert np.array_equal(back, value), f"{view} came back by {road.__name__} as a copy"
        base[:] = first
