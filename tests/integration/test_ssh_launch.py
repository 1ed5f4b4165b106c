"""What happens on the remote host: login shells, interpreters, the package, and the end of a worker."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

import shmdist as sd
from tests.integration import helpers
from tests.integration.helpers import Script, until, within
from tests.integration.sshd import User, needs_sshd, refused

pytestmark = needs_sshd

NOISE = """
echo "Welcome, this machine is busy. shmdist_worker:1#9.9.9.9"
echo "a warning" >&2
printf 'no newline at the end of this'
"""
MEGABYTE = f"{sys.executable} -c \"import sys; sys.stdout.write('banner ' * 150000)\"\n"
FILES = {
    "bash": {".bashrc": NOISE + MEGABYTE, ".bash_profile": "echo never read\n"},
    "dash": {".profile": "echo never read\n"},
    "sh": {".profile": "echo never read\n"},
    "csh": {".cshrc": NOISE.replace(">&2", "") + MEGABYTE, ".login": "echo never read\n"},
    "fish": {".config/fish/config.fish": NOISE + MEGABYTE},
}


@pytest.fixture
def user(tmp_path):
    """Makes users for one test."""
    made = []

    def make(shell, files):
        path = shutil.which(shell) or shell
        made.append(User(f"shmdist-{shell.rpartition('/')[2]}{os.getpid()}", path, files, tmp_path))
        return made[-1]

    yield make
    for each in made:
        each.remove()


@pytest.mark.parametrize("shell", sorted(FILES))
def test_login_shells(sshd, user, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}: apt-get install {shell}")
    text = f"{user(shell, FILES[shell]).name}@127.0.0.1:{sshd.port}"
    params = sshd.params(env={"SPECIAL": "a 'quoted' $HOME `x` \\ ! \"text\"\nof two lines"})
    with within(20), sd.addprocs([text], **params) as (pid,):
        assert sd.remotecall_fetch(os.getenv, pid, "SPECIAL") == params["env"]["SPECIAL"]
        line = sd.remotecall_fetch(command_lines, pid, os.getpid())
        assert "SPECIAL" not in line and sd.cluster_cookie() not in line
        environment = sd.remotecall_fetch(dict, pid, os.environ)
        assert sd.cluster_cookie() not in str(environment)


def command_lines(*_):
    with open("/proc/self/cmdline") as file:
        return file.read()


def test_a_shell_that_ends_by_itself(sshd, user, tmp_path):
    name = user("bash", {".bashrc": "echo 'this account is closed' >&2\nexit 127\n"}).name
    error = refused([f"{name}@127.0.0.1:{sshd.port}"], **sshd.params())
    assert (error.phase, error.exitcode) == ("launch", 127)
    assert error.stderr_tail == ("this account is closed",)
    assert re.match(rf"exec 'env' 'PYTHONHASHSEED=\d+' '{re.escape(sys.executable)}' '-c' ", error.command)
    assert name in error.host


def test_a_login_that_is_none(sshd, user):
    error = refused([f"{user('/usr/sbin/nologin', {}).name}@127.0.0.1:{sshd.port}"], **sshd.params())
    assert error.phase == "launch" and "not available" in str(error)


def test_no_such_interpreter(sshd):
    error = refused([sshd.text], **sshd.params(exename="/no/such/python"))
    assert (error.phase, error.exitcode) == ("launch", 127)
    assert "/no/such/python" in error.command and "exename=" in str(error)
    assert any("/no/such/python" in line for line in error.stderr_tail), error.stderr_tail
    error = refused([sshd.text], **sshd.params(exename="/bin/cat"))
    assert error.phase == "launch" and error.exitcode == 1


def test_an_interpreter_that_never_speaks(sshd, monkeypatch):
    monkeypatch.setenv("SHMDIST_WORKER_TIMEOUT", "1")
    error = refused([sshd.text], **sshd.params(exename=["/bin/sh", "-c", "sleep 1000"], exeflags=()))
    assert error.phase == "launch" and "said nothing within 1 s" in str(error)


def test_another_interpreter_is_found(sshd, monkeypatch, tmp_path):
    """The path of this program's interpreter need not exist there."""
    if shutil.which("python3", path="/usr/bin:/bin:/usr/local/bin") is None:
        pytest.skip("no python3 is on the path of a login shell")
    version = subprocess.run(
        ["/usr/bin/env", "PATH=/usr/bin:/bin:/usr/local/bin", "python3", "-V"], capture_output=True, text=True
    ).stdout.split()[1]
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone" / "python"))
    params = sshd.params(exename=None)
    if version.split(".")[:2] == sys.version.split()[0].split(".")[:2]:
        with sd.addprocs([sshd.text], **params) as (pid,):
            assert sd.remotecall_fetch(sd.myid, pid) == pid
    else:
        assert "functions cannot be sent" in str(refused([sshd.text], **params))


