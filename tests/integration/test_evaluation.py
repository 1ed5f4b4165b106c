"""everywhere and remotecall_eval."""

import sys
import threading

import pytest

import shmdist as sd

scale = 3


def helper(x):
    return x + scale


def test_code_runs_on_all(cluster):
    sd.everywhere("import math\nplace = shift + int(math.pi)", shift=10)
    for pid in [1, *cluster]:
        assert sd.remotecall_eval("__main__", pid, "place") == 13
    assert sd.everywhere("place += 1; place * 2", cluster[0]) == 28
    sd.everywhere("place = 0", cluster[1:])
    assert [sd.everywhere("place", pid) for pid in cluster] == [14] + [0] * (len(cluster) - 1)
    assert sd.everywhere("statement = 1", cluster[0]) is None


def test_imports_run_here_first(cluster):
    sys.modules.pop("this_is_not_there", None)
    with pytest.raises(ModuleNotFoundError):
        sd.everywhere("import this_is_not_there; touched = 1", cluster)
    assert sd.everywhere("'touched' in globals()", cluster[0]) is False


def test_every_failure_is_told(cluster):
    with pytest.raises(sd.CompositeException) as caught:
        sd.everywhere("import shmdist\nassert shmdist.myid() == 1, shmdist.myid()")
    assert sorted(error.pid for error in caught.value.exceptions) == cluster
    assert all(isinstance(error, AssertionError) for error in caught.value.exceptions)
    with pytest.raises(ZeroDivisionError):
        sd.everywhere("1 / 0", cluster[0])


def test_a_syntax_error_runs_nothing(cluster):
    with pytest.raises(SyntaxError):
        sd.everywhere("never = 1\nnot python at all")
    assert sd.everywhere("'never' in globals()", cluster[0]) is False


def test_functions_and_classes(cluster):
    @sd.everywhere
    def tripled(x, y=1, *, z=0):
        """Doc."""
        return 3 * helper(x) + y + z

    assert tripled(1) == 13 and tripled.__doc__ == "Doc."
    for pid in cluster:
        assert sd.remotecall_eval("__main__", pid, "tripled(1, z=1)") == 14

    @sd.everywhere
    class Point:
        def __init__(self, x):
            self.x = x

        def doubled(self):
            return type(self)(2 * self.x)

    assert sd.remotecall_eval("__main__", cluster[0], "Point(4).doubled().x") == 8


def test_a_function_sees_the_globals_where_it_runs(cluster):
    sd.everywhere("import shmdist\nwhere_am_i = shmdist.myid()")

    @sd.everywhere(cluster)
    def tell():
        return where_am_i  # noqa: F821 - a global of __main__ there

    for pid in cluster:
        assert sd.remotecall_eval("__main__", pid, "tell()") == pid


def test_a_remote_function_finds_what_only_its_process_has(cluster):
    sd.remotecall_eval("__main__", cluster[0], "only_there = 5")
    code = "lambda: only_there + 1"
    function = eval(code, {"__name__": "__main__"})
    assert sd.remotecall_fetch(function, cluster[0]) == 6
    with pytest.raises(NameError):
        sd.remotecall_fetch(function, cluster[1])


def test_remotecall_eval_in_a_module(cluster):
    assert sd.remotecall_eval("math", cluster[0], "floor(2.5)") == 2
    assert sd.remotecall_eval(sys.modules["os"], cluster[0], "sep") == "/"
    assert sd.remotecall_eval("__main__", cluster, "several = 1") is None
    with pytest.raises(TypeError):
        sd.remotecall_eval("__main__", cluster[0], 5)
    with pytest.raises(ModuleNotFoundError):
        sd.remotecall_eval("no_such_module_at_all", cluster[0], "1")


def test_wrong_arguments(cluster):
    with pytest.raises(TypeError, match="a text, a function or a class"):
        sd.everywhere(len)
    with pytest.raises(ValueError, match="no process 999"):
        sd.everywhere("1", [999])


def test_code_is_compiled_as_it_stands(cluster):
    sd.everywhere("def annotated(x: int): ...", cluster[0])
    assert sd.everywhere("annotated.__annotations__['x'] is int", cluster[0])
    sd.everywhere("from __future__ import annotations\ndef annotated(x: int): ...", cluster[0])
    assert sd.everywhere("annotated.__annotations__['x']", cluster[0]) == "int"


def test_code_may_be_indented(cluster):
    code = """
        number = 1
        if number:
            number += 1
        number
    """
    assert sd.everywhere(code, cluster[0]) == 2 == sd.remotecall_eval("__main__", cluster[0], code)


def test_methods_see_the_globals_where_they_run(cluster):
    @sd.everywhere(set_by_the_binding=5)
    class Seeing:
        def tell(self):
            return set_by_the_binding, set_later, helper(1)  # noqa: F821 - globals of __main__ there

        @staticmethod
        def tell_static():
            return set_later  # noqa: F821

        @classmethod
        def tell_class(cls):
            return cls.__name__, set_later  # noqa: F821

        @property
        def told(self):
            return set_later  # noqa: F821

    for value in (1, 2):
        sd.everywhere("set_later = value", value=value)
        assert sd.everywhere("Seeing().tell()", cluster[0]) == (5, value, 4)
        assert sd.everywhere("Seeing.tell_static(), Seeing().told", cluster[0]) == (value, value)
        assert sd.everywhere("Seeing.tell_class()", cluster[0]) == ("Seeing", value)
    assert isinstance(sd.everywhere("Seeing()", cluster[0]), Seeing)


def test_a_local_function_that_calls_itself(cluster):
    @sd.everywhere
    def factorial(n):
        return 1 if n < 2 else n * factorial(n - 1)

    assert factorial(5) == 120 == sd.everywhere("factorial(5)", cluster[0])


def test_bindings_are_set_where_the_definition_is(cluster):
    @sd.everywhere(cluster[:1], only_for_one=7)
    def tell_one():
        return only_for_one  # noqa: F821 - bound there

    assert sd.everywhere("tell_one()", cluster[0]) == 7
    assert not hasattr(sys.modules["__main__"], "only_for_one")
    assert sd.everywhere("'tell_one' in globals()", cluster[1]) is False


def test_what_cannot_be_sent_is_told_before_anything_runs(cluster):
    with pytest.raises(sd.SerializationError, match="lock"):
        sd.everywhere("ran_with_a_lock = 1", bound=threading.Lock())
    for pid in [1, *cluster]:
        assert sd.everywhere("'ran_with_a_lock' in globals()", pid) is False


def test_code_runs_on_all_at_once(cluster):
    """Each waits till the last has begun."""
    arrived, gate = sd.RemoteChannel(lambda: sd.Channel(99)), sd.RemoteChannel(lambda: sd.Channel(99))

    def open_gate():
        for _ in [1, *cluster]:
            arrived.take(timeout=10)
        for _ in [1, *cluster]:
            gate.put(None)

    opener = sd.async_(open_gate)
    sd.everywhere("arrived.put(None); gate.take(timeout=10)", arrived=arrived, gate=gate)
    opener.fetch(timeout=5)
    sd.everywhere("del arrived, gate")
