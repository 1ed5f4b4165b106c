"""The contract suite for cluster managers: good ones pass, and each kind of bad one is found out."""

import contextlib
import os
import subprocess
import sys

import pytest

import shmdist as sd
from shmdist.testing import ContractError, check_manager
from tests.integration import helpers
from tests.integration.sshd import needs_sshd

sys.path.insert(0, str(helpers.ROOT / "examples"))
from own_transport import LineManager

sys.path.pop(0)

ALL = [
    "parameters",
    "joining",
    "secrecy",
    "strangers",
    "calls",
    "interrupting",
    "removal",
    "death",
    "killing",
    "leaks",
]


@pytest.mark.parametrize("restrict", [True, False])
def test_local_manager(restrict):
    assert check_manager(sd.LocalManager(2), restrict=restrict) == ALL


def test_the_example():
    assert check_manager(LineManager(2)) == ALL


def test_one_worker_is_enough():
    assert check_manager(LineManager(1), skip=["killing"]) == [name for name in ALL if name != "killing"]


@needs_sshd
@pytest.mark.parametrize("tunnel", [False, True])
def test_ssh_manager(sshd, tunnel):
    assert check_manager(sd.SSHManager([(sshd.text, 2)]), tunnel=tunnel, **sshd.params()) == ALL


def test_the_example_as_a_program():
    out = (
        helpers.Script(command=[sys.executable, str(helpers.ROOT / "examples" / "own_transport.py")])
        .end()
        .clean()
    )
    assert "workers: [2, 3]" in out and "one worker asks the other: 3" in out


# ---------------------------------------------------------------------- managers that do not keep it


class NoWorkers(LineManager):
    def launch(self, params):
        return iter(())


class OddParameters(LineManager):
    def default_params(self):
        return {"exename": None, "exeflags": (), "topology": "all_to_all", "lazy": True}


class SharedParameters(LineManager):
    _params = sd.LocalManager(1).default_params()

    def default_params(self):
        return self._params


class NoConfigs(LineManager):
    def launch(self, params):
        for config in super().launch(params):
            config.process.kill()
            config.process.wait()
            config.userdata.close()
            yield {"host": "localhost"}


class OneConfig(LineManager):
    def launch(self, params):
        for config in super().launch(params):
            yield config
            yield config
            return


class OneProcess(LineManager):
    """Connects to the first worker, whichever is meant."""

    def launch(self, params):
        [self._first] = super(OneProcess, type(self)(1)).launch(params)
        yield self._first
        yield sd.WorkerConfig(userdata=None)

    def connect(self, id, config):
        return super().connect(id, self._first)


class TellsTheCookie(LineManager):
    def launch(self, params):
        return super().launch({**params, "env": {"MY_COOKIE": params["cookie"]}})


class ConnectsOnce(LineManager):
    def connect(self, id, config):
        if config.sshflags:
            raise ConnectionError("it is connected already")
        config.sshflags = True
        return super().connect(id, config)


class KillsWhatItInterrupts(LineManager):
    def manage(self, id, config, op):
        if op == "interrupt":
            config.process.terminate()
        super().manage(id, config, op)


class Stumbles(LineManager):
    def manage(self, id, config, op):
        super().manage(id, config, op)
        if op == "deregister":
            raise RuntimeError("what now?")


class CannotKill(LineManager):
    processes = []  # noqa: RUF012 - what is left is for the test to reap

    def launch(self, params):
        for config in super().launch(params):
            self.processes.append(config.process)
            yield config

    def kill(self, id, config):
        pass

    def manage(self, id, config, op):
        if op == "finalize":
            with contextlib.suppress(subprocess.TimeoutExpired):
                config.process.wait(2)


class Leaks(LineManager):
    def launch(self, params):
        for config in super().launch(params):
            os.dup(config.userdata.fileno())
            yield config


@pytest.mark.parametrize(
    ("manager", "check", "text"),
    [
        (NoWorkers, "joining", "launch() yielded no worker"),
        (OddParameters, "parameters", "default_params() lacks dir, enable_threaded_blas, env"),
        (SharedParameters, "parameters", "the same dictionary each time"),
        (NoConfigs, "joining", "must yield WorkerConfigs"),
        (OneConfig, "joining", "yielded one WorkerConfig twice"),
        (OneProcess, "joining", "leads to another worker"),
        (TellsTheCookie, "secrecy", "has the cookie on its command line or in its environment"),
        (ConnectsOnce, "strangers", "it is connected already"),
        (KillsWhatItInterrupts, "interrupting", "worker"),
        (Stumbles, "removal", "RuntimeError: what now?"),
        (CannotKill, "killing", "is still there after kill()"),
    ],
)
def test_a_bad_manager_is_found_out(monkeypatch, manager, check, text):
    if manager is CannotKill:
        monkeypatch.setattr("shmdist.testing._SOON_SECONDS", 3.0)
    with pytest.raises(ContractError) as caught:
        check_manager(manager(2))
    assert text in str(caught.value)
    assert str(caught.value).startswith(check)
    for process in CannotKill.processes:  # the suite has killed it where its manager did not
        process.wait(5)
    CannotKill.processes.clear()


def test_a_manager_that_leaks_is_found_out(monkeypatch):
    monkeypatch.setattr("shmdist.testing._SOON_SECONDS", 3.0)
    before = set(os.listdir("/proc/self/fd"))
    try:
        with pytest.raises(ContractError, match=r"leaks: each launch leaves \d+ descriptors"):
            check_manager(Leaks(1), skip=[name for name in ALL if name not in ("leaks",)])
    finally:
        for fd in set(os.listdir("/proc/self/fd")) - before:
            try:
                os.close(int(fd))
            except OSError:
                continue  # that of the listing


def test_an_open_worker_is_found_out(monkeypatch):
    """One whose worker lets anybody in: it runs no handshake of its own."""
    from shmdist.transport import handshake

    class Gullible(LineManager):
        pass

    # To process 1 it looks as if any cookie were the right one.
    real = handshake.Connector._proves
    monkeypatch.setattr(handshake.Connector, "_proves", lambda self, role, mac: True)
    monkeypatch.setattr(
        handshake.Connector,
        "_mac",
        lambda self, role: real and handshake._Machine._mac(_with_cookie(self), role),
    )
    with pytest.raises(ContractError, match="lets in one who does not know the cookie"):
        check_manager(Gullible(1))


def _with_cookie(machine):
    machine._cookie = sd.cluster_cookie().encode()
    return machine


def test_what_is_no_manager():
    with pytest.raises(ContractError, match="is no ClusterManager"):
        check_manager(object())
    with pytest.raises(ValueError, match=r"there are no checks \['kill'\]"):
        check_manager(LineManager(1), skip=["kill"])
