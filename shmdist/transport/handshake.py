r"""The handshake, without I/O: each side proves that it knows the cookie before the other unpickles a byte.

Nothing here does I/O, reads a clock or imports pickle.  The caller reads exactly ``machine.wants``
bytes, gives them to ``machine.feed``, sends what that returns, until ``machine.done``.

Messages, all of fixed size, integers big-endian::

    HELLO    connector -> acceptor   128 bytes   fields
    ANSWER   acceptor -> connector   160 bytes   fields, 32 bytes MAC
    PROOF    connector -> acceptor    32 bytes   MAC
    WELCOME  acceptor -> connector   128 bytes   status (0: welcome), reason as NUL-padded text

    fields   8  magic b"SHMDIST\0"        2  protocol number     16  shmdist version, text
            16  Python version, text     32  nonce               8  pid, signed (0: none yet)
            46  reserved, zero

    MAC      HMAC-SHA256(key = cookie, label of the sender's role | HELLO | fields of ANSWER)

Magic, protocol number and the two versions keep place and size in every later protocol, so that
two different ones can still tell each other what they are.

What it stops:

- *Reflection* (our own proof sent back to us): the label in each MAC names the role that made it.
- *Replay*: each MAC covers a fresh nonce of each side.
- *Downgrade, and any change on the way*: each MAC covers all bytes of HELLO and ANSWER's fields.
- *A stranger who sends for ever, or a length made to exhaust memory*: no size comes from the peer.
- *Timing*: MACs are compared with `hmac.compare_digest`.
- *Hosts where MD5 is forbidden*: SHA-256 alone is used, whatever the Python version.

What it does not: the connection is not encrypted, and one who can change its bytes on the way may
relay a genuine handshake and take over after it.  Between hosts, that is the tunnel's work.  Anyone
who can connect gets one MAC to guess cookies against, which is hopeless for a random cookie, not
for a word.
"""

from __future__ import annotations

import enum
import os
import struct
import sys

from shmdist._version import __version__
from shmdist.errors import AuthenticationError, VersionMismatch

__all__ = ["PROTOCOL", "Acceptor", "Connector"]

MAGIC = b"SHMDIST\0"
PROTOCOL = 1
_FIELDS = struct.Struct(">8sH16s16s32sq46x")
_NONCE_BYTES = 32
_MAC_BYTES = 32
_WELCOME = struct.Struct(">B127s")
_REFUSED = 1
_NO_MAC = bytes(_MAC_BYTES)


class Role(enum.Enum):
    """Who a machine is; the value is the label inside its MAC."""

    CONNECTOR = b"shmdist handshake: proof of the connector\0"
    ACCEPTOR = b"shmdist handshake: proof of the acceptor\0"


class State(enum.Enum):
    """Where a machine stands."""

    IDLE = "idle"
    AWAIT_HELLO = "awaiting hello"
    AWAIT_ANSWER = "awaiting answer"
    AWAIT_PROOF = "awaiting proof"
    AWAIT_WELCOME = "awaiting welcome"
    DONE = "done"
    FAILED = "failed"


class Event(enum.Enum):
    """What can happen to a machine."""

    START = "start"
    HELLO = "hello"
    ANSWER = "answer"
    PROOF = "proof"
    WELCOME = "welcome"
    FAULT = "fault"
    FEED = "feed"  # Bytes where none are expected; no state takes it.


# The whole lifecycle; what is not here is illegal.
_MOVES: dict[Role, dict[State, dict[Event, State]]] = {
    Role.CONNECTOR: {
        State.IDLE: {Event.START: State.AWAIT_ANSWER},
        State.AWAIT_ANSWER: {Event.ANSWER: State.AWAIT_WELCOME, Event.FAULT: State.FAILED},
        State.AWAIT_WELCOME: {Event.WELCOME: State.DONE, Event.FAULT: State.FAILED},
        State.DONE: {},
        State.FAILED: {},
    },
    Role.ACCEPTOR: {
        State.AWAIT_HELLO: {Event.HELLO: State.AWAIT_PROOF, Event.FAULT: State.FAILED},
        State.AWAIT_PROOF: {Event.PROOF: State.DONE, Event.FAULT: State.FAILED},
        State.DONE: {},
        State.FAILED: {},
    },
}

