"""The settings of a machine, and of the hosts through which it is reached.

The ssh configuration is read by paramiko; ``Include`` is expanded here, for paramiko passes
over it. What a machine's text says comes before what the files say.
"""

from __future__ import annotations

import getpass
import glob
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shmdist.managers.ssh.host_spec import Machine, check_names, parse_machine

_DEEPEST = 16  # hosts on the way to one machine, and files that include one another
_DEFAULT_KEYS = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
_POLICIES = ("reject", "accept-new")


@dataclass(frozen=True)
class Hop:
    """One login: at a machine, or at a host on the way to it.

    Attributes
    ----------
    alias : str
        As the user named it.
    host, port, user : str, int, str
        Where to connect, and as whom to log in.
    key_files : tuple of str
        Private keys to try, those of the configuration.
    agent : bool
        Whether the agent's keys may be tried.
    proxy_command : str, optional
        A command whose standard input and output lead to the host.
    known_hosts : tuple of str
        Files of known keys; new ones go to the first.
    hash_names : bool
        Whether a name that is added is hashed.
    key_names : tuple of str
        Names of the host in those files.
    policy : str
        ``"reject"`` or ``"accept-new"``.
    """

    alias: str
    host: str
    port: int
    user: str
    key_files: tuple[str, ...]
    agent: bool
    proxy_command: str | None
    known_hosts: tuple[str, ...]
    hash_names: bool
    key_names: tuple[str, ...]
    policy: str

    def __str__(self) -> str:
        place = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.user}@{place}:{self.port}"


def find_route(machine: Machine, params: dict[str, Any], text: str) -> tuple[Hop, ...]:
    """Return the logins that lead to a machine; its own is the last.

    Parameters
    ----------
    machine : Machine
    params : dict
        With ``known_hosts`` and ``host_key_policy``.
    text : str
        The ssh configuration, of :func:`read_config`.
    """
    return _route(machine, params, text, 0)


def _route(machine: Machine, params: dict[str, Any], text: str, depth: int) -> tuple[Hop, ...]:
    if depth > _DEEPEST:
        raise ValueError(f"the ssh configuration's ProxyJump leads in a circle at {machine.host!r}")
    check_names(machine.host, machine.user, f"machine {machine.text!r}")  # before anything is run with them
    options = _options(machine, text)
    jump = options.get("proxyjump") or "none"
    command = options.get("proxycommand")
    before: tuple[Hop, ...] = ()
    if jump.lower() != "none":
        command = None
        texts = [part.strip().removeprefix("ssh://").rstrip("/") for part in jump.split(",")]
        for number, each in enumerate(texts):
            way = _route(parse_machine(each), params, text, depth + 1)
            # Of several hosts in one list only the first is reached by its own settings.
            before += way if number == 0 else way[-1:]
    return (*before, _hop(machine, options, command, params))


def _hop(machine: Machine, options: dict[str, Any], command: str | None, params: dict[str, Any]) -> Hop:
    host = options.get("hostname", machine.host)
    user = options.get("user") or getpass.getuser()
    check_names(host, user, f"the ssh configuration for {machine.host!r}")
    port = int(options.get("port", 22))
    files = params["known_hosts"]
    if files is not None:
        known = tuple(os.path.expanduser(file) for file in _several(files))
    else:
        mine = options.get("userknownhostsfile", "~/.ssh/known_hosts ~/.ssh/known_hosts2")
        theirs = options.get("globalknownhostsfile", "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2")
        known = tuple(os.path.expanduser(file) for file in [*shlex.split(mine), *shlex.split(theirs)])
    alias = options.get("hostkeyalias")
    from shmdist.managers.ssh.host_keys import names_of

    keys = options.get("identityfile")
    only = options.get("identitiesonly", "no").lower() == "yes"
    return Hop(
        alias=machine.host,
        host=host,
        port=port,
        user=user,
        key_files=tuple(os.path.expanduser(file) for file in (keys or _DEFAULT_KEYS)),
        agent=not only and options.get("identityagent", "").lower() != "none",
        proxy_command=command,
        known_hosts=known,
        hash_names=options.get("hashknownhosts", "no").lower() == "yes",
        key_names=(alias.lower(),) if alias else names_of(host, port),
        policy=_policy(params["host_key_policy"], options.get("stricthostkeychecking", "ask")),
    )


def _policy(wanted: str | None, configured: str) -> str:
    """Return the policy: the parameter's, else the configuration's, and rejection by default."""
    if wanted is not None:
        if wanted not in _POLICIES:
            raise ValueError(f"host_key_policy must be one of {', '.join(_POLICIES)}, not {wanted!r}")
        return wanted
    # "no" would take changed keys as well, which is never done here.
    return "accept-new" if configured.lower() in ("accept-new", "no", "off") else "reject"


def _several(value: Any) -> Sequence[str]:
    return [os.fspath(value)] if isinstance(value, (str, os.PathLike)) else [os.fspath(v) for v in value]


def _options(machine: Machine, text: str) -> dict[str, Any]:
    """Return the configuration for a machine."""
    import paramiko

    # The first value found counts, so what the machine's text says stands before all files.
    head = f"Host {machine.host}\n"
    head += f"User {machine.user}\n" if machine.user else ""
    head += f"Port {machine.port}\n" if machine.port else ""
    try:
        found = paramiko.SSHConfig.from_text(f"{head}Host *\n{text}").lookup(machine.host)
    except Exception as error:
        raise ValueError(f"the ssh configuration for {machine.host!r} cannot be read: {error}") from error
    return dict(found)


def read_config(path: Any) -> str:
    """Return the ssh configuration: of `path`, or the user's and the system's when it is None."""
    if path is not None:
        return _expanded(os.path.expanduser(os.fspath(path)), required=True)
    mine = _expanded(os.path.expanduser("~/.ssh/config"))
    theirs = _expanded("/etc/ssh/ssh_config")
    return f"{mine}\nHost *\n{theirs}"


def _expanded(path: str, depth: int = 0, *, required: bool = False) -> str:
    """Return a file's text with what it includes."""
    if depth > _DEEPEST:
        raise ValueError(f"the ssh configuration {path} includes itself")
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        if required:
            raise
        return ""
    section = "Host *"
    result = []
    for line in lines:
        if re.match(r"\s*(host|match)\b", line, re.IGNORECASE):
            section = line
        include = re.match(r"\s*include[\s=]+(.*)", line, re.IGNORECASE)
        if not include:
            result.append(line)
            continue
        for pattern in shlex.split(include[1]):
            pattern = os.path.expanduser(pattern)
            if not os.path.isabs(pattern):
                folder = "/etc/ssh" if path.startswith("/etc/ssh") else os.path.expanduser("~/.ssh")
                pattern = os.path.join(folder, pattern)
            result += [_expanded(file, depth + 1) for file in sorted(glob.glob(pattern))]
        result.append(section)  # the section goes on where the included one ended
    return "\n".join(result) + "\n"


__all__ = ["Hop", "find_route", "read_config"]
