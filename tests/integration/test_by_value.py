"""Functions, classes, views and exceptions of the program: on a worker they are what they are here."""

import array
import asyncio
import json
import time

import numpy as np
import pytest

import shmdist as sd
from tests.integration.helpers import run_script

SCRIPT = '''
import dataclasses, logging.handlers, xml.parsers.expat
import shmdist as sd

class Point:
    __slots__ = ("x", "__hidden")
    def __init__(self, x): self.x, self.__hidden = x, 2 * x
    def hidden(self): return self.__hidden

class Child(Point): __slots__ = ("z",)
class Open(Point): pass
class One: __slots__ = "one"
class Documented: __slots__ = {"doc": "a text", "__dict__": None}

@dataclasses.dataclass(slots=True, weakref_slot=True, order=True)
class Data: a: int = 1

def takes(thing):
    """Whether it takes an attribute that no slot is for."""
    try:
        thing.no_slot = 1
    except AttributeError:
        return False
    return True

def there_and_back(thing):
    return thing, takes(thing), type(thing).__name__

def nested():
    return [logging.handlers.__name__ for _ in "a"], (lambda: xml.parsers.expat.__name__)()

class Body:
    def inner(self):
        class Inner: name = logging.handlers.__name__
        return Inner.name

if __name__ == "__main__":
    [pid] = sd.addprocs(1)
    roads = (
        lambda f, x: sd.remotecall_fetch(f, pid, x),
        lambda f, x: sd.remotecall(f, pid, x).fetch(),
        lambda f, x: sd.pmap(f, [x])[0],
        lambda f, x: next(iter(sd.pgenerate(f, [x]))),
    )
    child, opened, one, documented = Child(3), Open(3), One(), Documented()
    child.z, opened.more, one.one, documented.doc = 1, 2, 3, 4
    for road in roads:
        for thing in (Point(1), child, opened, one, documented, Data(5)):
            back, takes_more, name = road(there_and_back, thing)
            assert type(back) is type(thing) and takes_more == takes(thing), thing
            for field in ("x", "z", "more", "one", "doc", "a"):
                assert getattr(back, field, None) == getattr(thing, field, None)
        assert road(there_and_back, Point(4))[0].hidden() == 8
        assert road(Point.hidden, Point(4)) == 8
        assert road(lambda _: nested(), 1) == (["logging.handlers"], "xml.parsers.expat")
        assert road(Body.inner, Body()) == "logging.handlers"
    channel = sd.RemoteChannel(lambda: sd.Channel(9), pid)
    channel.put(child)
    assert channel.take().z == 1
'''


def test_slots_and_nested_imports():
    """Classes keep their slots, and what only inner functions import is there."""
    out = run_script(SCRIPT)
    assert (out.code, out.out, out.err) == (0, "", "")


VIEWS = {
    "numbers": memoryview(array.array("d", [1, 2, 3])),
    "bytes": memoryview(b"abc"),
    "bytearray": memoryview(bytearray(b"abc")),
    "strided": memoryview(bytearray(b"abcdef"))[::2],
    "rows": memoryview(np.arange(12.0).reshape(3, 4)),
    "turned": memoryview(np.ones((30, 4)).T),
    "large": memoryview(np.arange(120_000.0).reshape(300, 400)),
    "large and strided": memoryview(np.arange(120_000.0))[::2],
    "one": memoryview(np.array(3.5)),
    "empty": memoryview(b""),
}


@pytest.mark.parametrize("name", VIEWS)
def test_memory_views_arrive_as_such(cluster, name):
    view = VIEWS[name]
    for pid in (cluster[0], sd.myid()):
        back, items = sd.remotecall_fetch(lambda view: (view, view.tolist()), pid, view)
        assert (back.format, back.shape, back.readonly) == (view.format, view.shape, view.readonly)
        assert back.tolist() == items == view.tolist()
    assert sd.pmap(len if view.ndim else bytes, [view] * 3) == [len(view) if view.ndim else bytes(view)] * 3


