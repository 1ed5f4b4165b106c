"""Who is let in, and where we let ourselves be led: keys of users and hosts, ways over several hosts."""

import os
import shutil
import socket
import subprocess
import time

import pytest

import shmdist as sd
from tests.integration.helpers import until, within
from tests.integration.sshd import (
    FakeServer,
    User,
    descriptors,
    later,
    make_key,
    needs_sshd,
    refused,
    threads_of_logins,
)

pytestmark = needs_sshd


# ---------------------------------------------------------------------- users


def test_keys(sshd, tmp_path, start):
    other = make_key(tmp_path / "other")
    error = refused([sshd.text], **sshd.params(key_filename=str(other)))
    assert error.phase == "authenticate" and f"127.0.0.1:{sshd.port}" in error.host
    assert f"key {other}" in str(error) and "publickey" in str(error)

    secret = make_key(tmp_path / "secret", passphrase="open sesame")
    server = start("secret_server")
    (server.folder / "authorized_keys").write_text((tmp_path / "secret.pub").read_text())
    error = refused([server.text], **server.params(key_filename=secret))
    assert error.phase == "authenticate" and "it needs a passphrase" in str(error)
    error = refused([server.text], **server.params(key_filename=secret, passphrase="wrong"))
    assert error.phase == "authenticate" and "sesame" not in str(error)
    params = server.params(key_filename=[other, secret], passphrase="open sesame")
    with sd.addprocs([server.text], **params) as pids:
        assert sd.remotecall_fetch(sd.myid, pids[0]) == pids[0]
    plain = sshd.params(passphrase="for another key")  # the server's key needs none
    with sd.addprocs([sshd.text], **plain) as pids:
        assert sd.remotecall_fetch(sd.myid, pids[0]) == pids[0]


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_other_kinds_of_keys(start, tmp_path, kind):
    key = make_key(tmp_path / kind, kind)
    server = start()
    (server.folder / "authorized_keys").write_text((tmp_path / f"{kind}.pub").read_text())
    with sd.addprocs([server.text], **server.params(key_filename=key)) as pids:
        assert len(pids) == 1


@pytest.mark.skipif(shutil.which("ssh-agent") is None, reason="there is no ssh-agent")
def test_an_agent(sshd, user_key, tmp_path, monkeypatch):
    place = str(tmp_path / "agent")
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", place], stdout=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", place)
        monkeypatch.setenv("HOME", str(tmp_path))  # no keys of the user who runs the tests
        with within(10):
            while subprocess.run(["ssh-add", "-q", str(user_key)], capture_output=True).returncode:
                time.sleep(0.02)
        params = sshd.params(key_filename=(), allow_agent=True)
        with sd.addprocs([(sshd.text, 2)], **params) as pids:
            assert len(pids) == 2
        error = refused([sshd.text], **{**params, "allow_agent": False})
        assert error.phase == "authenticate"
    finally:
        agent.kill()
        agent.wait()


@pytest.mark.parametrize("interactive", [False, True])
def test_a_password(start, tmp_path, interactive):
    kind = "KbdInteractiveAuthentication" if interactive else "PasswordAuthentication"
    settings = f"{kind} yes\nPubkeyAuthentication no" + ("\nUsePAM yes" if interactive else "")
    server = start("password", settings)
    user = User(f"shmdist-pw{os.getpid()}", "/bin/sh", {}, tmp_path)
    try:
        subprocess.run(["chpasswd"], input=f"{user.name}:Secret-word-1\n", text=True, check=True)
        params = server.params(key_filename=(), password="Secret-word-1")
        text = f"{user.name}@127.0.0.1:{server.port}"
        with sd.addprocs([text], **params) as pids:
            assert len(pids) == 1
        error = refused([text], **{**params, "password": "Wrong-word"})
        assert error.phase == "authenticate"
        assert "the password" in str(error) and "Wrong-word" not in str(error)
    finally:
        user.remove()


# ---------------------------------------------------------------------- hosts


def test_an_unknown_host(sshd, tmp_path):
    known = tmp_path / "new" / "known_hosts"
    error = refused([sshd.text], **sshd.params(known_hosts=known))
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", sshd.host_key], check=True, capture_output=True, text=True
    )
    fingerprint = shown.stdout.split()[1]
    assert error.phase == "host key" and fingerprint in str(error)
    assert f"ssh-keyscan -p {sshd.port} 127.0.0.1 >> {known}" in str(error)
    assert not known.exists()
    # The line that it tells does make it known.
    known.parent.mkdir()
    subprocess.run(
        f"ssh-keyscan -p {sshd.port} 127.0.0.1 >> {known}", shell=True, check=True, capture_output=True
    )
    with sd.addprocs([sshd.text], **sshd.params(known_hosts=known)) as pids:
        assert len(pids) == 1


def test_accept_new(sshd, tmp_path):
    known = tmp_path / "new" / "known_hosts"
    params = sshd.params(known_hosts=known, host_key_policy="accept-new")
    with sd.addprocs([sshd.text, sshd.text], **params) as pids:
        assert len(pids) == 2
    assert known.read_text() == sshd.known_line()
    assert known.stat().st_mode & 0o777 == 0o600
    with sd.addprocs([sshd.text], **sshd.params(known_hosts=known)) as pids:
        assert len(pids) == 1


