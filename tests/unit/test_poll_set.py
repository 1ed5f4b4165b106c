"""What is read: a descriptor that is let go may be another one's before the reader has taken its next step."""

import contextlib
from types import SimpleNamespace

import pytest

from shmdist.runtime.poll_set import PollSet


class Reading(SimpleNamespace):
    """A poll set that reads nothing: its tables, and a poller that knows what it watches."""

    def __init__(self, soon):
        self.polled = {5}
        poller = SimpleNamespace(remove=self.polled.discard, add=self.polled.add, is_kick=lambda fd: False)
        super().__init__(_links={}, _watched={}, _ended=[], poller=poller, soon=soon)
        self.rings = SimpleNamespace(forget=lambda link: None)
        self._events = SimpleNamespace(ended=lambda link: None)


def test_a_watched_descriptor_is_closed_and_used_again_by_its_action():
    """As when a process has ended, and another one starts before the thread that reads goes on."""
    done = []

    def start_another():
        reading._watched[5] = lambda: done.append("second")
        reading.polled.add(5)

    reading = Reading(lambda job: job())
    reading._watched[5] = start_another
    PollSet._read(reading, [(5, 1)], [])
    assert reading.polled == {5} and not done
    PollSet._read(reading, [(5, 1)], [])
    assert done == ["second"] and not reading._watched and not reading.polled


def test_a_link_is_closed_and_its_descriptor_used_again():
    new, old = (SimpleNamespace(fd=5, shut=lambda: None) for _ in range(2))

    def close(link):
        reading._links[5] = new
        reading.polled.add(5)

    reading = Reading(lambda job: job())
    reading._events.ended = close
    reading._links[5] = old
    reading._ended.append(old)
    PollSet._end_links(reading)
    assert reading._links == {5: new} and reading.polled == {5} and not reading._ended


@pytest.mark.parametrize("what", ["process", "link"])
def test_no_thread_can_be_had_for_the_end(what):
    """Nothing is forgotten: a later turn tries again."""
    done, means = [], []

    def soon(job):
        if not means:
            raise MemoryError
        job()

    reading = Reading(soon)
    reading._events.ended = done.append
    link = SimpleNamespace(fd=5, shut=lambda: None)
    if what == "process":
        reading._watched[5] = lambda: done.append(link)
    else:
        reading._links[5] = link
        reading._ended.append(link)
    for _ in range(3):
        with contextlib.suppress(MemoryError):
            PollSet._read(reading, [(5, 1)], []) if what == "process" else PollSet._end_links(reading)
        assert bool(done) == bool(means)
        if not means:
            assert what == "link" or reading.polled == {5}
        means.append(1)
    assert done == [link] and not reading._links and not reading._watched
