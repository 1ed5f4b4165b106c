"""A pager or a terminal that reads no more holds up what is printed, and neither calls nor the end."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration.helpers import Script, run_script, until, within
from tests.integration.sshd import needs_sshd

BEGIN = """
import os, signal, sys, threading, time
import shmdist as sd
a, b = sd.addprocs(2)

def chatter(lines):
    for number in range(lines):
        print(number, "x" * 990)

def tell(text):
    os.write(2, text.encode() + b"\\n")

future = sd.remotecall(chatter, a, 3000)
while not sd.remotecall_fetch(os.getpid, b) or not sd.current_node().outputs.stalled:
    sd.remotecall_fetch(print, b, "stalls")
""".replace("sd.current_node()", "__import__('shmdist.runtime.node').runtime.node.current_node()")

CALLS = """
begin = time.monotonic()
assert sd.remotecall(abs, b, -3).fetch(timeout=4) == 3
assert sd.remotecall_fetch(abs, a, -3) == 3  # beside the call that waits to print
assert sd.pmap(abs, [-1, 2, -3], pool=sd.WorkerPool([b])) == [1, 2, 3]
assert sd.remotecall_fetch(lambda: print("late") or 5, b) == 5
assert time.monotonic() - begin < 10
assert not future.done()
tell("served")
"""


def test_calls_go_on_and_nothing_is_lost():
    script = Script(BEGIN + CALLS + "future.fetch()\nsd.rmprocs(a, b)\ntell('fetched')")
    assert script.process.stderr.readline() == "served\n"
    lines = script.process.stdout.read().splitlines()
    mine = [line.split("\t")[1] for line in lines if "From worker 2" in line]
    assert mine == [f"{number} {'x' * 990}" for number in range(3000)]
    assert sum(line.endswith("\tlate") for line in lines) == 1
    assert script.process.stderr.read() == "fetched\n"
    script.process.stdout.close()
    script.process.stderr.close()
    assert script.process.wait(10) == 0


def test_what_is_buffered_is_written_at_the_end_if_it_is_read():
    ended = run_script("import shmdist as sd; sd.addprocs(1); sd.remotecall_fetch(print, 2, 'y' * 200_000)")
    assert ended.clean().count("y") == 200_000


def test_the_end_does_not_wait_for_a_reader_for_ever():
    script = Script(BEGIN + "tell('ends')\n")
    assert script.process.stderr.readline() == "ends\n"
    assert script.process.wait(15) == 0
    script.process.stdout.close()
    script.process.stderr.close()


def test_ctrl_c_while_the_output_stands_still():
    script = Script(
        BEGIN
        + """
try:
    tell("waits")
    future.fetch()
except KeyboardInterrupt:
    assert sd.remotecall_fetch(abs, b, -3) == 3
    tell("interrupted")
"""
    )
    assert script.process.stderr.readline() == "waits\n"
    script.process.send_signal(signal.SIGINT)
    assert script.process.stderr.readline() == "interrupted\n"
    assert script.process.wait(15) == 0
    script.process.stdout.close()
    script.process.stderr.close()


@pytest.mark.parametrize("ends", ["kill", "stop"])
def test_a_reader_that_goes_away(ends):
    """As a pager that is left: the text is lost, and nothing else."""
    program = subprocess.Popen(
        [sys.executable, "-c", BEGIN + "tell('up')\nfuture.fetch(timeout=10)\ntell('done')\nos._exit(0)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert program.stderr.readline() == b"up\n"
    if ends == "kill":
        program.stdout.close()
    else:
        assert len(program.stdout.read()) > 2_000_000
        program.stdout.close()
    assert program.stderr.read() == b"done\n"
    program.stderr.close()
    assert program.wait(10) == 0


def print_much():
    for number in range(3000):
        print(number, "z" * 990)


@needs_sshd
def test_workers_of_other_hosts(sshd):
    """The thread that takes what all of them print waits for none, and what they print for the reader."""
    read, write = os.pipe()
    outputs = current_node().outputs
    with (
        sd.addprocs([(sshd.text, 2)], **sshd.params()) as (a, b),
        open(read, "rb") as reader,
        open(write, "w") as stream,
        contextlib.redirect_stdout(stream),
    ):
        future = sd.remotecall(print_much, a)
        until(lambda: any(pipe.paused for pipe in outputs._pipes.values()), 10.0)
        for pid in (a, b):
            with within(5):
                assert sd.remotecall_fetch(abs, pid, -3) == 3
        lines = [reader.readline() for _ in range(3000)]
        future.fetch(timeout=10)
    numbers = [int(line.split(b"\t")[1].split()[0]) for line in lines]
    assert numbers == list(range(3000))
