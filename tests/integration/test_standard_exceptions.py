"""Every exception of Python and its standard library, and those that refuse changes, by every road."""

import asyncio
import copy
import dataclasses
import pickle
import traceback

import pytest

import shmdist as sd
from tests.integration.helpers import within
from tests.standard_exceptions import standard_exceptions

FOUND = standard_exceptions()
BUILTINS = {name: how for name, how in FOUND.items() if name.startswith("builtins.")}
FIELDS = [
    "errno",
    "strerror",
    "encoding",
    "start",
    "end",
    "reason",
    "path",
    "msg",
    "value",
    "code",
    "lineno",
    "offset",
    "text",
    "cmd",
    "returncode",
    "message",
    "exceptions",
]


def fail(kind, arguments):
    raise kind(*arguments)


async def _await(awaitable):
    return await asyncio.wait_for(awaitable, 10)


def _started(kind, arguments, pid):
    return sd.remotecall(fail, pid, kind, arguments)


def _exception(kind, arguments, pid):
    raise _started(kind, arguments, pid).exception(timeout=10)


def _yield_from(kind, arguments, pid):
    class Values:
        def __iter__(self):
            return self

        def __next__(self):
            return sd.remotecall_fetch(fail, pid, kind, arguments)

    def generate():
        yield from Values()

    return list(generate())


def _loop(kind, arguments, pid):
    pool = sd.WorkerPool([pid])

    @sd.distributed(max, pool=pool)
    def body(_):
        fail(kind, arguments)

    return body(range(3))


def _everywhere(kind, arguments, pid):
    try:
        sd.everywhere("fail(kind, arguments)", procs=[pid], fail=fail, kind=kind, arguments=arguments)
    except sd.CompositeException as group:
        raise group.exceptions[0] from None


ROADS = {
    "call": lambda kind, arguments, pid: sd.remotecall_fetch(fail, pid, kind, arguments),
    "fetch": lambda *how: _started(*how).fetch(timeout=10),
    "remotecall_wait": lambda kind, arguments, pid: sd.remotecall_wait(fail, pid, kind, arguments),
    "exception": _exception,
    "await": lambda *how: asyncio.run(_await(_started(*how))),
    "yield from": _yield_from,
    "pgenerate": lambda kind, arguments, pid: list(
        sd.pgenerate(lambda _: fail(kind, arguments), [1, 2], pool=sd.WorkerPool([pid]))
    ),
    "loop": _loop,
    "channel factory": lambda kind, arguments, pid: sd.RemoteChannel(lambda: fail(kind, arguments), pid),
    "everywhere": _everywhere,
}


def check(name, error, kind, arguments):
    """Check that an error is told as what it was, also when it is sent on, copied and printed."""
    original = kind(*arguments)
    assert isinstance(error, sd.RemoteException), name
    both = issubclass(kind, Exception) and not issubclass(kind, (StopIteration, StopAsyncIteration))
    assert isinstance(error, kind) == (both or kind is BaseException), name
    copies = (error, pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error))
    for each in copies:
        assert str(original) in str(each), name
        assert repr(each), name
        assert kind.__name__ in "".join(traceback.format_exception(each)), name
        assert type(each.captured.ex) is kind, name
        for field in FIELDS if both else ():
            if hasattr(original, field):
                assert repr(getattr(each, field)) == repr(getattr(original, field)), (name, field)


@pytest.mark.parametrize("road", ROADS)
def test_arrives(cluster, road):
    with within(20):
        for pid in (1, cluster[0]):
            for name, (kind, arguments) in (FOUND if road == "call" else BUILTINS).items():
                if pid == 1 and kind is KeyboardInterrupt:
                    continue  # it may be the user's own Ctrl-C
                try:
                    ROADS[road](kind, arguments, pid)
                except BaseException as error:
                    caught = error
                else:
                    pytest.fail(f"{name} raised nothing")
                check(name, caught, kind, arguments)


@pytest.mark.parametrize("batch_size", [None, 1, 5])
def test_of_elements(cluster, batch_size):
    # What is no Exception ends a batch, and on this process it may be the user's own Ctrl-C.
    found = {name: how for name, how in FOUND.items() if issubclass(how[0], Exception)}
    for pid in (1, cluster[0]):
        errors = sd.pmap(
            lambda how: fail(*how),
            list(found.values()),
            pool=sd.WorkerPool([pid]),
            batch_size=batch_size,
            on_error=lambda error: error,
        )
        for (name, how), error in zip(found.items(), errors, strict=True):
            check(name, error, *how)


