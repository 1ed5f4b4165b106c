"""Where elements of a run have failed, and which workers get less for it."""

from collections import deque

from shmdist.scheduling.failures import Failures


def test_elsewhere_while_there_is_an_elsewhere():
    failures = Failures()
    assert not failures.avoids(0, 2, [2, 3])
    failures.note(0, 2)
    assert failures.avoids(0, 2, [2, 3]) and not failures.avoids(0, 3, [2, 3])
    assert not failures.avoids(0, 2, [2]) and not failures.avoids(1, 2, [2, 3])
    failures.note(0, 3)
    assert failures.avoids(0, 3, [2, 3]) and not failures.avoids(0, 2, [2, 3])
    assert failures.avoids(0, 2, [2, 3, 4]) and not failures.avoids(0, 4, [2, 3, 4])


def test_take_leaves_what_is_for_others():
    failures = Failures()
    waiting = deque([(0, "a"), (1, "b"), (2, "c")])
    failures.note(0, 2)
    failures.note(1, 2)
    assert failures.take(waiting, 2, [2, 3]) == (2, "c")
    assert failures.take(waiting, 2, [2, 3]) is None
    assert failures.take(waiting, 3, [2, 3]) == (0, "a") and list(waiting) == [(1, "b")]


def test_a_worker_that_fails_all_gets_one_now_and_then():
    failures = Failures()
    failures.finished(2, 3, range(3))
    assert not failures.held_back([2, 3])
    failures.finished(2, 5, range(5))
    assert failures.held_back([2, 3]) == {2} and not failures.held_back([2])
    failures.finished(3, 3)
    assert failures.held_back([2, 3]) == {2}
    failures.finished(3, 1)
    assert not failures.held_back([2, 3])
    failures.sent(2)
    assert failures.held_back([2, 3]) == {2}
    failures.finished(2, 4, {0, 2, 3})
    assert failures.streaks[2][0] == 2 and not failures.held_back([2, 3])
    failures.finished(2, 1)
    assert not failures.streaks


def test_where_all_fail_none_is_held_back():
    failures = Failures()
    for pid in (2, 3):
        failures.finished(pid, 9, range(9))
    assert not failures.held_back([2, 3]) and failures.held_back([2, 3, 4]) == {2, 3}
