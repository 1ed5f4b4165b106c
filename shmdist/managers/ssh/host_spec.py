"""Machines as texts: user, host, port, and the number of workers.

A text is ``[user@]host[:port] [bind_addr[:port]]``: where to log in, and, after a blank, the
address on which the workers listen. IPv6 addresses stand in brackets. A machine is a text, or
a text with the number of its workers: ``("user@host:2222", 4)``, ``("host", "auto")``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_FORM = "[user@]host[:port] [bind_addr[:port]]"
_NOT_IN_HOSTS = frozenset("'`\"$\\;&<>|(){}")  # OpenSSH's ssh.c
_NOT_IN_USERS = frozenset("'`\"$;&<>|(){}")


@dataclass(frozen=True)
class Machine:
    """One machine, as the user named it.

    Attributes
    ----------
    text : str
        What was given.
    host : str
        Host name, address (without brackets) or alias of the ssh configuration.
    user, port : str and int, optional
        How to log in, where the text says so.
    bind_addr, bind_port : str and int, optional
        Where the workers listen, where the text says so.
    count : int or None
        Number of workers; None for ``"auto"``, as many as the machine has CPUs to use.

    Examples
    --------
    >>> machine = parse_machine(("me@node7:2222 10.0.0.7", 4))
    >>> machine.user, machine.host, machine.port, machine.bind_addr, machine.count
    ('me', 'node7', 2222, '10.0.0.7', 4)
    """

    text: str
    host: str
    user: str | None = None
    port: int | None = None
    bind_addr: str | None = None
    bind_port: int | None = None
    count: int | None = 1

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which a mapping of hosts may mean this machine, the most exact first."""
        login = self.text.split()[0]
        with_user = f"{self.user}@{self.host}" if self.user else self.host
        return tuple(dict.fromkeys((self.text, login, with_user, self.host)))


def parse_machines(machines: Any) -> list[Machine]:
    """Return what a list of machines means.

    Raises
    ------
    TypeError, ValueError
        With the item that is wrong, and what it should be.
    """
    if isinstance(machines, (str, bytes)) or _is_counted(machines):
        raise TypeError(f"machines come as a list: addprocs([{machines!r}]), not addprocs({machines!r})")
    parsed = [parse_machine(item) for item in machines]
    if not parsed:
        raise ValueError("the list of machines is empty")
    return parsed


def _is_counted(item: Any) -> bool:
    """Return whether `item` is one machine with its count, rather than several machines."""
    return (
        isinstance(item, tuple)
        and len(item) == 2
        and isinstance(item[0], str)
        and (item[1] == "auto" or not isinstance(item[1], (str, tuple, Machine)))
    )


def parse_machine(item: Any) -> Machine:
    """Return what one machine means: a text, or a text and a count."""
    count: Any = 1
    text = item
    if isinstance(item, Machine):
        return item
    if isinstance(item, Sequence) and not isinstance(item, (str, bytes)):
        if len(item) != 2:
            raise ValueError(f"a machine with its count is a pair such as ('host', 4), not {item!r}")
        text, count = item
    if not isinstance(text, str):
        raise TypeError(f"a machine is a text {_FORM!r}, or such a text and a count, not {item!r}")
    parts = text.split()
    if not 1 <= len(parts) <= 2:
        raise ValueError(f"machine {text!r} is not of the form {_FORM!r}")
    user, at, place = parts[0].rpartition("@")
    if at and not user:
        raise ValueError(f"machine {text!r}: the user before '@' is empty")
    host, port = _place(place, text)
    bind_addr, bind_port = _place(parts[1], text) if len(parts) == 2 else (None, None)
    check_names(host, user or None, f"machine {text!r}")
    return Machine(text, host, user or None, port, bind_addr, bind_port, _count(count, text))


def check_names(host: str, user: str | None, where: str) -> None:
    """Refuse a host or user name that a shell could take for more than a name, as OpenSSH does.

    The ssh configuration's ``ProxyCommand`` and ``Match exec`` give names to a shell.

    Parameters
    ----------
    host, user : str
        As they are used to log in.
    where : str
        What the error is about.

    Raises
    ------
    ValueError
        With the character that is not allowed. OpenSSH's ``valid_hostname`` and ``valid_ruser`` allow
        a ``$`` in the name of a user; a shell would put a variable there.
    """
    bad = next((c for c in host if c in _NOT_IN_HOSTS or c.isspace() or not c.isprintable()), None)
    if not host or host.startswith("-") or bad is not None:
        raise ValueError(f"{where}: {host!r} is no host name" + (f": it has {bad!r} in it" if bad else ""))
    if user is None:
        return
    bad = next((c for c in user if c in _NOT_IN_USERS or not c.isprintable()), None)
    if not user or user.startswith("-") or " -" in user or user.endswith("\\") or bad is not None:
        raise ValueError(f"{where}: {user!r} is no user name" + (f": it has {bad!r} in it" if bad else ""))


def _count(count: Any, text: str) -> int | None:
    if count == "auto" or count is None:
        return None
    if isinstance(count, bool) or not hasattr(count, "__index__") or count.__index__() < 1:
        raise ValueError(f"machine {text!r}: the count must be a positive integer or 'auto', not {count!r}")
    number: int = count.__index__()
    return number


def _place(place: str, text: str) -> tuple[str, int | None]:
    """Split ``host[:port]`` or ``[address][:port]``."""
    if place.startswith("["):
        host, bracket, rest = place[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f"machine {text!r}: an IPv6 address stands in brackets, as in '[fe80::1]:22'")
        port = rest[1:] if rest else None
    else:
        host, colon, port_text = place.partition(":")
        if ":" in port_text:
            raise ValueError(f"machine {text!r}: write an IPv6 address in brackets, as in '[{place}]'")
        port = port_text if colon else None
    if not host or host.startswith("-"):
        raise ValueError(f"machine {text!r}: {host!r} is no host name")
    if port is None:
        return host, None
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"machine {text!r}: {port!r} is no port, which is a number from 1 to 65535")
    return host, int(port)


def for_machine(value: Any, machine: Machine, default: Any = None) -> Any:
    """Return a parameter's value for one machine: ``{host: value}`` has one for each."""
    if not isinstance(value, Mapping):
        return value
    for name in machine.names:
        if name in value:
            return value[name]
    return default


def env_for(env: Any, machine: Machine) -> dict[str, str]:
    """Return the environment for one machine: ``{name: text}``, or ``{host: {name: text}}``."""
    env = env or {}
    if any(isinstance(value, Mapping) for value in env.values()):
        env = for_machine(env, machine, {})
    return {str(name): str(value) for name, value in env.items()}


def check_hosts(name: str, value: Any, machines: Sequence[Machine]) -> None:
    """Raise when a mapping of hosts names one that is not among the machines."""
    if not isinstance(value, Mapping):
        return
    if name == "env" and not any(isinstance(inner, Mapping) for inner in value.values()):
        return
    known = {known for machine in machines for known in machine.names}
    for host in value:
        if host not in known:
            raise ValueError(
                f"{name} names the host {host!r}, which is not among the machines: "
                f"{', '.join(sorted({machine.host for machine in machines}))}"
            )


__all__ = [
    "Machine",
    "check_hosts",
    "check_names",
    "env_for",
    "for_machine",
    "parse_machine",
    "parse_machines",
]