def test_as_values(cluster):
    """An exception that is a value stays itself, and may be raised anywhere."""
    for name, (kind, arguments) in FOUND.items():
        original = kind(*arguments)
        future = sd.Future(cluster[0]).put(original)
        for other in (sd.remotecall_fetch(lambda x: x, cluster[0], original), future.fetch()):
            assert type(other) is kind, name
            assert repr(other) == repr(original), name

            def generate(error=other):
                raise error
                yield

            with pytest.raises(BaseException) as caught:
                list(generate())
            assert isinstance(caught.value, (kind, RuntimeError)), name


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration, GeneratorExit])
def test_ends_of_iterations_out_of_a_task(kind):
    with pytest.raises(sd.RemoteException, match=kind.__name__) as caught:
        asyncio.run(_await(sd.async_(fail, kind, ())))
    assert not isinstance(caught.value, kind)
    with pytest.raises(sd.RemoteException, match=kind.__name__):
        sd.async_(fail, kind, ()).fetch(timeout=5)


# ---------------------------------------------------------------------- those that refuse


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    unit: str


class Immutable(Exception):
    def __init__(self, *, unit):
        self.__dict__["unit"] = unit

    def __setattr__(self, name, value):
        raise TypeError("immutable")


class Slotted(Exception):
    __slots__ = ("_unit",)

    def __init__(self, unit):
        object.__setattr__(self, "_unit", unit)

    def __setattr__(self, name, value):
        raise TypeError("immutable")

    @property
    def unit(self):
        return self._unit


class BadPickling(Exception):
    def __init__(self, unit):
        self.unit = unit

    def __reduce__(self):
        raise RuntimeError("no pickling")


class BadReading(Exception):
    def __init__(self, unit):
        self.unit = unit

    def __reduce__(self):
        return BadReading, ()


class BadTexts(Exception):
    def __init__(self, unit):
        self.unit = unit

    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


class OurNames(Exception):
    pid = captured = property(lambda self: 1 / 0)

    def __init__(self, unit):
        self.unit = unit


class HoldsLock(Exception):
    def __init__(self, unit):
        import threading

        self.unit, self.lock = unit, threading.Lock()


class Refusing(type):
    def __new__(mcs, name, bases, namespace):
        if any(type(base) is mcs for base in bases):
            raise TypeError("no subclasses")
        return super().__new__(mcs, name, bases, namespace)


class Final(Exception, metaclass=Refusing):
    def __init__(self, unit):
        self.unit = unit


class Guarded(Exception):
    def __init__(self, unit):
        self.__dict__["unit"] = unit

    def __getattribute__(self, name):
        if name.startswith("_shmdist") or name in ("pid", "captured"):
            raise RuntimeError("guarded")
        return super().__getattribute__(name)


MAKERS = [
    lambda: Frozen("metre"),
    lambda: Immutable(unit="metre"),
    lambda: Slotted("metre"),
    lambda: BadPickling("metre"),
    lambda: BadReading("metre"),
    lambda: BadTexts("metre"),
    lambda: OurNames("metre"),
    lambda: HoldsLock("metre"),
    lambda: Final("metre"),
    lambda: Guarded("metre"),
]


def raise_made(make):
    raise make()


def test_refusing_exceptions_arrive(cluster):
    for make in MAKERS:
        kind = type(make())
        for pid in (1, cluster[0]):
            pool = sd.WorkerPool([pid])

            def block(pid=pid, make=make):
                with sd.sync():
                    sd.remotecall_fetch(raise_made, pid, make)

            roads = [
                lambda: sd.remotecall_fetch(raise_made, pid, make),  # noqa: B023 - called in this turn
                lambda: sd.remotecall(raise_made, pid, make).fetch(timeout=5),  # noqa: B023
                lambda: asyncio.run(_await(sd.remotecall(raise_made, pid, make))),  # noqa: B023
                lambda: sd.pmap(raise_made, [make, make], pool=pool),  # noqa: B023
                lambda: list(sd.pgenerate(raise_made, [make], pool=pool)),  # noqa: B023
                block,
            ]
            if pid != 1:  # through another process
                roads.append(
                    lambda: sd.remotecall_fetch(sd.remotecall_fetch, pid, raise_made, cluster[1], make)  # noqa: B023
                )
            for road in roads:
                with within(5), pytest.raises(kind) as caught:
                    road()
                assert isinstance(caught.value, sd.RemoteException), kind
                assert caught.value.unit == "metre", kind
                assert vars(BaseException)["__dict__"].__get__(caught.value.captured.ex) is not None
                caught.value.add_note("may be changed")


