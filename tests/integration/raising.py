"""Raises an error at one call after the other of the reading path, in the thread that reads."""

import sys

from shmdist.runtime.poll_set import PollSet
from shmdist.runtime.reactor import Reactor

#: What the path begins with.
READING = {PollSet._poll.__code__}
SERVING = READING | {
    each.__code__
    for each in (
        Reactor._lead,
        Reactor._serve,
        Reactor._release,
        Reactor._take,
        Reactor._follow,
        Reactor._wait_for_turn,
        Reactor._resign,
    )
}
#: Whose errors are those of the connection, for what has come may be lost with them; and what cannot fail.
_LEFT_OUT = {"recv", "recv_into", "recvmsg_into", "_receive_with_fds", "open", "write"}
_LEFT_OUT |= {"release", "__exit__"}  # of locks
_LEFT_OUT |= {"_let_go_at_collection"}  # Python prints what a callback of the collector raises
_LEFT_OUT |= {"leave"}  # the runtime: there was room for a call when the thread entered

#: What mends, which must not fail as well; and what changes counts, where half a change would stay.
_NOT_INSIDE = {"_failed", "_fail", "_recover", "_wake_all", "control", "adopt"}


class Raiser:
    """Counts the calls on the path that the calling thread makes, and raises at the one that is `due`."""

    def __init__(self, path, due, error):
        self.path, self.due, self.error = path, due, error
        self.count, self.at = 0, None

    def start(self):
        self._last = None
        sys.setprofile(self._profile)

    def stop(self):
        sys.setprofile(None)
        return self.at

    def _profile(self, frame, event, arg):
        if event == "c_call":
            name = arg.__name__
        elif event == "call":
            name = frame.f_code.co_name
            frame = frame.f_back
        else:
            return
        if name in _LEFT_OUT or not self._on_path(frame):
            return
        self.count += 1
        if self.count > self.due:
            sys.setprofile(None)
            self.at = f"{name} in {frame.f_code.co_qualname}"
            raise self.error(f"raised at {self.at}")

    def _on_path(self, frame):
        for _ in range(12):
            if frame is None:
                return False
            if frame.f_code in self.path:
                return True
            if frame.f_code.co_name in _NOT_INSIDE:
                return False
            frame = frame.f_back
        return False
