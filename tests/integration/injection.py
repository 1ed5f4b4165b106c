"""Raises an error, or brings an interrupt, at one call after the other inside parts of the runtime.

A *site* is a call in the source, told by who calls the function that makes it, and by the kind of thread.
So each is tried once for an operation, however often it is passed, and whichever threads share the work.
"""

import os
import signal
import sys
import threading
from pathlib import Path

import shmdist
from shmdist.runtime.interrupts import current
from shmdist.runtime.threads import ThreadPool
from shmdist.transport.poller import Poller

PACKAGE = Path(shmdist.__file__).parent

AREAS = {
    "reading": (
        "transport/frame_reader.py transport/frame_assembler.py transport/ring_slots.py transport/ring.py"
        " transport/poller.py runtime/poll_set.py runtime/reactor.py runtime/router.py runtime/ring_exchange.py"
        " runtime/replies.py runtime/serial_queues.py runtime/executor.py runtime/node.py runtime/threads.py"
    ),
    "sending": (
        "transport/link.py serialization/codec.py transport/messages.py serialization/arrays.py"
        " runtime/requests.py runtime/segment_exchange.py runtime/block_buffers.py runtime/host_copies.py"
    ),
    "memory": (
        "memory/arena.py memory/leases.py refcount/receipts.py memory/private_mappings.py"
        " memory/segment.py memory/mapping.py runtime/sharing.py runtime/host_copy_receiver.py runtime/maintenance.py"
    ),
    "pools": (
        "scheduling/pool_state.py pools.py references/channel.py references/server.py runtime/waiting.py"
        " runtime/call_target.py calls.py runtime/own_calls.py"
    ),
    "counts": "refcount/table.py runtime/counts.py runtime/count_audit.py references/base.py",
}
FILES = {str(PACKAGE / name): area for area, names in AREAS.items() for name in names.split()}
assert all(map(os.path.exists, FILES)), FILES

#: Releasing a lock cannot fail; nor can the call of `leave`, for which there is room on the stack where calls
#: have just returned. What fails in receiving may have lost what came, and ends the connection. For
#: what does something a second time there is room.
LEFT_OUT = {"release", "leave", "__exit__", "recv_into", "recvmsg_into", "_receive_with_fds", "firmly"}
#: An OSError in here says something of a connection, or of what lies in a mailbox.
SAYS = {"send", "sendmsg", "_send_first", "_send_more", "write", "open"}


class Injector:
    """Records the sites that are passed, or acts at one of them."""

    def __init__(self):
        self.sites = {}
        self.target = self.act = None
        self.hit = False
        self.thread = 0
        self._known = {}

    def begin(self, act, target=None):
        """Watch this thread and the runtime's own from now on: record, or let `act` act once, at the `target`."""
        self.act, self.target, self.hit = act, target, False
        self.sites = {}
        self.thread = threading.get_ident()
        _install(self)
        sys.setprofile(self._profile)

    def end(self):
        """Watch no more; returns whether it has acted."""
        sys.setprofile(None)
        _install(None)
        return self.hit

    def watch(self):
        """Watch the calling thread as well."""
        sys.setprofile(self._profile)

    def _profile(self, frame, event, arg):
        if event == "call":
            name, caller = frame.f_code.co_name, frame.f_back
        elif event == "c_call" or (event == "c_return" and self.act.at_returns):
            name, caller = arg.__name__, frame
        else:
            return
        if caller is None or not self.act.concerns(caller.f_code.co_filename, name):
            return
        if _injector is not self or self.hit:
            sys.setprofile(None)
            return
        outer = caller.f_back
        mine = threading.get_ident() == self.thread
        key = caller.f_code, caller.f_lasti, name, outer and outer.f_code, mine, event == "c_return"
        site = self._known.get(key)
        if site is None:
            site = self._known[key] = self._name(caller, name, outer, mine, event == "c_return")
        if self.target is None:
            self.sites[site] = self.sites.get(site, 0) + 1
        elif site == self.target and self.act.can(mine):
            self.hit = True
            sys.setprofile(None)
            self.act(site)

    @staticmethod
    def _name(caller, name, outer, mine, over):
        code = caller.f_code
        via = outer.f_code.co_qualname if outer is not None else ""
        path = Path(code.co_filename).relative_to(PACKAGE)
        thread = "" if mine else " on another thread"
        when = "after " if over else ""
        return f"{when}{name} in {code.co_qualname} ({path}:{caller.f_lineno}.{caller.f_lasti}) from {via}{thread}"


_injector = None
_guarded, _park = ThreadPool.guarded, Poller.park


def _install(injector):
    global _injector
    _injector = injector

    def guarded(self, job):
        if _injector is not None:
            _injector.watch()
        _guarded(self, job)

    def park(self, timeout=-1):
        try:
            return _park(self, timeout)
        finally:
            if _injector is not None:
                _injector.watch()

    if injector is None:
        ThreadPool.guarded, Poller.park = _guarded, _park
    else:
        ThreadPool.guarded, Poller.park = guarded, park


class Raise:
    """Raises an error where the five areas make a call."""

    at_returns = False

    def __init__(self, error):
        self.error = error

    def __repr__(self):
        return self.error.__name__

    def concerns(self, file, name):
        """Tell whether a call of `name` by code of a file is to fail."""
        return file in FILES and name not in LEFT_OUT and not (self.error is OSError and name in SAYS)

    def can(self, mine):
        """Tell whether it can act on the calling thread."""
        return True

    def __call__(self, site):
        raise self.error(f"raised at {site}")

    def told(self, caught):
        """Tell whether the outcome of an operation is this error."""
        return isinstance(caught, self.error) or (
            isinstance(caught, (shmdist.RemoteException, shmdist.SerializationError))
            and ("raised at" in str(caught) or "no memory" in str(caught))
        )


class Interrupt:
    """Brings an interrupt where the package makes a call, or C code of one returns, as the system would.

    On process 1 that is Ctrl-C, which comes to the main thread; on a worker what ``interrupt`` does to the
    call that the thread runs, and to no other one.
    """

    at_returns = True

    def __repr__(self):
        return "interrupt"

    def concerns(self, file, name):
        """Tell whether it may come at a call of `name` by code of a file."""
        return file.startswith(str(PACKAGE))

    def can(self, mine):
        """Tell whether an interrupt can come to the calling thread."""
        thread_state = current()
        return thread_state.main or (thread_state.task is not None and not thread_state.task.interrupted)

    def __call__(self, site):
        thread_state = current()
        if thread_state.main:
            signal.raise_signal(signal.SIGINT)
        else:
            thread_state.task.interrupted = True
            thread_state.interrupt_call(thread_state.task)

    def told(self, caught):
        """Tell whether the outcome of an operation is the interrupt."""
        return isinstance(caught, KeyboardInterrupt) or (
            isinstance(caught, shmdist.RemoteException) and "KeyboardInterrupt" in str(caught)
        )
