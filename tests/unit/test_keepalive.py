"""Signs of life: the setting, what the kernel counts, and how silence is measured."""

import contextlib
import socket
import time

import pytest

from shmdist.transport import keepalive
from shmdist.transport.keepalive import SilenceTimer
from tests.integration.helpers import until


@pytest.mark.parametrize(
    ("text", "seconds"), [("", 20.0), ("5", 5.0), ("2.5", 2.5), ("0.1", 2.0), ("0", 0.0), (" 7 ", 7.0)]
)
def test_the_setting(monkeypatch, text, seconds):
    monkeypatch.setenv("SHMDIST_HEARTBEAT_TIMEOUT", text)
    assert keepalive.timeout() == seconds


@pytest.mark.parametrize("text", ["x", "-1", "nan", "inf", "20s"])
def test_a_setting_that_makes_no_sense(monkeypatch, text):
    monkeypatch.setenv("SHMDIST_HEARTBEAT_TIMEOUT", text)
    with pytest.raises(ValueError, match="SHMDIST_HEARTBEAT_TIMEOUT must be a number of seconds"):
        keepalive.timeout()


@pytest.fixture
def pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_bytes_and_segments_are_counted(pair):
    ours, theirs = pair
    segments, nbytes = keepalive.counts(ours)
    assert nbytes == 0
    theirs.sendall(b"12345")
    until(lambda: keepalive.counts(ours)[1] == 5)
    assert keepalive.counts(ours)[0] > segments


def test_an_idle_connection_has_signs_of_life(pair):
    ours, theirs = pair
    before = keepalive.counts(ours)
    keepalive.keep_alive(theirs, 2.0)
    until(lambda: keepalive.counts(ours)[0] > before[0], 3, "the kernel asks")
    assert keepalive.counts(ours)[1] == 0, "and that is no byte of data"


def test_so_has_one_whose_reader_does_not_read(pair):
    ours, theirs = pair
    keepalive.keep_alive(theirs, 2.0)
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            ours.send(bytes(1 << 16))
    time.sleep(0.3)  # the last answers to what was sent
    for _ in range(2):
        before = keepalive.counts(ours)[0]
        until(lambda before=before: keepalive.counts(ours)[0] > before, 3, "their kernel asks")


def test_so_has_one_where_both_do_not_read(pair):
    """No keep-alive is sent where data waits; and what is asked instead is asked often enough."""
    for sock in pair:
        keepalive.keep_alive(sock, 6.0)
        with contextlib.suppress(OSError):
            sock.getsockopt(socket.IPPROTO_TCP, 44)
            continue
        pytest.skip("Linux before 6.15: nothing limits the pauses")
    for sock in pair:
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                sock.send(bytes(1 << 16))
    for _ in range(8):  # by then the pauses would be longer
        before = keepalive.counts(pair[0])[0]
        until(lambda before=before: keepalive.counts(pair[0])[0] > before, 1.5, "a kernel asks")


@pytest.mark.parametrize("seconds", [2.0, 3.0, 20.0, 3600.0, 100_000.0])
def test_the_kernel_is_a_little_later(pair, seconds):
    keepalive.keep_alive(pair[0], seconds)
    names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    idle, pause, count = (pair[0].getsockopt(socket.IPPROTO_TCP, name) for name in names)
    assert idle <= max(1, seconds / 3)
    assert seconds <= idle + pause * count <= 1.5 * seconds
    assert pair[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_no_limit_asks_nothing(pair):
    keepalive.keep_alive(pair[0], 0.0)
    assert not pair[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_nothing_is_told_of_others(pair):
    ours, theirs = socket.socketpair()
    assert keepalive.counts(ours) is None
    keepalive.keep_alive(ours, 2.0)
    ours.close()
    theirs.close()
    pair[0].close()
    assert keepalive.counts(pair[0]) is None


class TestSilence:
    def test_any_change_ends_it(self):
        silence = SilenceTimer(1.0, 3.0)
        assert not any(silence.look(float(now), now // 3) for now in range(100))

    def test_it_adds_up(self):
        silence = SilenceTimer(1.0, 3.0)
        assert [silence.look(float(now), 5) for now in range(5)] == [False, False, False, True, True]

    def test_short_looks_count_for_what_they_are(self):
        silence = SilenceTimer(1.0, 3.0)
        assert not any(silence.look(now / 10, 5) for now in range(30))
        assert silence.look(3.01, 5)

    def test_one_who_was_held_up_has_not_listened(self):
        silence = SilenceTimer(1.0, 3.0)
        silence.look(0.0, 5)
        assert not silence.look(1000.0, 5)
        assert not silence.look(1000.1, 5)
        assert silence.seconds == pytest.approx(1.1)