@pytest.mark.parametrize("policy", ["reject", "accept-new"])
def test_a_host_key_that_changes(start, tmp_path, policy):
    server = start()
    params = server.params(host_key_policy=policy)
    with sd.addprocs([server.text], **params):
        pass
    server.stop()
    for path in (server.host_key, server.folder / "host_ed25519.pub"):
        path.unlink()
    make_key(server.host_key, "ed25519" if policy == "reject" else "ecdsa")
    server.start()
    before = server.known_hosts.read_text()
    error = refused([server.text], **params)
    assert error.phase == "host key" and "is not the one that is known" in str(error)
    assert f"{server.known_hosts}:1" in str(error), "the line is named"
    assert server.known_hosts.read_text() == before
    assert server.logins() == 1


def test_hashed_names_and_aliases(sshd, tmp_path):
    known = tmp_path / "known_hosts"
    known.write_text(sshd.known_line())
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", known], check=True, capture_output=True)
    assert known.read_text().startswith("|1|")
    with sd.addprocs([sshd.text], **sshd.params(known_hosts=known)) as pids:
        assert len(pids) == 1
    known.write_text(sshd.known_line("its-name"))
    config = tmp_path / "config"
    config.write_text(f"""
Host alias
    HostName 127.0.0.1
    Port {sshd.port}
    User root
    HostKeyAlias its-name
    IdentityFile {sshd.user_key}
    IdentitiesOnly yes
    UserKnownHostsFile {known}
""")
    params = sshd.params(known_hosts=None, key_filename=(), allow_agent=True, ssh_config=config)
    with sd.addprocs([("alias", 2)], **params) as pids:
        assert len(pids) == 2
    refused([sshd.text], **sshd.params(known_hosts=known))


def test_a_certificate_that_only_ssh_can_check(start, tmp_path):
    """A host whose authority is known; that is said, and that its key must be known here."""
    authority = make_key(tmp_path / "authority")
    server = start("certified", f"HostCertificate {tmp_path / 'certified' / 'host_ed25519-cert.pub'}")
    sign = ["ssh-keygen", "-q", "-s", authority, "-I", "host", "-h", "-n", "127.0.0.1"]
    subprocess.run([*sign, server.host_key], check=True, capture_output=True)
    server.stop()
    server.start()
    known = tmp_path / "known"
    line = f"@cert-authority [127.0.0.1]:{server.port} {(tmp_path / 'authority.pub').read_text()}"
    known.write_text(line)
    by_ssh = ["ssh", "-F", "none", "-i", server.user_key, "-o", f"UserKnownHostsFile={known}"]
    by_ssh += ["-o", "BatchMode=yes", "-p", str(server.port), "root@127.0.0.1", "true"]
    assert subprocess.run(by_ssh, capture_output=True).returncode == 0, "it is a certificate"
    error = refused([server.text], **server.params(known_hosts=known))
    assert error.phase == "host key" and f"{known}:1" in str(error)
    assert "certificate" in str(error) and "ssh-keyscan" in str(error)
    # Its key as well, or the policy, makes it known.
    known.write_text(line + server.known_line())
    with sd.addprocs([server.text], **server.params(known_hosts=known)) as pids:
        assert len(pids) == 1
    known.write_text(line)
    with sd.addprocs([server.text], **server.params(known_hosts=known, host_key_policy="accept-new")) as pids:
        assert len(pids) == 1


# ---------------------------------------------------------------------- ways


def test_jumps(start, tmp_path):
    """One and two hosts on the way; each has a key of its own, and one policy holds for all."""
    first, second, target = start("first"), start("second"), start("target")
    known = tmp_path / "known"
    known.write_text(first.known_line() + second.known_line() + target.known_line())
    config = tmp_path / "config"
    config.write_text(f"""
Host first
    Port {first.port}
Host second
    Port {second.port}
    ProxyJump first
Host one
    Port {target.port}
    ProxyJump root@first
Host two
    Port {target.port}
    ProxyJump second
Host three
    Port {target.port}
    ProxyJump root@127.0.0.1:{first.port},root@127.0.0.1:{second.port}
Host command
    Port {target.port}
    ProxyCommand {shutil.which("ssh")} -F none -i {target.user_key} -o UserKnownHostsFile={known} -p {first.port} -W %h:%p root@127.0.0.1
Match all
    HostName 127.0.0.1
    User root
""")
    params = target.params(known_hosts=known, ssh_config=config)
    with within(40), sd.addprocs(["one", ("two", 2), "three", "command"], **params) as pids:
        assert [sd.remotecall_fetch(sd.myid, pid) for pid in pids] == pids
    # first: for itself as jump (shared by one, two, three by name or by address), and for the command
    assert target.logins() == 4
    assert second.logins() == 2 and first.logins() <= 4

    known.write_text(first.known_line() + target.known_line())
    error = refused(["one", "two"], **params)
    assert len(error.pids) == 1 and error.phase == "host key"
    assert str(second.port) in str(error), "the host on the way is named"
    sd.rmprocs(*error.pids)


