"""The page of a worker: process 1 takes calls back on it that have not begun, and no call is both."""

import os
import subprocess
import sys

import pytest

from shmdist.memory.progress_page import LANES, ProgressPage
from shmdist.runtime import executor
from shmdist.transport import native
from tests.integration.helpers import ROOT

in_c = pytest.param(
    "_begin_in_c", marks=pytest.mark.skipif(native.module is None, reason="nothing is compiled here")
)
both = pytest.mark.parametrize("how", ["in Python", in_c])


def begin_of(how):
    return executor._begin_in_c if how == "_begin_in_c" else ProgressPage.begin


@pytest.fixture
def page():
    made = ProgressPage()
    yield made
    made.close()


@both
def test_what_has_begun_is_not_taken_back(page, how):
    begin = begin_of(how)
    assert begin(page, 1, 10) and begin(page, 1, 12)
    assert page.begun(1) == 12
    assert page.withdraw(1, 20) == 12


@both
def test_what_was_taken_back_does_not_begin(page, how):
    begin = begin_of(how)
    assert page.withdraw(1, 20) == 0
    assert [begin(page, 1, number) for number in (19, 20, 21)] == [False, False, True]
    assert page.begun(1) == 21


@both
def test_numbers_only_grow(page, how):
    begin = begin_of(how)
    page.withdraw(3, 20)
    page.withdraw(3, 10)
    assert not begin(page, 3, 15)
    assert begin(page, 3, 30)
    begin(page, 3, 25)
    assert page.begun(3) == 30


@both
def test_each_lane_has_words_of_its_own_up_to_a_number(page, how):
    begin = begin_of(how)
    for lane in range(1, LANES + 1):
        assert begin(page, lane, 100 + lane)
    assert [page.begun(lane) for lane in range(1, LANES + 1)] == list(range(101, 101 + LANES))
    # Lanes that share words are taken for begun too early, never too late.
    assert page.withdraw(LANES + 1, 200) == page.begun(1) == 101
    assert not begin(page, 1, 150) and begin(page, 2, 150)
    assert len(page.copy()) == 0, "the notes lie elsewhere"


def test_a_page_that_is_closed_says_so():
    page = ProgressPage()
    page.close()
    with pytest.raises(ValueError):
        page.begun(1)
    with pytest.raises(ValueError):
        page.withdraw(1, 1)


@pytest.mark.skipif(native.module is None, reason="nothing is compiled here")
@pytest.mark.parametrize("word", [-1, 10**6])
def test_words_beyond_the_page(page, word):
    with pytest.raises(IndexError):
        native.module.begin(page.numbers, word, 1, 1)


COUNT = 200_000  # many times what one process does before the other one has a processor
WORKER = f"""
import sys
from tests.unit.test_progress_page import begin_of
from shmdist.memory.progress_page import ProgressPage
page, begin = ProgressPage(int(sys.argv[1])), begin_of(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
begun = [number for number in range(1, {COUNT} + 1) if begin(page, 1, number)]
print(*begun)
"""


@both
def test_two_processes_at_once(page, how):
    """Just ahead of what begins, something is taken back; again and again."""
    command = [sys.executable, "-c", WORKER, str(page.fd), how]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, pass_fds=(page.fd,), env=env, **pipes) as worker:
        assert worker.stdout.readline() == "ready\n"
        worker.stdin.write("\n")
        worker.stdin.flush()
        taken, last = set(), 0
        while last < COUNT:
            wanted = last + 1 + last % 3
            begun = page.withdraw(1, wanted)
            taken.update(range(max(begun, last) + 1, wanted + 1))
            last = max(wanted, begun)
            while page.begun(1) < min(last, COUNT) and worker.poll() is None:
                pass  # the next is to be taken at the moment at which it begins
        begun = {int(word) for word in worker.communicate(timeout=30)[0].split()}
    assert not begun & taken
    assert max(begun) <= COUNT and taken, "none was taken back: this shows nothing"
