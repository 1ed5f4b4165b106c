"""The rule of these benchmarks: a figure stands beside its peer's, on the same work in the same run.

`compare` runs the two by turns, so that a machine that speeds up or slows down does so for both,
and compares their medians. The table at the end has every comparison.
"""

import multiprocessing
import statistics
import time

import pytest

import shmdist as sd

WORKERS = 2
_rows = []


@pytest.fixture(scope="session")
def pool():
    """A multiprocessing.Pool as a script on Linux makes it."""
    with multiprocessing.Pool(WORKERS) as pool:
        pool.map(abs, range(100))
        yield pool


@pytest.fixture(scope="session")
def workers(pool):  # the pool forks, so it comes first
    """Two shmdist workers."""
    with sd.addprocs(WORKERS) as pids:
        sd.pmap(abs, range(100))
        yield pids


def seconds(function, calls=1):
    """Return the seconds that a call of `function` takes; of several, their median."""
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


@pytest.fixture
def compare(benchmark):
    """Return a function that measures two things by turns, and holds their ratio against a limit."""

    def run(what, ours, peer, *, most, peer_name="Pool", rounds=9, calls=1):
        """Measure; `most` is the highest ratio of our median to the peer's that is allowed."""
        seconds(ours, calls), seconds(peer, calls)  # not counted: what is done only once
        our_times, peer_times = [], []

        def both():
            our_times.append(seconds(ours, calls))
            peer_times.append(seconds(peer, calls))

        benchmark.group = what
        for _ in range(rounds - 1):
            both()
        benchmark.pedantic(both, rounds=1)
        mine, other = statistics.median(our_times), statistics.median(peer_times)
        benchmark.extra_info.update(shmdist=mine, peer=other)
        record(what, mine, other, peer_name, most)

    return run


def record(what, mine, other, peer_name, most, unit="s"):
    """Enter a row in the table, and fail if the ratio is above `most`."""
    ratio = mine / other
    _rows.append((what, mine, peer_name, other, ratio, most, unit))
    assert ratio <= most, f"{what}: {ratio:.3g} of {peer_name}, at most {most:.3g} is wanted"


def _text(value, unit):
    if unit != "s":
        return f"{value:.3g} {unit}"
    for factor, name in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {name}"
    return f"{value * 1e6:.3g} us"


def pytest_terminal_summary(terminalreporter):
    if not _rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section("shmdist beside its peers: medians by turns")
    write(f"{'':50} {'shmdist':>10} {'peer':>10}  {'which':22} {'ratio':>7} {'wanted':>7}")
    for what, mine, name, other, ratio, most, unit in _rows:
        verdict = "" if ratio <= most else "  FAILED"
        write(
            f"{what:50} {_text(mine, unit):>10} {_text(other, unit):>10}  {name:22} {ratio:7.3f} {most:7.3f}{verdict}"
        )
