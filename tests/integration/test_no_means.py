"""No thread, no descriptor, no memory: the error of the call that needed it. Every call ends, later ones work."""

import os
import subprocess
import sys
import textwrap

import pytest

import shmdist as sd
from tests.integration.helpers import until


def _until_it_works(call):
    """Try a call again while threads of the calls before are on their way back."""

    def works():
        try:
            return call()
        except (RuntimeError, MemoryError):
            return False

    until(works, 10)


def _blocked(worker, count):
    """Have a worker run calls that block; returns how many were answered, and how many refused."""
    channel = sd.RemoteChannel(lambda: sd.Channel(count))
    futures = [sd.remotecall(channel.take, worker) for _ in range(count)]
    try:
        assert sd.remotecall_fetch(abs, worker, -1) == 1
    except (RuntimeError, MemoryError):
        pass  # there is no thread for it either, and those before it have been read
    for number in range(count):
        channel.put(number)
    answered, refused = 0, []
    for future in futures:
        try:
            future.fetch(timeout=30)
            answered += 1
        except TimeoutError:
            raise
        except sd.RemoteException as error:
            refused.append(error)
    _until_it_works(lambda: sd.remotecall(abs, worker, -2).fetch(timeout=30) == 2)
    assert all(isinstance(error, RuntimeError | MemoryError) for error in refused)
    return answered, refused


def test_as_many_threads_as_are_allowed(fresh, monkeypatch):
    monkeypatch.setenv("SHMDIST_MAX_THREADS", "12")
    worker = fresh()[0]
    answered, refused = _blocked(worker, 40)
    assert 8 <= answered <= 12
    assert len(refused) == 40 - answered
    assert "SHMDIST_MAX_THREADS" in str(refused[0])
    until(lambda: _blocked(worker, 6)[0] == 6, 20)  # all threads are free again


def test_a_lane_is_refused_as_a_whole_and_later_calls_work(fresh, monkeypatch):
    monkeypatch.setenv("SHMDIST_MAX_THREADS", "6")
    workers = fresh(2)
    channel = sd.RemoteChannel(lambda: sd.Channel(20))
    futures = [sd.remotecall(channel.take, workers[0]) for _ in range(10)]
    pool = sd.WorkerPool(workers)
    outcomes = sd.pmap(abs, range(-20, 0), pool=pool, batch_size=1, on_error=lambda error: -1)
    assert all(outcome in (number, -1) for outcome, number in zip(outcomes, range(20, 0, -1), strict=True))
    for number in range(20):
        channel.put(number)
    for future in futures:
        try:
            future.fetch(timeout=30)
        except RuntimeError:
            pass
    _until_it_works(lambda: sd.pmap(abs, range(-20, 0), pool=pool, batch_size=1) == list(range(20, 0, -1)))


def _use_up_descriptors(limit):
    import builtins
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    builtins.files = []
    while True:
        builtins.files.append(open("/dev/null"))  # noqa: SIM115 - it is to stay open


def _close_files():
    import builtins

    builtins.files.clear()


@pytest.mark.parametrize("call", ["future", "fetch", "map", "busy"])
def test_no_descriptors_on_a_worker(fresh, call):
    worker = fresh()[0]
    with pytest.raises(OSError, match="open files") as caught:
        if call == "future":
            sd.remotecall(_use_up_descriptors, worker, 200).fetch(timeout=30)
        elif call == "fetch":
            sd.remotecall_fetch(_use_up_descriptors, worker, 200)
        elif call == "map":
            sd.pmap(_use_up_descriptors, [200], pool=sd.WorkerPool([worker]))
        else:
            channel = sd.RemoteChannel(lambda: sd.Channel(1))
            other = sd.remotecall(channel.take, worker)
            try:
                sd.remotecall_fetch(_use_up_descriptors, worker, 200)
            finally:
                channel.put(7)
                assert other.fetch(timeout=30) == 7
    assert "_use_up_descriptors" in str(caught.value)
    assert sd.remotecall(abs, worker, -3).fetch(timeout=30) == 3
    sd.remotecall_fetch(_close_files, worker)


def _run(text, **options):
    """Run a program of process 1."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )
    assert done.stdout.strip().endswith("ok"), (done.returncode, done.stdout, done.stderr)


_CALLS_BACK = """
    def back(n):
        import shmdist as sd
        return sd.remotecall_fetch(abs, 1, -n)
    def ends(future):
        try:
            return future.fetch(timeout=20) is not None
        except TimeoutError:
            raise
        except (RuntimeError, MemoryError, OSError) as error:
            return False
    def works_again(worker):
        import time
        deadline = time.monotonic() + 10  # threads of the calls before may be on their way back
        while True:
            try:
                if ends(sd.remotecall(back, worker, 5)): return
            except (RuntimeError, MemoryError):
                pass  # here there is none yet
            assert time.monotonic() < deadline
