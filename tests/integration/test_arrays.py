"""Arrays and other buffers: equal, writable, the receiver's own, whatever their size, layout and road."""

import threading

import numpy as np
import pytest

import shmdist as sd

SIZES = [0, 1, 100, 1023, 1024, 1025, 8192, 100_000, 1_000_000]  # around the limits, in numbers of 8 bytes


@pytest.mark.parametrize("size", SIZES)
def test_there_and_back(cluster, size):
    array = np.arange(size, dtype="f8")

    def change(a):
        assert a.flags.writeable and a.flags.aligned
        a += 1
        return a

    back = sd.remotecall_fetch(change, cluster[0], array)
    assert back.flags.writeable and back.dtype == array.dtype
    assert np.array_equal(back, array + 1)
    assert np.array_equal(array, np.arange(size)), "the sender's own is as it was"
    back += 1


LAYOUTS = {
    "Fortran": lambda a: np.asfortranarray(a),
    "strided": lambda a: a[::2, 1:],
    "reversed": lambda a: a[::-1, ::-1],
    "transposed": lambda a: a.T,
    "broadcast": lambda a: np.broadcast_to(a[0], a.shape),
    "read-only": lambda a: _read_only(a.copy()),
    "of bytes": lambda a: np.frombuffer(a.tobytes(), "f8").reshape(a.shape),
    "zero dimensions": lambda a: np.array(3.5),
    "empty": lambda a: a[:0],
    "big-endian": lambda a: a.astype(">i4"),
    "complex": lambda a: a + 1j * a,
    "bool": lambda a: a > 3,
    "structured": lambda a: np.zeros(a.shape, [("x", "f4"), ("y", "i8", 3)]),
    "text": lambda a: a.astype("U12"),
    "dates": lambda a: a.astype("i8").astype("M8[s]"),
    "objects": lambda a: a[:3, :3].astype(object),
}


def _read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 4), (200, 300)])
def test_layouts(cluster, layout, shape):
    array = LAYOUTS[layout](np.arange(shape[0] * shape[1], dtype="f8").reshape(shape))

    def look(a):
        return a, a.flags.writeable, a.flags.f_contiguous

    back, writable, fortran = sd.remotecall_fetch(look, cluster[0], array)
    assert writable and back.flags.writeable, "what is received is the receiver's own"
    assert back.dtype == array.dtype and back.shape == array.shape
    assert np.array_equal(back, array)
    if layout == "Fortran":
        assert fortran


def test_by_every_road(cluster):
    array = np.arange(50_000)
    a, b = cluster[:2]
    channel = sd.RemoteChannel(lambda: sd.Channel(2), a)
    channel.put(array)
    channel.put({"deep": [array, array]})
    roads = {
        "future": sd.remotecall(lambda x: x, a, array).fetch(),
        "closure": sd.remotecall_fetch(lambda: array, a),
        "keyword": sd.remotecall_fetch(lambda *, x: x, a, x=array),
        "channel": channel.take(),
        "container": (both := channel.take())["deep"][0],
        "worker to worker": sd.remotecall_fetch(lambda: sd.remotecall_fetch(lambda x: x, b, array), a),
        "future of a future": sd.remotecall_fetch(
            lambda f: f.fetch(), b, sd.remotecall(lambda x: x, a, array)
        ),
        "here": sd.remotecall(lambda x: x.copy(), 1, array).fetch(),
        "indexed": sd.remotecall(lambda x: {"x": x}, a, array)["x"],
    }
    assert both["deep"][0] is both["deep"][1]
    for road, back in roads.items():
        assert np.array_equal(back, array), road
        assert back.flags.writeable, road
        back += 1


def test_many_buffers_in_one_message(cluster):
    arrays = [np.full(2000 + n, n) for n in range(1500)]
    back = sd.remotecall_fetch(lambda x: x, cluster[0], arrays)
    assert all(np.array_equal(one, other) for one, other in zip(arrays, back, strict=True))


def test_other_buffers(cluster):
    echo = lambda x: x  # noqa: E731
    for size in (10, 100_000):
        data = bytes(range(256)) * (size // 256 + 1)
        assert sd.remotecall_fetch(echo, cluster[0], data) == data
        back = sd.remotecall_fetch(echo, cluster[0], bytearray(data))
        assert type(back) is bytearray and back == data
        back.append(1)
        import array

        numbers = array.array("d", range(size))
        assert sd.remotecall_fetch(echo, cluster[0], numbers) == numbers


def test_subclasses_and_scalars(cluster):
    echo = lambda x: x  # noqa: E731
    matrix = np.ma.masked_greater(np.arange(20_000.0), 5)
    back = sd.remotecall_fetch(echo, cluster[0], matrix)
    assert type(back) is type(matrix) and back.mask.sum() == matrix.mask.sum() and back.sum() == matrix.sum()
    records = np.rec.array([(1, 2.0)] * 5000, dtype=[("a", "i4"), ("b", "f8")])
    assert sd.remotecall_fetch(echo, cluster[0], records).a.sum() == 5000
    scalar = np.float32(1.5)
    assert type(sd.remotecall_fetch(echo, cluster[0], scalar)) is np.float32


def test_the_sender_may_change_it_at_once(cluster):
    array = np.zeros(1_000_000)
    futures = []
    for n in range(8):
        array[:] = n
        futures.append(sd.remotecall(lambda a: (a.min(), a.max()), cluster[0], array))
    assert [future.fetch() for future in futures] == [(n, n) for n in range(8)]


def test_both_ways_at_once(cluster):
    """Large messages that meet on one link do not stop each other."""
    array = np.ones(1 << 20)  # 8 MiB
    wrong = []

    def exchange():
        for _ in range(3):
            if sd.remotecall_fetch(lambda a: a + 1, cluster[0], array)[-1] != 2:
                wrong.append(1)

    threads = [threading.Thread(target=exchange) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not wrong


def test_workers_exchange_large_arrays_crosswise(cluster):
    array = np.ones(1 << 19)

    def cross(other, array):
        return [float(sd.remotecall_fetch(lambda a: a * 2, other, array)[0]) for _ in range(3)]

    a, b, c = cluster[:3]
    futures = [
        sd.remotecall(cross, one, other, array) for one, other in ((a, b), (b, c), (c, a), (b, a), (a, c))
    ]
    assert [future.fetch(timeout=15) for future in futures] == [[2.0] * 3] * 5


def test_a_small_call_overtakes_nothing_but_waits_for_nobody(cluster):
    """While a large array is sent from one thread, calls from another to another worker go on."""
    array = np.ones(4 << 20)
    big = threading.Thread(target=lambda: sd.remotecall_fetch(len, cluster[0], array))
    big.start()
    for n in range(50):
        assert sd.remotecall_fetch(abs, cluster[1], -n) == n
    big.join(10)