def test_a_frozen_exception_in_a_block_of_sync():
    with pytest.raises(Frozen) as caught, sd.sync():
        raise Frozen("metre")
    assert type(caught.value) is Frozen and caught.value.unit == "metre"
    task = sd.async_(raise_made, MAKERS[0])
    with pytest.raises(Frozen):
        task.fetch(timeout=5)


# ---------------------------------------------------------------------- chains of calls


def _by_call(n):
    return 1 / 0 if n == 0 else sd.remotecall_fetch(_by_call, sd.myid(), n - 1)


def _by_future(n):
    return 1 / 0 if n == 0 else sd.remotecall(_by_future, sd.myid(), n - 1).fetch()


def _by_map(n):
    pool = sd.WorkerPool([sd.myid()])
    return 1 / 0 if n == 0 else sd.pmap(_by_map, [n - 1], pool=pool)[0]


def _by_loop(n):
    if n == 0:
        return 1 / 0
    loop = sd.distributed(max, pool=sd.WorkerPool([sd.myid()]))(lambda _: _by_loop(n - 1))
    return loop(range(1))


def _to_and_fro(n, a, b):
    return 1 / 0 if n == 0 else sd.remotecall_fetch(_to_and_fro, b, n - 1, b, a)


@pytest.mark.parametrize("chain", [_by_call, _by_future, _by_map, _by_loop, _to_and_fro])
def test_nested_errors_stay_short(cluster, chain):
    a, b, _ = cluster
    more = (a, b) if chain is _to_and_fro else ()
    for call in (lambda n: chain(n, *more), lambda n: sd.remotecall_fetch(chain, a, n, *more)):
        sizes = []
        for n in (1, 2, 12):
            with pytest.raises(ZeroDivisionError) as caught:
                call(n)
            text = str(caught.value)
            assert "/shmdist/" not in text.replace("/wt/", "/"), text
            sizes.append(len(text))
        assert sizes[2] - sizes[1] <= 11 * max(sizes[1] - sizes[0], 50), sizes


def test_a_recursion_error_comes_back():
    def endless(n, pid):
        return sd.remotecall_fetch(endless, pid, n + 1, pid)

    with pytest.raises(RecursionError) as caught:
        endless(0, 1)
    assert len(str(caught.value)) < 200_000
    assert sd.remotecall_fetch(abs, 1, -2) == 2


def test_a_recursion_error_of_a_worker_comes_back(cluster):
    def endless(n):
        return sd.remotecall_fetch(endless, sd.myid(), n + 1)

    with pytest.raises(RecursionError) as caught:
        sd.remotecall_fetch(endless, cluster[0], 0)
    assert len(str(caught.value)) < 200_000
    assert sd.remotecall_fetch(abs, cluster[0], -2) == 2


def test_a_debugger_lands_in_the_users_frame():
    def divide(x):
        marked = x  # noqa: F841 - what a debugger would show
        return 1 / 0

    pool = sd.WorkerPool([1])
    for road in (
        lambda: sd.remotecall_fetch(divide, 1, 5),
        lambda: sd.remotecall(divide, 1, 5).fetch(timeout=5),
        lambda: sd.pmap(divide, [5], pool=pool),
        lambda: list(sd.pgenerate(divide, [5], pool=pool)),
        lambda: sd.distributed(max, pool=pool)(divide)([5]),
    ):
        with pytest.raises(ZeroDivisionError) as caught:
            road()
        *_, (frame, _) = traceback.walk_tb(caught.value.__traceback__)
        assert frame.f_locals == {"x": 5, "marked": 5}


def test_only_the_users_frames_show(cluster):
    def outer():
        def inner(_):
            return {}["needle"]

        return list(map(inner, [1]))

    pool = sd.WorkerPool(cluster[:1])
    for road in (
        lambda: sd.remotecall_fetch(outer, cluster[0]),
        lambda: sd.remotecall(outer, cluster[0]).fetch(timeout=5),
        lambda: sd.pmap(lambda _: outer(), [1], pool=pool),
        lambda: sd.distributed(max, pool=pool)(lambda _: outer())(range(2)),
        lambda: sd.remotecall_fetch(lambda: sd.remotecall_fetch(outer, cluster[1]), cluster[0]),
    ):
        with pytest.raises(KeyError) as caught:
            road()
        text = str(caught.value)
        files = [line for line in text.splitlines() if line.lstrip().startswith("File ")]
        assert len(files) >= 2 and all("test_standard_exceptions.py" in line for line in files), text
