"""What a map or loop may run over, and on which pool: len() of an input is a hint, and process ids are a pool."""

import array
import collections
import operator
import threading

import numpy as np
import pytest
import scipy.sparse
from tqdm import tqdm

import shmdist as sd
from tests.integration.helpers import within

total = sd.distributed(operator.add)(abs)


class Lying:
    """Has five elements, whatever its length says."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        if isinstance(self.length, BaseException):
            raise self.length
        return self.length

    def __iter__(self):
        return iter(range(5))


class Dataset:
    """Is read by index, and cannot be sliced."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if index >= 5:
            raise IndexError(index)
        return int(index)


class LyingList(list):
    def __len__(self):
        return 2


def hinted():
    class Hinted:
        def __iter__(self):
            return self

        def __init__(self):
            self.rest = list(range(5))

        def __next__(self):
            if not self.rest:
                raise StopIteration
            return self.rest.pop(0)

        def __length_hint__(self):
            return 10**6

    return Hinted()


INPUTS = {
    "too short": lambda: Lying(2),
    "zero": lambda: Lying(0),
    "too long": lambda: Lying(50),
    "huge": lambda: Lying(10**15),
    "overflows": lambda: Lying(10**30),
    "negative": lambda: Lying(-1),
    "raises": lambda: Lying(RuntimeError("no length")),
    "a text": lambda: Lying("5"),
    "a list that lies": lambda: LyingList(range(5)),
    "dataset": Dataset,
    "hint": hinted,
    "deque": lambda: collections.deque(range(5)),
    "dict": lambda: dict.fromkeys(range(5)),
    "dict values": lambda: dict(enumerate(range(5))).values(),
    "set": lambda: set(range(5)),
    "tqdm": lambda: tqdm(range(5), disable=True),
    "nditer": lambda: map(int, np.nditer(np.arange(5))),
    "flat": lambda: np.arange(5).reshape(5, 1).flat,
    "array.array": lambda: array.array("i", range(5)),
    "bytes": lambda: bytes(range(5)),
    "memoryview": lambda: memoryview(bytes(range(5))),
    "masked": lambda: np.ma.arange(5),
}


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_is_what_iterating_over_it_gives(cluster, name):
    make = INPUTS[name]
    with within(20):
        for batch_size in (None, 1, 5):
            assert sorted(sd.pmap(int, make(), batch_size=batch_size)) == [0, 1, 2, 3, 4]
        assert sd.pmap(operator.add, make(), make()) == sd.pmap(lambda x: 2 * x, make())
        assert sorted(sd.pgenerate(int, make())) == [0, 1, 2, 3, 4]
        assert sorted(sd.pmap(int, make(), distributed=False)) == [0, 1, 2, 3, 4]
        assert sorted(sd.pmap(int, make(), pool=[1])) == [0, 1, 2, 3, 4]
        assert total(make()) == 10
        assert sd.distributed(operator.add, schedule="dynamic", chunk=2)(abs)(make()) == 10
        assert sd.distributed(operator.add, vectorized=True)(lambda chunk: int(sum(chunk)))(make()) == 10


def test_nditer_is_iterated(cluster):
    """It has a shape, a length that is another, and slices that are its operands."""
    for n in (1, 5):
        assert sd.pmap(int, np.nditer(np.arange(n))) == list(range(n))
        assert sd.distributed(operator.add)(int)(np.nditer(np.arange(n))) == sum(range(n))


def test_rows_of_a_sparse_matrix(cluster):
    matrix = scipy.sparse.csr_matrix(np.eye(4))
    assert sd.pmap(lambda row: row.sum(), matrix) == [1.0] * 4
    assert sd.distributed(operator.add)(lambda row: row.sum())(matrix) == 4.0


def test_a_list_may_grow_during_the_map(cluster):
    elements = list(range(6))

    def extend(error):
        elements.append(len(elements))
        return "failed"

    def fail_at_1(x):
        return 1 // (x - 1)

    got = sd.pmap(fail_at_1, elements, batch_size=1, on_error=extend)
    assert got[1] == "failed" and len(got) in (6, 7)


