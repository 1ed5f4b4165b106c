"""Calls of one caller start on a worker in their order; one whose arguments wait holds up itself alone."""

import sys
import time

import shmdist as sd
from tests.integration.helpers import within

_begun = []  # on the worker


def _begin(what):
    _begun.append(what)
    return list(_begun)


class _Waits:
    """Waits where it is read until it is told to go on."""

    def __init__(self, channel):
        self.channel = channel

    def __reduce__(self):
        return _wait_for, (self.channel,)


def _wait_for(channel):
    return channel.take(timeout=30)


class _Sleeps:
    def __reduce__(self):
        return time.sleep, (3,)


def test_an_import_for_an_argument_keeps_the_order(fresh, tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(1)\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    [worker] = fresh(1)  # it has the path
    import slow_to_import

    first = sd.remotecall(lambda _: _begin("first"), worker, slow_to_import.Thing())
    assert sd.remotecall_fetch(_begin, worker, "second") == ["first", "second"]
    assert first.fetch(timeout=10) == ["first"]
    del sys.modules["slow_to_import"]


def test_an_argument_that_waits_for_a_call_holds_up_itself_alone(fresh):
    [worker] = fresh(1)
    channel = sd.RemoteChannel()
    first = sd.remotecall(_begin, worker, _Waits(channel))
    assert sd.remotecall_fetch(_begin, worker, "second") == ["second"]
    channel.put("first")
    assert first.fetch(timeout=10) == ["second", "first"]


def test_an_argument_that_sleeps_holds_up_itself_alone(fresh):
    [worker] = fresh(1)
    first = sd.remotecall(_begin, worker, _Sleeps())
    with within(2.5):
        assert sd.remotecall_fetch(_begin, worker, "second") == ["second"]
    assert first.fetch(timeout=10) == ["second", None]
