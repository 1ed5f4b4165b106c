"""What workers print, from Python and from C, is shown by process 1: by lines, and before the call's result."""

import pytest

import shmdist as sd
from tests.integration.helpers import Script, run_script, until


def by_print():
    print("needle")


def by_stderr():
    import sys

    print("needle", file=sys.stderr)


def by_write():
    import os

    os.write(1, b"needle\n")


def by_c():
    import ctypes

    ctypes.CDLL(None).puts(b"needle")


def by_child():
    import subprocess

    subprocess.run(["echo", "needle"], check=True)


def by_logging():
    import logging

    logging.warning("needle")


def in_pieces():
    print("needle", end="")
    print()


def unfinished():
    print("needle", end="")


@pytest.mark.parametrize(
    "function", [by_print, by_stderr, by_write, by_c, by_child, by_logging, in_pieces, unfinished]
)
def test_shown_before_the_result(cluster, capsys, function):
    pid = cluster[0]
    for call in (
        lambda: sd.remotecall_fetch(function, pid),
        lambda: sd.remotecall(function, pid).fetch(timeout=5),
        lambda: sd.remotecall(function, pid).wait(timeout=5) and None,
        lambda: sd.remotecall_wait(function, pid) and None,
    ):
        for _ in range(10):
            call()
            out, err = capsys.readouterr()
            text, other = (err, out) if function in (by_stderr, by_logging) else (out, err)
            assert "needle" in text and f"From worker {pid}:" in text and text.endswith("\n"), repr(text)
            assert not other


def test_failed_calls_show_theirs_too(cluster, capsys):
    def fail():
        print("needle")
        return 1 / 0

    with pytest.raises(ZeroDivisionError):
        sd.remotecall_fetch(fail, cluster[0])
    assert "needle" in capsys.readouterr().out


def test_lines_are_whole_and_in_order(cluster, capsys):
    def talk(n):
        for number in range(n):
            print(f"line {number} " + "x" * (number % 50))

    futures = [sd.remotecall(talk, pid, 300) for pid in cluster]
    for future in futures:
        future.fetch(timeout=10)
    lines = capsys.readouterr().out.splitlines()
    for pid in cluster:
        mine = [
            line.partition(":")[2].strip() for line in lines if line.strip().startswith(f"From worker {pid}:")
        ]
        assert mine == [
            f"line {n} ".strip() if n % 50 == 0 else f"line {n} " + "x" * (n % 50) for n in range(300)
        ]
    assert len(lines) == 300 * len(cluster)


def test_shown_while_the_call_goes_on(cluster, capsys):
    gate = sd.RemoteChannel()

    def talk_and_wait(gate):
        print("early")
        gate.take()

    future = sd.remotecall(talk_and_wait, cluster[0], gate)
    seen = []
    until(lambda: seen.append(capsys.readouterr().out) or "early" in "".join(seen))
    gate.put(1)
    future.fetch(timeout=5)


def test_much_at_once(cluster, capsys):
    def much():
        print("y" * 3_000_000)
        return 1

    assert sd.remotecall_fetch(much, cluster[0]) == 1
    assert capsys.readouterr().out.count("y") == 3_000_000


def test_text_of_all_kinds(cluster, capsys):
    sd.remotecall_fetch(print, cluster[0], "grüße ☃ 漢字")
    assert "grüße ☃ 漢字" in capsys.readouterr().out

    def raw():
        import os

        os.write(1, b"\xff\xfe broken\n\n")

    sd.remotecall_fetch(raw, cluster[0])
    assert "broken" in capsys.readouterr().out


def test_each_stream_to_its_own():
    """To the real ones when nobody replaced them; what the program prints stays in its place."""
    ended = run_script(
        """
import io, sys, contextlib, warnings, shmdist as sd
sd.addprocs(1)
print("zero")
sd.remotecall_fetch(print, 2, "one", file=None)
buffer = io.StringIO()
with contextlib.redirect_stdout(buffer):
    sd.remotecall_fetch(print, 2, "two")
print([buffer.getvalue()])
with contextlib.redirect_stderr(io.StringIO()) as errors:
    sd.remotecall_fetch(lambda: warnings.warn("careful"), 2)
print("careful" in errors.getvalue())
sd.remotecall_fetch(lambda: print("three", file=__import__("sys").stderr), 2)
"""
    )
    assert ended.out == "zero\n      From worker 2:\tone\n['      From worker 2:\\ttwo\\n']\nTrue\n"
    assert ended.err == "      From worker 2:\tthree\n"


def test_without_prefixes():
    code = "import shmdist as sd; sd.addprocs(1); sd.remotecall_fetch(print, 2, '1,2,3')"
    assert run_script(code, env={"SHMDIST_PREFIX": "0"}).clean() == "1,2,3\n"


def test_the_last_words_of_a_worker(fresh, capsys):
    [pid] = fresh()

    def last_progress():
        import os
        import sys

        print("said at last", flush=True)
        sys.stderr.write("and without an end")
        sys.stderr.flush()
        os._exit(1)

    with pytest.raises(sd.ProcessExitedException) as caught:
        sd.remotecall_fetch(last_progress, pid)
    assert "and without an end" in str(caught.value)
    seen = []
    until(lambda: seen.append(capsys.readouterr().out) or "said at last" in "".join(seen))


def test_a_closed_terminal_costs_only_the_text():
    script = Script(
        """
import os, sys, shmdist as sd
sd.addprocs(1)
print("up", flush=True)
sys.stdin.readline()
for _ in range(3):
    assert sd.remotecall_fetch(lambda: print("nobody reads this") or 5, 2) == 5
os.write(2, b"fine")
os._exit(0)
""",
        stdin="go\n",
    )
    assert script.line() == "up"
    script.process.stdout.close()
    script.process.stdin.write("go\n")
    script.process.stdin.close()
    assert script.process.stderr.read() == "fine"
    script.process.stderr.close()
    assert script.process.wait(5) == 0