# The message each state waits for, and its size in bytes.
_EXPECTED: dict[State, tuple[Event, int]] = {
    State.AWAIT_HELLO: (Event.HELLO, _FIELDS.size),
    State.AWAIT_ANSWER: (Event.ANSWER, _FIELDS.size + _MAC_BYTES),
    State.AWAIT_PROOF: (Event.PROOF, _MAC_BYTES),
    State.AWAIT_WELCOME: (Event.WELCOME, _WELCOME.size),
}


class _Machine:
    """What both roles share.  Not safe for use by two threads at once: one thread owns it."""

    _role: Role
    _first: State

    def __init__(self, cookie: bytes | str, pid: int) -> None:
        self._cookie = cookie.encode() if isinstance(cookie, str) else bytes(cookie)
        if not self._cookie:
            raise ValueError("the cookie is empty: that would let anyone in")
        self._state = self._first
        self._mine = _FIELDS.pack(
            MAGIC, PROTOCOL, __version__.encode(), _python_version().encode(), os.urandom(_NONCE_BYTES), pid
        )
        self._theirs = b""
        # Empty until the peer has proved itself: a claim of a stranger must not be taken for a fact.
        self.peer_pid = 0
        self.peer_python = ""
        self.peer_version = ""

    def __repr__(self) -> str:  # Never shows the cookie.
        return f"<{type(self).__name__} {self._state.value}, peer pid {self.peer_pid}>"

    @property
    def wants(self) -> int:
        """Number of bytes to read next; 0 where none are expected."""
        return _EXPECTED[self._state][1] if self._state in _EXPECTED else 0

    @property
    def done(self) -> bool:
        """Whether each side has proved itself to the other."""
        return self._state is State.DONE

    def feed(self, data: bytes) -> bytes:
        """Take the bytes asked for by `wants`.

        Parameters
        ----------
        data : bytes
            Exactly that many; fewer means that the connection ended.

        Returns
        -------
        bytes
            What to send to the peer; may be empty.

        Raises
        ------
        AuthenticationError, VersionMismatch
            The peer is refused, or refuses.  Send the exception's ``reply`` and close.
        RuntimeError
            No bytes are expected in this state.
        """
        if self._state not in _EXPECTED:
            raise self._illegal(Event.FEED)
        event, nbytes = _EXPECTED[self._state]
        try:
            if len(data) != nbytes:
                raise AuthenticationError(
                    f"the handshake broke off: {len(data)} of the {nbytes} bytes of {event.name} came"
                )
            reply = self._take(event, bytes(data))
        except BaseException:  # Whatever it was: a machine that failed once lets nobody in.
            self._move(Event.FAULT)
            raise
        self._move(event)
        return reply

    def _take(self, event: Event, data: bytes) -> bytes:
        raise NotImplementedError  # each side has its own

    def _move(self, event: Event) -> None:
        try:
            self._state = _MOVES[self._role][self._state][event]
        except KeyError:
            raise self._illegal(event) from None

    def _illegal(self, event: Event) -> RuntimeError:
        return RuntimeError(
            f"handshake of the {self._role.name.lower()}: {event.value!r} is illegal when {self._state.value}"
        )

    def _check_fields(self, fields: bytes, reply: bytes) -> None:
        magic, protocol, version, python, _nonce, _pid = _FIELDS.unpack(fields)
        if magic != MAGIC:
            raise AuthenticationError("what is at the other end of the connection is no shmdist process")
        if protocol != PROTOCOL:
            raise VersionMismatch(
                f"shmdist {__version__} (protocol {PROTOCOL}, Python {_python_version()}) here, "
                f"shmdist {_text(version)} (protocol {protocol}, Python {_text(python)}) at the other end; "
                "install the same version of shmdist on both",
                reply=reply,
            )

    def _mac(self, role: Role) -> bytes:
        import hmac  # Loads OpenSSL; a process that never connects does without.

        hello, answer = (
            (self._mine, self._theirs) if self._role is Role.CONNECTOR else (self._theirs, self._mine)
        )
        return hmac.digest(self._cookie, role.value + hello + answer, "sha256")

    def _proves(self, role: Role, mac: bytes) -> bool:
        import hmac

        return hmac.compare_digest(self._mac(role), mac)

    def _know_peer(self) -> None:
        _magic, _protocol, version, python, _nonce, pid = _FIELDS.unpack(self._theirs)
        self.peer_pid = int(pid)
        self.peer_python = _text(python)
        self.peer_version = _text(version)