def test_a_memory_view_arrives_apart(cluster):
    data = bytearray(100_000)
    back = sd.remotecall_fetch(lambda view: view, cluster[0], memoryview(data))
    back[0] = 5
    assert data[0] == 0 and back[0] == 5


@pytest.mark.parametrize("dtype", [">f8", [("a", "i4")]])
def test_a_memory_view_that_none_can_be_made_of(cluster, dtype):
    with pytest.raises(sd.SerializationError, match=r"numpy\.asarray of it"):
        sd.remotecall_fetch(len, cluster[0], memoryview(np.zeros(3, dtype)))


class Own(Exception):
    """Pickles itself, without its notes and its cause."""

    def __init__(self, first, second):
        super().__init__("text")
        self.first, self.second = first, second

    def __reduce__(self):
        return Own, (self.first, self.second)


class WithState(Own):
    def __reduce__(self):
        return WithState, (self.first, self.second), {"third": 3}


OWN = {
    "own": lambda: Own(1, 2),
    "with state": lambda: WithState(1, 2),
    "json": lambda: json.JSONDecodeError("no", "text", 1),
    "asyncio": lambda: asyncio.IncompleteReadError(b"a", 3),
}


def fail(name):
    error = OWN[name]()
    error.add_note("my note")
    raise error from KeyError("cause")


@pytest.mark.parametrize("name", OWN)
def test_exceptions_that_pickle_themselves_keep_notes_and_cause(cluster, name):
    for road in (
        lambda: sd.remotecall_fetch(fail, cluster[0], name),
        lambda: sd.remotecall(fail, cluster[0], name).fetch(),
        lambda: sd.pmap(fail, [name]),
        lambda: list(sd.pgenerate(fail, [name])),
        lambda: sd.remotecall_fetch(fail, sd.myid(), name),
    ):
        with pytest.raises(type(OWN[name]())) as caught:
            road()
        assert "my note" in caught.value.__notes__
        original = caught.value.captured.ex
        assert repr(original.__cause__) == "KeyError('cause')" and original.__suppress_context__
        assert getattr(original, "third", 3) == 3


class Unprintable:
    def __repr__(self):
        raise SystemExit(3)


def test_an_element_whose_repr_exits(cluster):
    with pytest.raises(ZeroDivisionError) as caught:
        sd.pmap(lambda _: 1 / 0, [Unprintable()])
    assert caught.value.index == 0 and "element 0: <Unprintable>" in caught.value.__notes__


@pytest.mark.parametrize(
    "kind", [bytearray, lambda size: [bytearray(size)], lambda size: {"a": bytearray(size)}]
)
@pytest.mark.parametrize("size", [1, 65_535, 65_536, 3_000_000])
def test_a_bytearray_put_into_a_channel_of_this_process_is_a_value(kind, size):
    channel, thing = sd.RemoteChannel(lambda: sd.Channel(9)), kind(size)
    inner = (
        thing if type(thing) is bytearray else next(iter(thing.values() if type(thing) is dict else thing))
    )
    for number in range(3):
        inner[0] = number
        channel.put(thing)
    fetched = channel.fetch()
    taken = [channel.take() for _ in range(3)]
    firsts = [
        each[0] if type(each) is bytearray else (each["a"] if "a" in each else each[0])[0]
        for each in [fetched, *taken]
    ]
    assert firsts == [0, 0, 1, 2]


def test_masked_arrays_that_threads_are_given_are_values():
    def source():
        masked = np.ma.masked_array(np.zeros(3), [0, 1, 0])
        for number in range(5):
            masked[0] = number
            yield masked

    def first(masked):
        time.sleep(0.01)
        return float(masked[0])

    assert sd.pmap(first, source(), distributed=False) == [0.0, 1.0, 2.0, 3.0, 4.0]
