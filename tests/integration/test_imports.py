"""Imports on a worker: threads that import parts of one package at once each get it whole."""

import sys
import threading

import numpy as np
import pytest

import shmdist as sd
from tests.integration.helpers import within

LIMIT = 30

#: A package that takes a while to import, and a part that a thread may come to first.
PACKAGE = {
    "__init__": "import time; time.sleep(0.1)\nfrom .part import answer\nfrom .other import twice\n",
    "part": "import time; time.sleep(0.1)\nfrom . import other\ndef answer(*_): return 42\n"
    "class Thing:\n    value = 42\n",
    "other": "import time; time.sleep(0.1)\nfrom . import part\ndef twice(x, *_): return 2 * x\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules where workers find them; process 1 forgets them in the end."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written = []

    def write(name, sources):
        written.append(name)
        (tmp_path / name).mkdir()
        for part, source in sources.items():
            (tmp_path / name / f"{part}.py").write_text(source)

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] in written]:
        del sys.modules[name]


def test_parts_of_one_package_side_by_side(package, fresh):
    package("apart", PACKAGE)
    from apart.other import twice
    from apart.part import Thing, answer

    def in_body():
        import apart.other

        return apart.other.twice(21)

    def by_name():
        import importlib

        return importlib.import_module("apart.part").answer()

    [pid] = fresh()
    calls = [
        (in_body,),
        (answer,),
        (twice, 21),
        (by_name,),
        (getattr, Thing(), "value"),
        (answer, np.ones(9)),
    ]
    futures = [sd.remotecall(*call[:1], pid, *call[1:]) for call in calls]
    assert [future.fetch(timeout=LIMIT) for future in futures] == [42] * 6


def test_by_results_and_channels(package, fresh):
    package("received", PACKAGE)
    from received.part import Thing

    owner, pid = fresh(2)
    future = sd.remotecall(Thing, owner)
    channel = sd.RemoteChannel(lambda: sd.Channel(5), owner)
    channel.put(Thing())
    calls = [
        sd.remotecall(lambda: future.fetch(timeout=LIMIT).value, pid),
        sd.remotecall(lambda: channel.take(timeout=LIMIT).value, pid),
        sd.remotecall(lambda: __import__("received.other").other.twice(21), pid),
        sd.spawnat(pid, sd.remotecall_fetch, lambda: Thing().value, pid),
    ]
    assert [call.fetch(timeout=LIMIT) for call in calls] == [42] * 4


def test_numpy_by_several_roads(cluster, fresh):
    scalar = sd.remotecall(np.float64, cluster[0], 2.5)
    array = np.ones(100_000)
    for pid in fresh(2):
        futures = [
            sd.remotecall(lambda: float(scalar.fetch(timeout=LIMIT) + 1), pid),
            sd.remotecall(len, pid, array),
            sd.remotecall(lambda: __import__("numpy.linalg").linalg.norm([3.0, 4.0]).item(), pid),
        ]
        assert [future.fetch(timeout=LIMIT) for future in futures] == [3.5, 100_000, 5.0]


WAITS = {
    "a thread": "import threading\ndef run():\n    import {name}.inner\n"
    "thread = threading.Thread(target=run)\nthread.start()\nthread.join()\n",
    "a call": "import shmdist as sd\ndef run():\n    import {name}.inner\n    return 1\n"
    "assert sd.remotecall_fetch(eval, 1, 'sd.remotecall_fetch(__import__, %d, \"{name}_inner\")' % sd.myid(),"
    " {{'sd': sd}}) is not None\n",
    "a lock": "import threading\nlock = threading.Lock()\ntaken = threading.Event()\ndone = threading.Event()\n"
    "def run():\n    with lock:\n        taken.set()\n        import {name}.inner\n"
    "threading.Thread(target=run, daemon=True).start()\ntaken.wait()\nwith lock: pass\n",
}


@pytest.mark.parametrize("what", WAITS)
def test_a_module_that_waits_for_another_import(package, fresh, what):
    name = "waits_for_" + what[2:]
    package(name, {"__init__": "", "outer": WAITS[what].format(name=name) + "value = 42\n", "inner": ""})
    package(name + "_inner", {"__init__": ""})
    [pid] = fresh()
    with within(LIMIT):
        outer = sd.remotecall(lambda: __import__(name + ".outer").outer.value, pid)
        beside = sd.remotecall(lambda: __import__("decimal").__name__, pid)
        assert [outer.fetch(timeout=LIMIT), beside.fetch(timeout=LIMIT)] == [42, "decimal"]


def test_a_hook_is_run_also_for_a_module_imported_beside_another_import(package, fresh):
    package("waits_for_an_event", {"__init__": "import sys\nsys.go_on.wait(30)\n"})
    package("has_a_hook", {"__init__": ""})

    def import_both():
        from shmdist.runtime import imports

        sys.go_on, seen = threading.Event(), []
        imports.when_imported("has_a_hook", seen.append)
        thread = threading.Thread(target=__import__, args=("waits_for_an_event",))
        thread.start()
        while imports._holder != thread.ident:
            pass
        __import__("has_a_hook")
        sys.go_on.set()
        thread.join()
        return [module.__name__ for module in seen]

    [pid] = fresh()
    with within(LIMIT):
        assert sd.remotecall_fetch(import_both, pid) == ["has_a_hook"]


def test_a_lock_left_behind(fresh):
    def leave():
        from shmdist.runtime import imports

        thread = threading.Thread(target=imports._lock.acquire)
        thread.start()
        thread.join()

    [pid] = fresh()
    sd.remotecall_wait(leave, pid)
    with within(LIMIT):
        futures = [sd.remotecall(lambda name: __import__(name).__name__, pid, n) for n in ("decimal", "wave")]
        assert [future.fetch(timeout=LIMIT) for future in futures] == ["decimal", "wave"]


def test_an_import_that_fails_is_the_calls_error(package, fresh):
    package("broken", {"__init__": "from . import absent_part\n"})
    [pid] = fresh()
    for _ in range(2):
        with pytest.raises(ImportError, match="absent_part"):
            sd.remotecall_fetch(lambda: __import__("broken"), pid)
    assert sd.remotecall_fetch(lambda: __import__("wave").__name__, pid) == "wave"
