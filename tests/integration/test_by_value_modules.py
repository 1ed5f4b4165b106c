"""Modules registered with `cloudpickle.register_pickle_by_value`, and what functions by value take along."""

import functools
import sys
import types

import cloudpickle
import pytest

import shmdist as sd
from shmdist.serialization.modules import goes_by_value
from tests.integration.helpers import run_script

SOURCE = """
import functools
K = 3
def g(x): return K * x
@functools.lru_cache
def cached(x): return x + K
class C:
    def f(self): return K
class E(Exception): pass
def fail(): raise E("x")
"""


@pytest.fixture
def module(monkeypatch):
    """A module that workers cannot import, which goes by value."""
    made = types.ModuleType("not_on_workers")
    exec(SOURCE, made.__dict__)
    monkeypatch.setitem(sys.modules, "not_on_workers", made)
    cloudpickle.register_pickle_by_value(made)
    yield made
    cloudpickle.unregister_pickle_by_value(made)


def test_functions_and_classes_on_every_road(cluster, module):
    a = cluster[0]
    thing = module.C()
    for _ in range(3):  # the bytes of what was called before may be kept
        assert sd.remotecall_fetch(module.g, a, 1) == sd.remotecall(module.g, a, 1).fetch() == 3
        assert sd.remotecall_fetch(lambda: module.g(2), a) == 6
        assert sd.remotecall_fetch(functools.partial(module.g, 2), a) == 6
    assert sd.remotecall_fetch(module.cached, a, 1) == 4
    assert type(sd.remotecall_fetch(module.C, a)) is sd.remotecall_fetch(lambda: module.C, a) is module.C
    assert sd.remotecall_fetch(thing.f, a) == sd.remotecall_fetch(module.C.f, a, thing) == 3
    for size in (None, 1, 5):
        assert sd.pmap(module.g, range(6), batch_size=size) == [3 * i for i in range(6)]
        assert sd.pmap(lambda c: c.f(), [module.C() for _ in range(6)], batch_size=size) == [3] * 6
        assert {type(c) for c in sd.pmap(lambda _: module.C(), range(6), batch_size=size)} == {module.C}
    assert sum(sd.pgenerate(module.g, range(4))) == 18
    channel = sd.RemoteChannel(lambda: sd.Channel(1), a)
    channel.put(thing)
    assert type(channel.take()) is module.C
    with pytest.raises(module.E):
        sd.remotecall_fetch(module.fail, a)


def test_registered_and_unregistered_between_calls(cluster):
    import colorsys

    a, function = cluster[0], colorsys.rgb_to_hsv

    def is_its_own(f):
        return f.__globals__ is not sys.modules[f.__module__].__dict__

    def seen():
        direct, nested = sd.remotecall_fetch(is_its_own, a, function), lambda: is_its_own(function)
        assert sd.remotecall_fetch(nested, a) is direct
        assert sd.remotecall_fetch(function, a, 1, 1, 1) == (0.0, 0.0, 1)
        return direct

    for _ in range(2):
        assert [seen() for _ in range(6)] == [False] * 6
        cloudpickle.register_pickle_by_value(colorsys)
        try:
            assert [seen() for _ in range(6)] == [True] * 6
        finally:
            cloudpickle.unregister_pickle_by_value(colorsys)


def test_a_package_stands_for_its_modules():
    import xml.dom.minidom

    assert goes_by_value("__main__") and not goes_by_value("xml.dom.minidom") and not goes_by_value(None)
    cloudpickle.register_pickle_by_value(xml.dom)
    try:
        assert goes_by_value("xml.dom.minidom") and goes_by_value("xml.dom")
        assert not goes_by_value("xml") and not goes_by_value("xml.domino") and not goes_by_value(None)
    finally:
        cloudpickle.unregister_pickle_by_value(xml.dom)


PROGRAM = """
{future}
import dataclasses, enum
import shmdist as sd
SCALE = 3
def decorated(f): return f
class Base: base = SCALE
def work(i):
    @dataclasses.dataclass
    class State(Base):
        a: {annotation}
        k: int = SCALE
        items: list = dataclasses.field(default_factory=lambda: [SCALE])
        @decorated
        def method(self, by=SCALE): return [by * j for j in range(SCALE)] + [(lambda: SCALE)()]
        class Inner:
            own = SCALE
            twice = [SCALE for _ in range(2)]
    class Color(enum.Enum):
        X = SCALE
    s = State(1)
    return s.k, s.items, s.method(), s.Inner.own, s.Inner.twice, Color.X.value, s.base
for pids in ([], sd.addprocs(1), sd.addprocs(1)):
    for SCALE in (3, 4):
        wanted = work(0)
        assert wanted[0] == SCALE
        for size in (None, 1, 5):
            assert sd.pmap(work, range(3), batch_size=size) == [wanted] * 3
        assert list(sd.pgenerate(work, range(2))) == [wanted] * 2
        assert sd.distributed(lambda a, b: a, range(3))(work) == wanted
        for pid in pids:
            assert sd.remotecall_fetch(work, pid, 0) == sd.remotecall(work, pid, 0).fetch() == wanted
print("ok")
"""


@pytest.mark.parametrize("future", ["", "from __future__ import annotations"])
def test_bodies_of_classes_see_globals(future):
    annotation = "Base" if not future else "OnlyForThoseWhoRead"
    assert run_script(PROGRAM.format(future=future, annotation=annotation)).out == "ok\n"
