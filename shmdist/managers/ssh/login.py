"""One SSH login, and what runs over it.

A login has one transport, and further ones when the server refuses a channel (``MaxSessions``).
Hosts behind others are reached by a channel of the login before them, so several machines
behind one host share the login there.  A server that closes the connection before it says who
it is has too many logins under way (``MaxStartups``): it is tried again, later and later.

Only this file and ``sshconfig`` know paramiko.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from shmdist.managers.ssh import host_key_check, host_keys
from shmdist.managers.ssh.config import Hop
from shmdist.managers.ssh.host_key_check import PhaseError
from shmdist.transport import keepalive

if TYPE_CHECKING:
    import paramiko

KEEPALIVE_SECONDS = 15  # between signs of life, while nothing else is sent
_FIRST_RETRY_SECONDS = 0.1  # before the first new attempt; doubled each time
_MAX_RETRY_SECONDS = 4.0
_PROHIBITED = 1  # of RFC 4254: why a channel is not opened
_CANNOT_RUN = (126, 127)  # exit codes of a shell that cannot run a command
_BUSY = (b"Exceeded MaxStartups", b"Not allowed at this time")


class _Busy(Exception):
    """The server does not take connections now; it may in a moment."""


class Credentials:
    """What proves who the user is; the same on every host of the way."""

    def __init__(
        self, key_files: tuple[str, ...], passphrase: str | None, password: str | None, agent: bool
    ) -> None:
        self.key_files = key_files
        self.passphrase = passphrase
        self.password = password
        self.agent = agent

    def __repr__(self) -> str:  # never shows a secret
        return f"<Credentials of {len(self.key_files)} key files, agent={self.agent}>"


class Agent:
    """The ssh agent: one connection to it, used by one login at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while the agent signs: its connection has no lock of its own
        self._agent: paramiko.Agent | None = None

    def identities(self) -> list[Any]:
        """Return the agent's keys; `lock` is held."""
        if "SSH_AUTH_SOCK" not in os.environ:
            return []
        import paramiko

        try:
            if self._agent is None:
                self._agent = paramiko.Agent()
            return list(self._agent.get_keys())
        except (paramiko.SSHException, OSError):
            return []

    def close(self) -> None:
        """Close the connection."""
        with self.lock:
            if self._agent is not None:
                self._agent.close()
            self._agent = None


