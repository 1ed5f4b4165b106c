"""The keys of hosts, as ``known_hosts`` files have them. Pure: texts in, verdicts out.

What OpenSSH reads is read: several names in one line, wildcards and negations, hashed names,
``[host]:port``, ``@revoked``. Lines of ``@cert-authority`` make nothing known: paramiko does not ask
hosts for certificates, so there is none to be checked.  Who is refused is told of them.
"""

from __future__ import annotations

import base64
import binascii
import enum
import fnmatch
import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass

AUTHORITY = "@cert-authority"  # a marker of lines


class Verdict(enum.Enum):
    """What the files say of a key."""

    KNOWN = "known"
    UNKNOWN = "unknown"
    CHANGED = "changed"
    REVOKED = "revoked"


@dataclass(frozen=True)
class Entry:
    """One line of a file."""

    marker: str
    names: str
    kind: str
    key: bytes
    where: str  # file and line

    def means(self, name: str) -> bool:
        """Return whether the line is about the host `name`."""
        if self.names.startswith("|1|"):
            return _hash_matches(self.names, name)
        found = False
        for pattern in self.names.split(","):
            positive = pattern.removeprefix("!")
            # In brackets it is a literal to us, and a set of characters to fnmatch.
            if fnmatch.fnmatchcase(name, positive.lower().replace("[", "[[]")):
                if pattern.startswith("!"):
                    return False
                found = True
        return found


def read_known_hosts(text: str, path: str) -> list[Entry]:
    """Return the lines of a ``known_hosts`` file; what makes no sense is passed over."""
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        marker = words.pop(0) if words[0].startswith("@") else ""
        if len(words) < 3 or marker not in ("", "@revoked", AUTHORITY):
            continue
        try:
            key = base64.b64decode(words[2], validate=True)
        except (binascii.Error, ValueError):
            continue
        entries.append(Entry(marker, words[0], words[1], key, f"{path}:{number}"))
    return entries


def names_of(host: str, port: int) -> tuple[str, ...]:
    """Return the names under which a host may stand in the files, the exact one first."""
    host = host.lower()
    return (host,) if port == 22 else (f"[{host}]:{port}", host)


def judge(entries: Iterable[Entry], names: tuple[str, ...], kind: str, key: bytes) -> tuple[Verdict, str]:
    """Say whether a key is a host's, and which line says so.

    A key of another kind than the known ones counts as changed: one who stands in between
    could offer it just as well.  Under a name that is not the exact one (without the port) a
    key can be known, but not changed: another server of the host may be meant.
    """
    entries = list(entries)
    verdict, where = _judge([entry for entry in entries if entry.means(names[0])], kind, key)
    for name in names[1:]:
        if verdict is Verdict.UNKNOWN:
            other, line = _judge([entry for entry in entries if entry.means(name)], kind, key)
            if other is not Verdict.CHANGED:
                verdict, where = other, line
    return verdict, where


def authority(entries: Iterable[Entry], names: tuple[str, ...]) -> str:
    """Return the line by which a host's certificate would make it known; empty without one."""
    found = (entry for name in names for entry in entries if entry.marker == AUTHORITY and entry.means(name))
    return next((entry.where for entry in found), "")


def _judge(entries: Iterable[Entry], kind: str, key: bytes) -> tuple[Verdict, str]:
    verdict, where = Verdict.UNKNOWN, ""
    for entry in entries:
        if entry.marker == AUTHORITY:
            continue
        same = entry.kind == kind and entry.key == key
        if entry.marker == "@revoked":
            if same:
                return Verdict.REVOKED, entry.where
        elif same:
            verdict, where = Verdict.KNOWN, entry.where
        elif verdict is Verdict.UNKNOWN:
            verdict, where = Verdict.CHANGED, entry.where
    return verdict, where


def kinds_known(entries: Iterable[Entry], names: tuple[str, ...]) -> list[str]:
    """Return the kinds of a host's known keys: it is to be asked for one of these."""
    found = [entry for entry in entries if not entry.marker]
    return list(dict.fromkeys(entry.kind for name in names for entry in found if entry.means(name)))


def fingerprint(key: bytes) -> str:
    """Return a key's fingerprint, as ``ssh-keygen -l`` shows it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")


def known_hosts_line(name: str, kind: str, key: bytes, salt: bytes = b"") -> str:
    """Return the line that makes a key known; with a `salt` of 20 bytes the name is hashed."""
    if salt:
        digest = hmac.digest(salt, name.encode(), "sha1")
        name = f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"
    return f"{name} {kind} {base64.b64encode(key).decode()}\n"


def _hash_matches(hashed: str, name: str) -> bool:
    try:
        _, _, salt, digest = hashed.split("|")
        mine = hmac.digest(base64.b64decode(salt), name.encode(), "sha1")
        return hmac.compare_digest(mine, base64.b64decode(digest))
    except (ValueError, binascii.Error):
        return False


__all__ = [
    "Entry",
    "Verdict",
    "authority",
    "fingerprint",
    "judge",
    "kinds_known",
    "known_hosts_line",
    "names_of",
    "read_known_hosts",
]