def feed(channel, n):
    for i in range(n):
        channel.put(i)
    channel.close()


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda: sd.Channel(4),
        lambda: sd.Channel(),
        lambda: sd.RemoteChannel(lambda: sd.Channel(4)),
        lambda: sd.RemoteChannel(lambda: sd.Channel(4), sd.workers()[0]),
    ],
    ids=["buffered", "unbuffered", "remote, here", "remote, there"],
)
def test_a_channel_is_taken_from_until_it_is_closed(cluster, make, first):
    for use in (
        lambda channel: sd.pmap(abs, channel),
        lambda channel: sd.pmap(abs, channel, batch_size=5),
        lambda channel: list(sd.pgenerate(abs, channel)),
        lambda channel: sd.pmap(abs, channel, pool=[1]),
        lambda channel: [total(channel)],
    ):
        channel = make()
        ahead = threading.Thread(target=feed, args=(channel, 7))
        ahead.start()
        if first and isinstance(channel, sd.RemoteChannel):
            channel.wait(timeout=5)
        with within(20):
            got = use(channel)
        ahead.join(5)
        assert got in ([0, 1, 2, 3, 4, 5, 6], [21])


def test_progress_believes_no_length_that_was_wrong(cluster):
    told = []
    sd.pmap(abs, Lying(2), batch_size=1, progress=lambda done, expected: told.append((done, expected)))
    assert told[-1] == (5, None)


def test_a_channel_is_true_and_no_sequence_to_numpy(cluster):
    for channel in (sd.Channel(3), sd.RemoteChannel(lambda: sd.Channel(3)), sd.RemoteChannel(cluster[0])):
        assert channel and len(channel) == 0
        for _ in range(2):
            with within(5):
                held = np.array([channel], dtype=object)
                assert held.shape == (1,) and held[0] is channel
                assert np.array([channel, channel]).shape == (2,)
                assert np.asarray(channel).shape == ()
                table = np.empty(2, object)
                table[:] = [channel, None]
                assert table[0] is channel
            if channel.isempty():
                channel.put(7)
        assert channel and len(channel) == 1 and channel.take() == 7


def test_a_future_is_no_sequence_to_numpy(cluster):
    future = sd.remotecall(list, cluster[0], range(3))
    with within(5):
        held = np.array([future])
    assert held.shape == (1,) and held[0] is future and future[1] == 1


def test_process_ids_are_a_pool(cluster):
    def where(_):
        return sd.myid()

    for pool in (cluster[:2], tuple(cluster[:2]), range(cluster[0], cluster[0] + 2), np.array(cluster[:2])):
        there = {int(pid) for pid in pool}
        assert set(sd.pmap(where, range(50), pool=pool)) <= there
        assert set(sd.pgenerate(where, range(50), pool=pool)) <= there
        assert sd.distributed(set.union, pool=pool)(lambda i: {sd.myid()})(range(50)) == there
        assert sd.distributed(set.union)(lambda i: {sd.myid()})(range(50), pool=pool) == there
    assert set(sd.pmap(where, range(5), pool=[1])) == {1}


@pytest.mark.parametrize(
    ("pool", "error", "text"),
    [
        ([2, "a"], TypeError, "pool must be a list of process ids, which are integers, not 'a'"),
        ([2.0], TypeError, "integers, not 2.0"),
        ([True], TypeError, "integers, not True"),
        ("23", TypeError, "pool must be a worker pool or a list of process ids, not '23'"),
        (3, TypeError, "pool must be a worker pool or a list of process ids, not 3"),
        ([9999], ValueError, "there is no process 9999"),
        ([], ValueError, "empty list"),
    ],
)
def test_wrong_process_ids(cluster, pool, error, text):
    for use in (
        lambda: sd.pmap(abs, [1], pool=pool),
        lambda: sd.pgenerate(abs, [1], pool=pool),
        lambda: sd.distributed(operator.add, pool=pool)(abs)([1]),
        lambda: sd.distributed(operator.add)(abs)([1], pool=pool),
    ):
        with pytest.raises(error, match=text):
            use()