class Login:
    """A login at one host.

    Parameters
    ----------
    hop : Hop
        Where, and as whom.
    via : Login or None
        The host before it on the way.
    credentials, agent
        What proves who the user is.
    slots : threading.Semaphore
        One is held while the login is made.
    timeout : float
        Seconds for each step, and for all attempts together four times that.
    """

    def __init__(
        self,
        hop: Hop,
        via: Login | None,
        credentials: Credentials,
        agent: Agent,
        slots: threading.Semaphore,
        timeout: float,
    ) -> None:
        self.hop = hop
        self.via = via
        self._credentials = credentials
        self._agent = agent
        self._slots = slots
        self.timeout = timeout
        self._making = threading.RLock()  # guards `transports`; held while a login is made
        self.transports: list[paramiko.Transport] = []
        self._full: set[int] = set()  # by index: transports that refused a channel
        self._proxies: list[subprocess.Popen[bytes]] = []
        self._ending = threading.Lock()  # guards `_under_way`, and that nothing is begun when `closed` is set
        self._under_way: Any = None  # what a login that is being made goes through: a socket, or a channel
        self._given_up = threading.Event()
        self.closed = False
        self.direct = True  # whether the host's own addresses are worth a try

    def __repr__(self) -> str:
        return f"<Login {self.hop}, {len(self.transports)} transports{', closed' if self.closed else ''}>"

    # ------------------------------------------------------------------ what runs over it

    def session(self) -> paramiko.Channel:
        """Return a new channel for a command, on a further transport if need be."""
        import paramiko

        with self._making:
            fresh = not self.transports
            while True:
                index = next((i for i in range(len(self.transports)) if i not in self._full), None)
                if index is None:
                    self._log_in()
                    index, fresh = len(self.transports) - 1, True
                transport = self.transports[index]
                try:
                    return transport.open_session(timeout=self.timeout)
                except paramiko.ChannelException as error:
                    self._full.add(index)
                    if fresh and self._unused(transport):
                        raise PhaseError(
                            "launch", f"the server refuses to open a session: {error}"
                        ) from error
                except (paramiko.SSHException, EOFError, OSError) as error:
                    if fresh:
                        raise PhaseError("launch", f"no session could be opened: {error}") from error
                    self._full.add(index)  # it broke; another may do

    @staticmethod
    def _unused(transport: paramiko.Transport) -> bool:
        return len(transport._channels) == 0  # type: ignore[attr-defined]  # not in the stubs

    def dial(self, host: str, port: int, **options: Any) -> paramiko.Channel:
        """Return a channel that is a connection from this host to another place."""
        import paramiko

        with self._making:
            if not self.transports:
                self._log_in()
            transport = self.transports[-1]
        try:
            return transport.open_channel(
                "direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=self.timeout, **options
            )
        except (paramiko.SSHException, EOFError) as error:
            why = str(error)
            if getattr(error, "code", None) == _PROHIBITED:
                why = "its server forbids it (AllowTcpForwarding and PermitOpen in its sshd_config)"
            text = f"{self.hop} cannot connect on to {host} port {port}: {why}"
            raise PhaseError("connect", text) from error

    def run(self, command: str, timeout: float = 10.0) -> int:
        """Run a command to its end; return its exit code, -1 when there is none."""
        with contextlib.closing(self.session()) as channel:
            channel.exec_command(command)
            channel.status_event.wait(timeout)
            return channel.exit_status if channel.exit_status_ready() else -1

    def close(self) -> None:
        """End all transports, what runs over them, and a login that is being made."""
        with self._ending:
            self.closed = True
            under_way = self._under_way
        self._given_up.set()
        if isinstance(under_way, socket.socket):
            with contextlib.suppress(OSError):
                under_way.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits; closing does not
        elif under_way is not None:
            under_way.close()
        for transport in self.transports:
            transport.close()
        for process in self._proxies:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2.0)

    def abandon(self) -> None:
        """Give the connections back without a word; in a forked child."""
        self.closed = True
        for transport in self.transports:
            transport.active = False  # type: ignore[attr-defined]  # not in the stubs
            for channel in list(transport._channels.values()):  # type: ignore[attr-defined]  # nor this
                channel.lock = threading.Lock()  # a thread of the parent may have held it
                channel.closed = True
            with contextlib.suppress(OSError, AttributeError):
                transport.sock.close()

    # ------------------------------------------------------------------ logging in

    def _log_in(self) -> None:
        """Make one more transport; try again while the server says that it is busy."""
        if self.via is not None:
            self.via.ensure()  # takes a slot of its own, so before this one is taken
        with self._slots:
            deadline = time.monotonic() + 4 * self.timeout
            wait = _FIRST_RETRY_SECONDS
            while True:
                try:
                    self._begin(None)
                    self._attempt()
                    return
                except _Busy as error:
                    if time.monotonic() + wait > deadline:
                        raise PhaseError(
                            "connect",
                            f"{self.hop} closes the connection before it says who it is, again and again "
                            f"({error}); its limit may be MaxStartups, or a firewall's",
                        ) from error
                finally:
                    self._under_way = None
                self._given_up.wait(wait * random.uniform(0.5, 1.0))
                wait = min(2 * wait, _MAX_RETRY_SECONDS)

    def _begin(self, what: Any) -> None:
        """Note what a new login goes through, which ends with this one; raises when that is closed."""
        with self._ending:
            self._under_way = what
            if self.closed:
                raise PhaseError("connect", "the launch was given up")

    def ensure(self) -> None:
        """Log in, unless that is done."""
        with self._making:
            if not self.transports:
                self._log_in()

    def _attempt(self) -> None:
        """Connect, check the host's key, and prove who the user is."""
        import paramiko

        sock = self._connect()
        try:
            self._begin(sock)
            transport = paramiko.Transport(sock)
        except Exception as error:
            sock.close()
            raise (
                error if isinstance(error, PhaseError) else PhaseError("connect", f"{self.hop}: {error}")
            ) from error
        try:
            transport.set_log_channel("shmdist.ssh.paramiko")
            transport.daemon = True
            self._greet(transport)
            self._authenticate(transport)
            transport.set_keepalive(KEEPALIVE_SECONDS)
            with self._ending:
                if self.closed:
                    raise PhaseError("connect", "the launch was given up")
                self.transports.append(transport)
        except BaseException:
            transport.packetizer.complete_handshake()  # its clock would run on, in a thread
            transport.close()
            raise

    def _connect(self) -> Any:
        """Return a connected socket, or what is like one."""
        hop = self.hop
        if self.via is not None:
            return self.via.dial(hop.host, hop.port)
        if hop.proxy_command is not None:
            sock = self._proxy(hop.proxy_command)
        else:
            sock = self._dial_out(hop)
        try:
            self._begin(sock)
            _hear(sock, self.timeout, str(hop))
            sock.settimeout(None)
        except BaseException as error:
            sock.close()
            if hop.proxy_command is not None and isinstance(error, _Busy):
                self._check_proxy(hop.proxy_command)
            raise
        return sock

    def _check_proxy(self, command: str) -> None:
        """Raise when a ProxyCommand, which has closed the connection, has failed by itself."""
        try:
            code = self._proxies[-1].wait(2.0)
        except subprocess.TimeoutExpired:
            return
        if not code:
            return
        why = f"it ended with code {code} before the server said anything"
        words = command.split()
        program = words[1] if words[:1] == ["exec"] and words[1:] else words[0] if words else ""
        if code in _CANNOT_RUN and shutil.which(program) is None:
            why = f"there is no program {program!r} here"
        raise PhaseError("connect", f"{self.hop} is not reached by its ProxyCommand {command!r}: {why}")

    def _dial_out(self, hop: Hop) -> socket.socket:
        try:
            places = socket.getaddrinfo(hop.host, hop.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise PhaseError("resolve", f"the name {hop.host!r} has no address: {error}") from error
        errors = []
        for family, kind, protocol, _, address in places:
            sock = socket.socket(family, kind, protocol)
            sock.settimeout(self.timeout)
            try:
                self._begin(sock)
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                keepalive.keep_alive(sock, keepalive.timeout())  # what waits to be sent is tried often enough
                return sock
            except OSError as error:
                sock.close()
                if isinstance(error, ConnectionResetError):
                    raise _Busy(str(error)) from error
                errors.append(f"{address}: {error}")
            except BaseException:
                sock.close()
                raise
        raise PhaseError("connect", f"no connection to {hop}: {'; '.join(errors)}")

    def _proxy(self, command: str) -> socket.socket:
        """Start a ProxyCommand; its standard input and output are the other end of the socket."""
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(
            ["/bin/sh", "-c", f"exec {command}"],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            start_new_session=True,
        )
        theirs.close()
        self._proxies.append(process)
        return ours

    def _greet(self, transport: paramiko.Transport) -> None:
        """Agree on keys with the server, and check that its own is known."""
        import paramiko

        hop = self.hop
        known = list(host_key_check.known_hosts(hop))
        options = transport.get_security_options()
        wanted = host_keys.kinds_known(known, hop.key_names)
        kinds = [kind for kind in options.key_types if _plain(kind) in wanted]
        options.key_types = [*kinds, *(kind for kind in options.key_types if kind not in kinds)]
        # The ones that check and encrypt in one step are about twice as fast.
        fast = [name for name in options.ciphers if "gcm" in name]
        options.ciphers = [*fast, *(name for name in options.ciphers if name not in fast)]
        transport.banner_timeout = transport.handshake_timeout = self.timeout
        try:
            transport.start_client(timeout=self.timeout)
        except (EOFError, ConnectionError) as error:
            raise _Busy(str(error) or "end of file") from error
        except paramiko.SSHException as error:
            if isinstance(error.__cause__ or error.__context__, (EOFError, ConnectionError)):
                raise _Busy(str(error)) from error
            raise PhaseError("connect", f"{hop} does not talk SSH with us: {error}") from error
        try:
            key = transport.get_remote_server_key()
        except paramiko.SSHException as error:  # the time was up before they had agreed
            text = f"{hop} said that it talks SSH, and no more within {self.timeout:g} s"
            raise PhaseError("connect", text) from error
        host_key_check.check_key(hop, known, key.get_name(), key.asbytes())

    def _authenticate(self, transport: paramiko.Transport) -> None:
        """Try one way after the other to prove who the user is."""
        import paramiko

        transport.auth_timeout = self.timeout
        user = self.hop.user
        tried: list[str] = []
        try:
            try:
                transport.auth_none(user)
                return
            except paramiko.BadAuthenticationType as error:
                allowed = list(error.allowed_types)
            with contextlib.closing(self._ways(transport, tried)) as ways:
                for method, name, attempt in ways:
                    if method == "password" and "keyboard-interactive" in allowed:
                        method = "keyboard-interactive"  # the same question, asked otherwise
                    if method not in allowed:
                        continue
                    tried.append(name)
                    try:
                        left = attempt()
                    except paramiko.AuthenticationException as error:
                        if not transport.is_active():
                            raise PhaseError("authenticate", self._refusal(tried, allowed)) from error
                        continue
                    if not left:
                        return
                    tried[-1] += " (accepted, and more is asked for)"
                    allowed = list(left)
        except (paramiko.SSHException, EOFError, OSError) as error:
            text = self._refusal(tried, []) + f"; then: {str(error) or type(error).__name__}"
            raise PhaseError("authenticate", text) from error
        raise PhaseError("authenticate", self._refusal(tried, allowed))

    def _refusal(self, tried: list[str], allowed: list[str]) -> str:
        text = f"{self.hop} does not let us in; tried: {', '.join(tried) or 'nothing, for there is no key'}"
        return text + (f"; it would take: {', '.join(allowed)}" if allowed else "")

    def _ways(
        self, transport: paramiko.Transport, tried: list[str]
    ) -> Generator[tuple[str, str, Callable[[], list[str]]], None, None]:
        """Yield the ways to prove who the user is: the method, a name for it, and what does it."""
        user, credentials = self.hop.user, self._credentials
        given = [os.path.expanduser(file) for file in credentials.key_files]
        for path in dict.fromkeys([*given, *self.hop.key_files]):
            if path not in given and not os.path.exists(path):
                continue
            try:
                key = _load_key(path, credentials.passphrase)
            except Exception as error:  # of many kinds, and some are cryptography's
                locked = credentials.passphrase is None and "password" in str(error)
                why = "it needs a passphrase" if locked else str(error)
                tried.append(f"key {path} (not used: {why})")
                continue
            yield "publickey", f"key {path}", functools.partial(transport.auth_publickey, user, key)
        if credentials.agent and self.hop.agent:
            with self._agent.lock:
                for key in self._agent.identities():
                    name = f"the agent's key {getattr(key, 'comment', '') or key.get_name()}"
                    yield "publickey", name, functools.partial(transport.auth_publickey, user, key)
        if credentials.password is not None:
            password = credentials.password
            yield "password", "the password", lambda: transport.auth_password(user, password)


def _load_key(path: str, passphrase: str | None) -> Any:
    """Load a private key; a passphrase is for those that need one."""
    import paramiko

    load: Callable[..., Any] = paramiko.PKey.from_path
    try:
        return load(path)
    except Exception:
        if passphrase is None:
            raise
        return load(path, passphrase.encode())


def _plain(kind: str) -> str:
    """Return the kind of key that an algorithm of signatures is for."""
    return "ssh-rsa" if kind.startswith("rsa-sha2-") else kind


def _hear(sock: socket.socket, timeout: float, who: str) -> None:
    """Wait for the server's first words, which are left to be read; raises when they are no SSH."""
    deadline = time.monotonic() + timeout
    data = b""
    while not data.startswith(b"SSH-") and b"\nSSH-" not in data:
        left = deadline - time.monotonic()
        if left <= 0:
            said = f"says {data[:80]!r}, which is no SSH" if data else "says nothing"
            raise PhaseError("connect", f"{who} took the connection, and {said} within {timeout:g} s")
        sock.settimeout(left)
        try:
            heard = sock.recv(4096, socket.MSG_PEEK)
        except TimeoutError:
            continue
        except ConnectionError as error:
            raise _Busy(str(error)) from error
        if not heard:
            raise _Busy("it says nothing")
        if heard.startswith(_BUSY):
            raise _Busy(heard.decode("ascii", "replace").strip())
        if heard == data:  # it is to be left there, so there is no waiting for more of it
            if len(data) >= 4:
                deadline = min(deadline, time.monotonic() + 1.0)
            time.sleep(0.02)
        data = heard


__all__ = ["Agent", "Credentials", "Login", "PhaseError"]