def test_another_version_of_python(sshd, tmp_path):
    """As far as the worker can tell."""
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\nexec {sys.executable} -c \"import sys; sys.version = '3.8.9 (old)'; $2\"\n")
    fake.chmod(0o755)
    error = refused([sshd.text], **sshd.params(exename=str(fake)))
    mine = sys.version.split()[0]
    assert f"Python {mine} on the master, 3.8.9 on " in str(error)
    assert error.phase == "launch" and "exename=" in str(error)


# ---------------------------------------------------------------------- what a worker finds


def test_directory_and_environment(sshd, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SHMDIST_SPECIAL", "passed on")
    monkeypatch.setenv("NOT_PASSED", "x")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    a, b = sshd.text, sshd.text.replace("root@", "")
    params = sshd.params(
        dir={a: tmp_path, b: "/no/such/folder"},
        env={a: {"MINE": "1"}, b: {"MINE": 2}},
        exename={a: sys.executable},
    )
    with sd.addprocs([a, b], **params) as (first, second):
        if sd.remotecall_fetch(os.getenv, first, "MINE") == "2":
            first, second = second, first
        found = [sd.remotecall_fetch(os.getenv, first, name) for name in NAMES]
        assert found == ["1", "passed on", None, "1"]
        assert sd.remotecall_fetch(os.getenv, second, "MINE") == "2"
        assert sd.remotecall_fetch(os.getcwd, first) == str(tmp_path)
        assert sd.remotecall_fetch(os.getcwd, second) == os.path.expanduser("~")
    shown = capsys.readouterr().err
    assert f"From worker {second}:\tshmdist: [Errno 2]" in shown and "working in" in shown
    with pytest.raises(ValueError, match=r"dir names the host 'nobody', which is not among the machines"):
        sd.addprocs([a], **sshd.params(dir={"nobody": "/"}))
    with pytest.raises(TypeError, match=r"no parameter 'tunel'.*tunnel"):
        sd.addprocs([a], tunel=True)


NAMES = ("MINE", "SHMDIST_SPECIAL", "NOT_PASSED", "OMP_NUM_THREADS")


def test_as_many_as_the_machine_has_cpus(sshd):
    from shmdist.managers.base import usable_cpus

    with sd.addprocs([(sshd.text, "auto")], **sshd.params()) as pids:
        assert len(pids) == usable_cpus()


def bare_interpreter(tmp_path):
    """Return an interpreter that finds nothing but the standard library."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    return bare / "bin" / "python"


@pytest.fixture
def hidden(tmp_path, monkeypatch):
    """A worker's interpreter that has no shmdist, and cannot see this one's."""
    python = bare_interpreter(tmp_path)
    from shmdist.managers.ssh import launch

    original = launch.Launching._settings

    def settings(self, machine):
        return {**original(self, machine), "path": [], "root": "/no/such/folder"}

    monkeypatch.setattr(launch.Launching, "_settings", settings)
    return python


def test_the_package_is_sent_where_it_is_missing(sshd, hidden, capsys):
    with within(20), sd.addprocs([(sshd.text, 2)], **sshd.params(exename=hidden)) as pids:
        assert sd.remotecall_fetch(lambda: sd.__file__, pids[0]).startswith("<sent>")
        assert sd.pmap(lambda x: x * x, range(10)) == [x * x for x in range(10)]
        assert sd.remotecall_fetch(lambda: sd.shared.__name__ + sd.myid.__module__, pids[0])
        assert sd.remotecall_fetch(lambda p: sd.remotecall_fetch(sd.myid, p), pids[0], pids[1]) == pids[1]
        with pytest.raises(ZeroDivisionError) as caught:
            sd.remotecall_fetch(lambda: 1 / 0, pids[0])
        assert "1 / 0" in str(caught.value)
    assert "none on" in capsys.readouterr().err, "numpy is missing there, and that is said"


def test_the_package_is_missing_and_not_sent(sshd, hidden):
    error = refused([sshd.text], **sshd.params(exename=hidden, bootstrap=False))
    assert error.phase == "launch" and "shmdist is not installed" in str(error)
    assert f"shmdist {sd.__version__} on the master" in str(error) and "bootstrap=True" in str(error)


# ---------------------------------------------------------------------- output and end


def print_much():
    for number in range(2000):
        print(f"line {number}")
    print("and an error", file=sys.stderr)


@pytest.mark.parametrize("tunnel", [False, True])
def test_output_appears_here(sshd, capsys, tunnel):
    with sd.addprocs([sshd.text], tunnel=tunnel, **sshd.params()) as (pid,):
        sd.remotecall_fetch(print_much, pid)
        shown = errors = ""

        def there():
            nonlocal shown, errors
            out, err = capsys.readouterr()
            shown, errors = shown + out, errors + err
            return "and an error" in errors and "line 1999" in shown

        until(there)
    lines = [line.strip() for line in shown.splitlines()]
    assert [line for line in lines if ":\tline" in line] == [
        f"From worker {pid}:\tline {number}" for number in range(2000)
    ]
    assert errors == f"      From worker {pid}:\tand an error\n"


def exit_with_words(code):
    print("last words", file=sys.stderr, flush=True)
    os._exit(code)


def test_a_worker_that_ends_by_itself(sshd):
    (pid,) = sd.addprocs([sshd.text], **sshd.params())
    ospid = sd.remotecall_fetch(os.getpid, pid)
    with within(5), pytest.raises(sd.ProcessExitedException) as caught:
        sd.remotecall_fetch(exit_with_words, pid, 3)
    assert caught.value.exitcode == 3 and caught.value.ospid == ospid
    assert caught.value.stderr_tail == ("last words",)
    until(lambda: pid not in sd.procs())


def test_a_worker_that_is_killed(sshd):
    pids = sd.addprocs([(sshd.text, 2)], tunnel=True, **sshd.params())
    ospid = sd.remotecall_fetch(os.getpid, pids[0])
    call = sd.remotecall(helpers.sleep_long, pids[0])
    os.kill(ospid, signal.SIGKILL)
    with within(5), pytest.raises(sd.ProcessExitedException):
        call.fetch()
    assert sd.remotecall_fetch(sd.myid, pids[1]) == pids[1]
    sd.rmprocs(pids[1])


@pytest.mark.parametrize("busy", ["idle", "sleep", "hold"])
def test_rmprocs(sshd, busy):
    jobs = {"sleep": helpers.sleep_long, "hold": helpers.hold_the_interpreter}
    (pid,) = sd.addprocs([sshd.text], **sshd.params())
    ospid = sd.remotecall_fetch(os.getpid, pid)
    started = sd.RemoteChannel()
    if busy in jobs:
        call = sd.remotecall(helpers.tell_and_run, pid, started, jobs[busy])
        assert started.take(timeout=5) == ospid
    with within(10):
        sd.rmprocs(pid)
    until(lambda: not helpers.is_alive(ospid))
    if busy in jobs:
        with pytest.raises(sd.ProcessExitedException):
            call.fetch()


MASTER = """
import sys
import shmdist as sd
from tests.integration import helpers

params = {params!r}
pids = sd.addprocs([({text!r}, 3)], **params)
started = sd.RemoteChannel(lambda: sd.Channel(9))
calls = [
    sd.remotecall(helpers.tell_and_run, pid, started, job)
    for pid, job in zip(pids, [helpers.sleep_long, helpers.hold_the_interpreter, helpers.loop_for_ever])
]
print(*[started.take() for _ in pids], flush=True)
{end}
"""


@pytest.mark.parametrize("tunnel", [False, True])
@pytest.mark.parametrize("end", ["kill", "exit", "return"])
def test_nothing_remote_outlives_the_master(sshd, tunnel, end):
    code = {"kill": "sys.stdin.read()", "exit": "sys.exit(3)", "return": "pass"}[end]
    params = sshd.params(tunnel=tunnel)
    script = Script(
        MASTER.format(params=params, text=sshd.text, end=code), stdin="" if end == "kill" else None
    )
    ospids = [int(word) for word in script.line().split()]
    assert len(ospids) == 3, script.process.stderr.read()
    if end == "kill":
        script.process.kill()
        script.process.communicate()
    else:
        script.end().clean(3 if end == "exit" else 0)
    until(lambda: not any(map(helpers.is_alive, ospids)), 5.0, "all remote processes are gone")
    script.process.stdout.close()
    script.process.stderr.close()


def test_a_forked_child_leaves_the_connection_alone(sshd):
    import multiprocessing

    with sd.addprocs([(sshd.text, 2)], tunnel=True, **sshd.params()) as pids:
        child = multiprocessing.get_context("fork").Process(target=child_of_a_master)
        child.start()
        child.join(20)
        assert child.exitcode == 0
        assert [sd.remotecall_fetch(sd.myid, pid) for pid in pids] == list(pids)


def child_of_a_master():
    import gc

    assert sd.nprocs() == 1
    gc.collect()