# ---------------------------------------------------------------------- servers that are none


def test_the_name_and_the_port_must_be_somebodys(sshd):
    error = refused(["no-such-host.invalid"], **sshd.params())
    assert error.phase == "resolve" and "no-such-host.invalid" in str(error)
    with FakeServer(lambda connection: None) as server:
        port = server.port
    error = refused([f"127.0.0.1:{port}"], **sshd.params())
    assert error.phase == "connect" and "refused" in str(error).lower()


@pytest.mark.parametrize(
    ("behave", "text"),
    [
        (lambda connection: None, "says nothing"),
        (lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "HTTP/1.1 400"),
        (lambda connection: connection.sendall(os.urandom(1 << 16)), "no SSH"),
        (lambda connection: connection.sendall(b"SS"), "b'SS'"),
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"), "no more within 0.7 s"),
        (lambda connection: connection.sendall(b"SSH-1.5-old\r\n"), "SSH"),
        (lambda connection: connection.close(), "closes the connection before it says who it is"),
    ],
    ids=["silent", "http", "garbage", "half a word", "half open", "old", "closing"],
)
def test_a_server_that_is_none(sshd, behave, text, monkeypatch):
    monkeypatch.setenv("SHMDIST_WORKER_TIMEOUT", "0.7")
    with FakeServer(behave) as server:
        error = refused([f"127.0.0.1:{server.port}"], **sshd.params())
    assert error.phase == "connect" and text in str(error)


def test_good_hosts_stay(sshd, start, tmp_path, monkeypatch):
    monkeypatch.setenv("SHMDIST_WORKER_TIMEOUT", "10")
    strange = start("strange")
    with FakeServer(lambda connection: connection.sendall(b"nonsense\n")) as server:
        machines = [sshd.text, strange.text, f"127.0.0.1:{server.port}", "x.invalid", (sshd.text, 2)]
        error = refused(machines, **sshd.params())
    assert len(error.pids) == 3 and set(error.pids) <= set(sd.workers())
    assert sorted(cause.phase for cause in error.causes) == ["connect", "host key", "resolve"]
    assert "3 launches failed, on 3 of 5 machines" in str(error)
    sd.rmprocs(*error.pids)


# ---------------------------------------------------------------------- limits of servers


def test_twenty_workers_on_one_server(start):
    server = start("busy", "MaxStartups 3:50:10\nMaxSessions 10")
    with within(50), sd.addprocs([(server.text, 20)], **server.params()) as pids:
        assert len(pids) == 20
        assert sd.pmap(lambda x: x + 1, range(40), batch_size=1) == list(range(1, 41))
    assert server.logins() == 2, "a further login when the first takes no more sessions"


def test_a_server_that_is_busy_is_asked_again(start):
    server = start("busy", "MaxStartups 2:100:2\nLoginGraceTime 60")
    others = []

    def one_more():
        other = socket.create_connection(("127.0.0.1", server.port))
        if other.recv(4) == b"SSH-":
            others.append(other)
        else:
            other.close()
        return len(others) == 2

    until(one_more, 10.0)
    thread = later(1.0, lambda: [other.close() for other in others])
    with within(20), sd.addprocs([server.text], **server.params()) as pids:
        assert len(pids) == 1
    thread.join()
    assert "MaxStartups" in server.log.read_text() or "drop connection" in server.log.read_text()


def test_many_logins_at_once(start, tmp_path):
    """Each alias is a host of its own to us, so that there are 12 logins."""
    server = start("busy", "MaxStartups 3:50:10")
    config = tmp_path / "config"
    known = tmp_path / "known"
    names = [f"host{number}" for number in range(12)]
    known.write_text("".join(server.known_line(name) for name in names))
    config.write_text(
        "".join(f"Host {name}\nHostKeyAlias {name}\n" for name in names)
        + f"Match all\nHostName 127.0.0.1\nPort {server.port}\nUser root\n"
    )
    params = server.params(known_hosts=known, ssh_config=config, max_parallel=12)
    with within(40), sd.addprocs(names, **params) as pids:
        assert len(pids) == 12
    assert server.logins() == 12


def test_nothing_is_left_of_launches_that_fail(sshd, start, tmp_path, monkeypatch):
    monkeypatch.setenv("SHMDIST_WORKER_TIMEOUT", "0.7")
    strange = start("strange")
    other = make_key(tmp_path / "other")

    def fail():
        with FakeServer(lambda connection: connection.sendall(b"SSH-2.0-x\r\n")) as half_open:
            refused([strange.text, f"127.0.0.1:{half_open.port}", "x.invalid"], **sshd.params())
        refused([sshd.text], **sshd.params(key_filename=other))
        refused([(sshd.text, 2)], **sshd.params(exename="/no/such/python"))
        refused([(sshd.text, 2)], **sshd.params(exename=["sleep", "9"]))

    fail()
    before = descriptors()
    for _ in range(2):
        fail()
    until(lambda: descriptors() <= before, what=f"no more than {before} descriptors")
    until(lambda: not threads_of_logins(), what="no thread is left")