"""


def test_no_memory_on_a_worker():
    """There is none for threads, nor for what comes and what goes."""
    _run(
        _CALLS_BACK
        + """
    import shmdist as sd
    a, = sd.addprocs(1)
    def limit(nbytes):
        import resource
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + nbytes, -1))
    sd.remotecall_fetch(limit, a, 64 << 20)
    channel = sd.RemoteChannel(lambda: sd.Channel(40))
    for _ in range(2):
        called = [sd.remotecall(channel.take, a) for _ in range(30)]
        for n in range(30): channel.put(n)
        outcomes = [ends(future) for future in called]
        assert any(outcomes), outcomes
        while len(channel): channel.take(timeout=20)
        assert sd.remotecall(abs, a, -2).fetch(timeout=20) == 2
        assert not ends(sd.remotecall(len, a, bytes(200 << 20)))
        assert not ends(sd.remotecall(bytes, a, 200 << 20))
        assert sd.remotecall(len, a, bytes(1000)).fetch(timeout=20) == 1000
    print("ok")
    """
    )


def test_no_threads_on_process_1():
    _run(
        _CALLS_BACK
        + """
    import os, resource
    os.environ["SHMDIST_MAX_THREADS"] = "6"
    import shmdist as sd
    a, b = sd.addprocs(2)
    channel = sd.RemoteChannel(lambda: sd.Channel(40))
    def takes(channel):
        return channel.take()
    local = []
    for _ in range(20):
        try:
            local.append(sd.remotecall(takes, 1, channel))
        except RuntimeError as error:
            assert "SHMDIST_MAX_THREADS" in str(error), error
    assert sd.remotecall(abs, a, -1).fetch(timeout=20) == 1
    called = [sd.remotecall(back, a, n) for n in range(10)]
    for future in called: ends(future)
    for n in range(40): channel.put(n)
    for future in local: ends(future)
    works_again(a)
    assert sd.remotecall(abs, 1, -5).fetch(timeout=20) == 5
    sd.rmprocs(a, b)
    print("ok")
    """
    )


def test_no_memory_on_process_1():
    _run(
        _CALLS_BACK
        + """
    import resource
    import shmdist as sd
    a, = sd.addprocs(1)
    sd.remotecall_fetch(back, a, 1)
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (40 << 20), -1))
    for _ in range(3):
        assert not ends(sd.remotecall(bytes, a, 200 << 20))
        called = [sd.remotecall(back, a, n) for n in range(1, 30)]
        for future in called: ends(future)
        works_again(a)
    sd.rmprocs(a)
    print("ok")
    """
    )


def test_no_descriptors_on_process_1():
    _run(
        _CALLS_BACK
        + """
    import resource
    import shmdist as sd
    a, = sd.addprocs(1)
    sd.remotecall_fetch(back, a, 1)
    def fails(): raise KeyError("mine")
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    files = []
    try:
        while True: files.append(open("/dev/null"))
    except OSError: pass
    for _ in range(3):
        assert sd.remotecall(back, a, 5).fetch(timeout=20) == 5
        try: sd.remotecall(fails, a).fetch(timeout=20)
        except KeyError as error: assert "mine" in str(error)
        try: sd.addprocs(1)
        except Exception: pass
        else: raise AssertionError("added without descriptors")
    files.clear()
    b, = sd.addprocs(1)
    assert sd.remotecall(back, b, 5).fetch(timeout=20) == 5
    sd.rmprocs(a, b)
    print("ok")
    """
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="the user is changed, which root alone may do")
def test_no_processes_are_left_to_the_user():
    """Under ``ulimit -u``, as another user: the limit does not hold for root."""
    _run(
        _CALLS_BACK
        + """
    import os, resource
    import shmdist as sd
    a, = sd.addprocs(1)
    def fails(): raise KeyError("mine")
    def limit(more):
        import os, resource
        os.setuid(65534)
        count = 0
        for pid in os.listdir("/proc"):
            try:
                if pid.isdigit() and os.stat(f"/proc/{pid}").st_uid == 65534:
                    count += len(os.listdir(f"/proc/{pid}/task"))
            except OSError: pass
        resource.setrlimit(resource.RLIMIT_NPROC, (count + more, count + more))
    channel = sd.RemoteChannel(lambda: sd.Channel(80))
    def rounds(count):
        called = [sd.remotecall(channel.take, a) for _ in range(count)]
        called += [sd.remotecall(back, a, n) for n in range(1, 10)]
        ends(sd.remotecall(abs, a, -1))
        for n in range(count): channel.put(n)
        outcomes = [ends(future) for future in called]
        while len(channel): channel.take(timeout=20)
        works_again(a)
        try: sd.remotecall(fails, a).fetch(timeout=20)
        except KeyError: pass
        return all(outcomes)
    assert rounds(5)
    sd.remotecall_fetch(limit, a, 2)
    assert not rounds(60)
    limit(2)
    rounds(60), rounds(60)
    print("ok")
    """
    )