class Connector(_Machine):
    """The side that connects, and speaks first.

    Parameters
    ----------
    cookie : bytes or str
        The cluster's secret; must not be empty.
    pid : int
        This process's id in the cluster; 0 where it has none yet.

    Attributes
    ----------
    peer_pid, peer_python, peer_version
        Of the acceptor; 0 and empty until it has proved itself.

    Examples
    --------
    >>> connector, acceptor = Connector("secret", pid=2), Acceptor("secret", pid=1)
    >>> answer = acceptor.feed(connector.start())
    >>> welcome = acceptor.feed(connector.feed(answer))
    >>> connector.feed(welcome)
    b''
    >>> connector.done, connector.peer_pid, acceptor.done, acceptor.peer_pid
    (True, 1, True, 2)
    """

    _role = Role.CONNECTOR
    _first = State.IDLE

    def start(self) -> bytes:
        """Return HELLO, the first bytes to send; once only."""
        self._move(Event.START)
        return self._mine

    def _take(self, event: Event, data: bytes) -> bytes:
        if event is Event.ANSWER:
            self._theirs, mac = data[: _FIELDS.size], data[_FIELDS.size :]
            self._check_fields(self._theirs, reply=b"")
            if not self._proves(Role.ACCEPTOR, mac):
                raise AuthenticationError("cookie refused: the process we connected to has a different one")
            self._know_peer()
            return self._mac(Role.CONNECTOR)
        status, reason = _WELCOME.unpack(data)
        # The text is bound to a refusal, so that no byte of a welcome is left for anyone to choose.
        if status or reason.strip(b"\0"):
            why = _text(reason) or "no reason given"
            raise AuthenticationError(f"refused by process {self.peer_pid}: {why}")
        return b""


class Acceptor(_Machine):
    """The side that is connected to; takes no byte from a stranger beyond `wants`.

    Parameters
    ----------
    cookie : bytes or str
        The cluster's secret; must not be empty.
    pid : int
        This process's id in the cluster; 0 where it has none yet.

    Attributes
    ----------
    peer_pid, peer_python, peer_version
        Of the connector; 0 and empty until it has proved itself.

    Examples
    --------
    >>> acceptor = Acceptor("secret", pid=1)
    >>> acceptor.wants
    128
    >>> acceptor.feed(b"GET / HTTP/1.1".ljust(128))
    Traceback (most recent call last):
    shmdist.AuthenticationError: what is at the other end of the connection is no shmdist process
    """

    _role = Role.ACCEPTOR
    _first = State.AWAIT_HELLO

    def _take(self, event: Event, data: bytes) -> bytes:
        if event is Event.HELLO:
            self._theirs = data
            # The other side sees from our fields that we differ, and gets no MAC to work on.
            self._check_fields(data, reply=self._mine + _NO_MAC)
            return self._mine + self._mac(Role.ACCEPTOR)
        if not self._proves(Role.CONNECTOR, data):
            raise AuthenticationError(
                "cookie refused: a process that connected to us has a different one",
                reply=_WELCOME.pack(_REFUSED, b"cookie refused"),
            )
        self._know_peer()
        return _WELCOME.pack(0, b"")


def _python_version() -> str:
    return sys.version.split()[0]


def _text(padded: bytes) -> str:
    """Text of a stranger, fit for a message on a terminal."""
    return "".join(c if c.isprintable() else "?" for c in padded.rstrip(b"\0").decode("ascii", "replace"))
