"""Files of known hosts, beside what ssh-keygen makes of them."""

import base64
import os
import shutil
import subprocess

import pytest

from shmdist.managers.ssh.host_keys import (
    Verdict,
    authority,
    fingerprint,
    judge,
    kinds_known,
    known_hosts_line,
    names_of,
    read_known_hosts,
)

A, B, C = b"key a", b"key b", b"key c"


def text_of(*lines):
    return "".join(f"{name} {kind} {base64.b64encode(key).decode()} comment\n" for name, kind, key in lines)


def verdict(text, host, port, kind, key):
    return judge(read_known_hosts(text, "f"), names_of(host, port), kind, key)[0]


@pytest.mark.parametrize(
    ("names", "host", "port", "known"),
    [
        ("host", "host", 22, True),
        ("host", "HOST", 22, True),
        ("a,host,b", "host", 22, True),
        ("*.net,!c.net", "b.net", 22, True),
        ("*.net,!c.net", "c.net", 22, False),
        ("h?st", "host", 22, True),
        ("[host]:2222", "host", 2222, True),
        ("[host]:2222", "host", 22, False),
        ("host", "host", 2222, True),
        ("[ho*]:2222", "host", 2222, True),
        ("fe80::1", "fe80::1", 22, True),
    ],
)
def test_names(names, host, port, known):
    text = "# comment\n\n@cert-authority * ssh-rsa AAAA\nnonsense\n" + text_of((names, "ssh-ed25519", A))
    assert verdict(text, host, port, "ssh-ed25519", A) is (Verdict.KNOWN if known else Verdict.UNKNOWN)


def test_keys():
    text = text_of(
        ("host", "ssh-ed25519", A), ("host", "ssh-ed25519", B), ("@revoked host", "ssh-ed25519", C)
    )
    assert verdict(text, "host", 22, "ssh-ed25519", A) is Verdict.KNOWN
    assert verdict(text, "host", 22, "ssh-ed25519", B) is Verdict.KNOWN
    assert verdict(text, "host", 22, "ssh-ed25519", C) is Verdict.REVOKED
    assert verdict(text, "host", 22, "ssh-ed25519", b"key d") is Verdict.CHANGED
    assert verdict(text, "host", 22, "ssh-rsa", b"key d") is Verdict.CHANGED, "another kind is no way around"
    assert verdict(text, "other", 22, "ssh-ed25519", A) is Verdict.UNKNOWN
    # Another server of the same host may have another key.
    assert verdict(text, "host", 2222, "ssh-ed25519", b"key d") is Verdict.UNKNOWN
    assert kinds_known(read_known_hosts(text, "f"), ("host",)) == ["ssh-ed25519"]
    assert judge(read_known_hosts(text, "f"), ("host",), "ssh-rsa", A) == (Verdict.CHANGED, "f:1")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="there is no ssh-keygen")
def test_as_ssh_keygen_does(tmp_path):
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    kind, text, *_ = (tmp_path / "key.pub").read_text().split()
    blob = base64.b64decode(text)
    shown = subprocess.run(["ssh-keygen", "-l", "-f", key], check=True, capture_output=True, text=True)
    assert fingerprint(blob) == shown.stdout.split()[1]

    file = tmp_path / "known_hosts"
    file.write_text(f"[host]:2222 {kind} {text}\n")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", file], check=True, capture_output=True)
    assert file.read_text().startswith("|1|")
    assert verdict(file.read_text(), "host", 2222, kind, blob) is Verdict.KNOWN
    assert verdict(file.read_text(), "host2", 2222, kind, blob) is Verdict.UNKNOWN

    file.write_text(known_hosts_line("[other]:2222", kind, blob, os.urandom(20)))
    found = subprocess.run(["ssh-keygen", "-F", "[other]:2222", "-f", file], capture_output=True, text=True)
    assert found.returncode == 0 and text in found.stdout
    file.write_text(known_hosts_line("plain", kind, blob))
    assert subprocess.run(["ssh-keygen", "-F", "plain", "-f", file], capture_output=True).returncode == 0


def test_authorities_of_certificates():
    """They make no key known, and neither unknown nor changed one that is."""
    text = text_of(
        ("@cert-authority *.net", "ssh-ed25519", A),
        ("host.net", "ssh-ed25519", B),
        ("@cert-authority [*.org]:2222", "ssh-ed25519", C),
    )
    entries = read_known_hosts(text, "f")
    assert authority(entries, names_of("other.net", 22)) == "f:1"
    assert authority(entries, names_of("other.net", 2222)) == "f:1"
    assert authority(entries, names_of("x.org", 2222)) == "f:3"
    assert authority(entries, names_of("x.org", 22)) == authority([], names_of("x.net", 22)) == ""
    assert verdict(text, "host.net", 22, "ssh-ed25519", B) is Verdict.KNOWN
    assert verdict(text, "other.net", 22, "ssh-ed25519", A) is Verdict.UNKNOWN
    assert verdict(text, "other.net", 22, "ssh-ed25519", B) is Verdict.UNKNOWN
    assert kinds_known(entries, names_of("host.net", 22)) == ["ssh-ed25519"]
    assert kinds_known(entries, names_of("other.net", 22)) == []
