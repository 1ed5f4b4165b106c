"""OpenSSH servers that the tests start, and servers that only pretend to be one."""

import contextlib
import functools
import itertools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import shmdist as sd
from tests.integration.helpers import until, within

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/sbin")


@functools.cache
def why_not():
    """Return why no server can be started here; None if one can."""
    if SSHD is None:
        return "there is no sshd: apt-get install openssh-server"
    if os.geteuid() != 0:
        return "only root can start an sshd that lets users in"
    return None


needs_sshd = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def free_port():
    """Return a port that is free, and that the system gives to no connection of its own accord."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def make_key(path, kind="ed25519", passphrase="", comment="test"):
    """Make a key pair; return the path of the private one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", comment, "-f", str(path)]
    subprocess.run(command, check=True)
    return path


class Sshd:
    """One server on the loopback interface.

    Parameters
    ----------
    folder : Path
        Where its files are.
    user_key : Path
        The private key whose owner is let in.
    settings : str
        Further lines of its configuration.
    address, port : str and int
        Where it listens.
    prefix : sequence of str
        What its command line begins with.
    """

    def __init__(self, folder, user_key, settings="", address="127.0.0.1", prefix=(), port=None):
        self.folder = folder
        self._prefix = list(prefix)
        folder.mkdir(parents=True, exist_ok=True)
        self.user_key = user_key
        self.address = address
        self.port = port or free_port()
        self.host_key = folder / "host_ed25519"
        if not self.host_key.exists():
            make_key(self.host_key, comment="host")
        self.known_hosts = folder / "known_hosts"
        self.known_hosts.write_text(self.known_line())
        (folder / "authorized_keys").write_text(Path(f"{user_key}.pub").read_text())
        self.config = folder / "sshd_config"
        self.config.write_text(f"""{settings}
Port {self.port}
ListenAddress {address}
HostKey {self.host_key}
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
AuthorizedKeysFile {folder}/authorized_keys
PrintMotd no
LogLevel VERBOSE
ClientAliveInterval 5
ClientAliveCountMax 2
""")
        self.log = folder / "log"
        self.start()

    def start(self):
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
        self._said = len(self.log.read_text()) if self.log.exists() else 0
        self.process = subprocess.Popen(
            [*self._prefix, SSHD, "-D", "-f", str(self.config), "-E", str(self.log)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            until(self._answers, 10.0, "sshd listens")
        except BaseException:
            self.stop()
            raise

    def _answers(self):
        assert self.process.poll() is None, self.log.read_text()
        # Not another server, nor this socket itself, which Linux connects to itself by chance.
        if not self.log.exists() or "Server listening on" not in self.log.read_text()[self._said :]:
            return False
        with contextlib.suppress(OSError), socket.create_connection((self.address, self.port), 1):
            return True
        return False

    def stop(self):
        self.process.kill()
        self.process.wait()

    @property
    def text(self):
        """The machine, as addprocs takes it."""
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"root@{address}:{self.port}"

    def known_line(self, name=None):
        kind, key, *_ = Path(f"{self.host_key}.pub").read_text().split()
        name = name or (self.address if self.port == 22 else f"[{self.address}]:{self.port}")
        return f"{name} {kind} {key}\n"

    def params(self, **more):
        """The parameters by which the test's user logs in here."""
        return {
            "key_filename": str(self.user_key),
            "known_hosts": str(self.known_hosts),
            "ssh_config": os.devnull,
            "allow_agent": False,
            "exename": sys.executable,
            **more,
        }

    def logins(self):
        """How many logins there have been."""
        return self.log.read_text().count("Accepted publickey for")


_numbers = itertools.count()


class Host:
    """A host of its own, as far as the network goes: a namespace with one line to this one."""

    def __init__(self, number):
        unique = f"{os.getpid() % 100000}n{next(_numbers)}"
        self.name = f"shmdist{unique}"
        self.here, self.address = f"10.213.{number}.1", f"10.213.{number}.2"
        self._line = line = f"sd{unique}"
        for command in (
            f"netns add {self.name}",
            f"link add {line} type veth peer name eth0 netns {self.name}",
            f"address add {self.here}/24 dev {line}",
            f"link set {line} up",
            f"-n {self.name} address add {self.address}/24 dev eth0",
            f"-n {self.name} link set eth0 up",
            f"-n {self.name} link set lo up",
        ):
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)
        self.prefix = ("ip", "netns", "exec", self.name)

    def processes(self):
        """Return the processes that run there."""
        inside = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        return [int(word) for word in inside.stdout.split()]

    def line_down(self):
        run(f"ip link set {self._line} down")

    def lose_all(self):
        """Lose what is sent, in both directions, while the line seems to be up: it goes to a card that is not there."""
        run(f"ip neighbour replace {self.address} lladdr 02:00:00:00:00:01 dev {self._line} nud permanent")
        run(
            f"ip -n {self.name} neighbour replace {self.here} lladdr 02:00:00:00:00:01 dev eth0 nud permanent"
        )

    def remove(self):
        for ospid in self.processes():  # servers, which would not see that the line is gone
            kill(ospid)
        subprocess.run(["ip", "link", "delete", self._line], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "delete", self.name], check=False, capture_output=True)


def run(command):
    subprocess.run(command.split(), check=True, capture_output=True)


def can_make_hosts():
    """Whether this machine lets us make network namespaces."""
    if why_not() is not None or shutil.which("ip") is None:
        return False
    host = None
    try:
        host = Host(250)
        return True
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        if host is not None:
            host.remove()


class FakeServer:
    """Accepts connections, and does with each what `behave` does."""

    def __init__(self, behave):
        self._behave = behave
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port = self._sock.getsockname()[1]
        self.count = 0
        self._open = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._sock.accept()
                self.count += 1
                self._open.append(connection)
                with contextlib.suppress(OSError):
                    self._behave(connection)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._thread.join()
        for connection in self._open:
            connection.close()


class User:
    """A user with a login shell and start-up files; has root's rights, so that it can run our interpreter."""

    def __init__(self, name, shell, files, folder):
        self.name = name
        self.home = folder / name
        command = ["useradd", "-o", "-u", "0", "-g", "0", "-M", "-d", str(self.home), "-s", shell]
        command += ["-p", "*", name]  # no password, which is not the same as a locked account
        subprocess.run(command, check=True, capture_output=True)
        for file, text in files.items():
            path = self.home / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.home.mkdir(exist_ok=True)

    def remove(self):
        subprocess.run(["userdel", "-f", self.name], check=False, capture_output=True)


def kill(ospid):
    with contextlib.suppress(OSError):
        os.kill(ospid, signal.SIGKILL)


def later(seconds, action):
    """Run `action` in a moment; return the thread."""

    def run():
        time.sleep(seconds)
        action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def refused(machines, **params):
    """Return the error of a launch that must fail."""
    with within(30), pytest.raises(sd.LaunchWorkerError) as caught:
        sd.addprocs(machines, **params)
    return caught.value


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def threads_of_logins():
    """The threads that are neither the program's own nor the runtime's for calls."""
    names = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    return [name for name in names if not re.fullmatch(r"shmdist-\d+", name)]
