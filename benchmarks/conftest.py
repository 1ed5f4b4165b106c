"""The rule of these benchmarks: a figure stands beside its peer's, on the same work in the same run.

`compare` measures the two by turns, A B A B, so that a machine that speeds up or slows down does so for
both, and holds the ratio of their medians against a limit. The table at the end has every ratio; with
CHECK=1 one above its limit fails.
"""

import multiprocessing
import os
import statistics
import time

import pytest

import shmdist as sd

WORKERS = 2
CHECK = os.environ.get("CHECK") == "1"  # else the table alone is of interest
_rows = []


@pytest.fixture(scope="session")
def pool():
    """A multiprocessing.Pool as a script makes it."""
    with multiprocessing.Pool(WORKERS) as pool:
        pool.map(abs, range(100))
        yield pool


@pytest.fixture(scope="session")
def workers(pool):  # the pool comes first: it forks, and shmdist starts threads
    """The ids of two shmdist workers."""
    with sd.addprocs(WORKERS) as pids:
        sd.pmap(abs, range(100))
        yield pids


def seconds(function, calls=1):
    """Return the seconds that a call of `function` takes; of several calls, their median."""
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


@pytest.fixture
def compare(benchmark, record):
    """Return a function that measures two things by turns and records how they compare."""

    def run(what, ours, peer, *, peer_name, most, rounds, measure=seconds):
        """Measure; `most` is the highest ratio of our median to the peer's that is allowed.

        `measure` is given `ours` or `peer`, and returns seconds.
        """
        measure(ours), measure(peer)  # not counted: has what is done only once
        our_times, peer_times = [], []
        # pytest-benchmark does not count `setup` in its own table, which so shows the rounds of ours alone.
        benchmark.pedantic(
            lambda: our_times.append(measure(ours)),
            setup=lambda: peer_times.append(measure(peer)),
            rounds=rounds,
        )
        record(what, statistics.median(our_times), statistics.median(peer_times), peer_name, most)

    return run


@pytest.fixture
def record():
    """Return a function that enters a row in the table; with CHECK=1 it fails if the ratio is too high."""

    def enter(what, ours, peer, peer_name, most, unit="s"):
        ratio = ours / peer
        _rows.append((what, _text(ours, unit), _text(peer, unit), peer_name, ratio, most))
        assert not CHECK or ratio <= most, f"{what}: {ratio:.3g} of {peer_name}, at most {most:.3g} is wanted"

    return enter


def _text(value, unit):
    if unit != "s":
        return f"{value:.3g} {unit}"
    for factor, name in ((1, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {name}"
    return f"{value * 1e6:.3g} us"


@pytest.hookimpl(trylast=True)  # after the table of pytest-benchmark
def pytest_terminal_summary(terminalreporter):
    """Print the table."""
    if not _rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section("shmdist beside its peers, medians of measurements by turns")
    write(f"{'':40} {'shmdist':>8} {'peer':>8}  {'which':21} {'ratio':>7} {'wanted':>7}")
    for what, ours, peer, peer_name, ratio, most in _rows:
        verdict = "ok" if ratio <= most else "FAILED" if CHECK else "above"
        write(f"{what:40} {ours:>8} {peer:>8}  {peer_name:21} {ratio:7.3f} {most:7.3f}  {verdict}")
