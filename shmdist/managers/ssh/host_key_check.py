"""Checks a host's key against the files of known keys.

A host whose key is not known is refused, with the fingerprint and the line that would make it
known, unless the policy is to accept new ones.  A key that differs from the known one is
refused under every policy, and one policy holds for every host on the way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

from shmdist.managers.ssh import host_keys
from shmdist.managers.ssh.config import Hop
from shmdist.managers.ssh.host_keys import Verdict

_appending = threading.Lock()  # guards adding to known_hosts files


class PhaseError(Exception):
    """Something failed on the way to a worker.

    Attributes
    ----------
    phase : str
        ``"resolve"``, ``"connect"``, ``"host key"``, ``"authenticate"``, ``"launch"``.
    """

    def __init__(self, phase: str, message: str) -> None:
        super().__init__(message)
        self.phase = phase


def known_hosts(hop: Hop) -> Iterator[host_keys.Entry]:
    """Yield the lines of a host's files of known keys."""
    for path in hop.known_hosts:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                yield from host_keys.read_known_hosts(file.read(), path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise PhaseError("host key", f"the file of known hosts cannot be read: {error}") from error


def check_key(hop: Hop, known: list[host_keys.Entry], kind: str, key: bytes) -> None:
    """Refuse a host whose key is not known, has changed, or is revoked."""
    verdict, where = host_keys.judge(known, hop.key_names, kind, key)
    mark = f"{kind} {host_keys.fingerprint(key)}"
    if verdict is Verdict.KNOWN:
        return
    if verdict is Verdict.CHANGED:
        raise PhaseError(
            "host key",
            f"the key of {hop} is not the one that is known: it shows {mark}, and {where} has another. "
            f"Someone may be in between; if the host's key was changed on purpose, remove that line",
        )
    if verdict is Verdict.REVOKED:
        raise PhaseError("host key", f"the key of {hop}, {mark}, is revoked by {where}")
    with _appending:
        # Another login at the same host may have added it meanwhile.
        verdict, _ = host_keys.judge(known_hosts(hop), hop.key_names, kind, key)
        if verdict is Verdict.KNOWN:
            return
        if verdict is Verdict.UNKNOWN and hop.policy == "accept-new":
            _add_key(hop, kind, key)
            return
    file = hop.known_hosts[0] if hop.known_hosts else "~/.ssh/known_hosts"
    where = host_keys.authority(known, hop.key_names)
    certified = (
        f" ({where} is for its certificate, which ssh checks; here the key must be known)" if where else ""
    )
    scan = f"ssh-keyscan {'' if hop.port == 22 else f'-p {hop.port} '}{hop.host} >> {file}"
    raise PhaseError(
        "host key",
        f"the key of {hop} is not known: {mark}{certified}. If that is the fingerprint that the host's "
        f"administrator tells, add it with\n    {scan}\nor pass host_key_policy='accept-new'",
    )


def _add_key(hop: Hop, kind: str, key: bytes) -> None:
    """Add a host's key to the first of its files."""
    if not hop.known_hosts:
        return
    path = hop.known_hosts[0]
    line = host_keys.known_hosts_line(hop.key_names[0], kind, key, os.urandom(20) if hop.hash_names else b"")
    try:
        os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
        with open(path, "a+b", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.write(b"\n")
            file.write(line.encode())
    except OSError as error:
        raise PhaseError("host key", f"the key of {hop} cannot be added: {error}") from error


__all__ = ["PhaseError", "check_key", "known_hosts"]
