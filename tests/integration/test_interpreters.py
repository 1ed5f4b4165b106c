"""Programs whose sys.executable is no Python interpreter: frozen ones, and such as have Python built in."""

import sys

import pytest

import shmdist as sd
from tests.integration.helpers import ROOT, Script

PYTHON = sys.executable


def test_a_frozen_program_must_name_an_interpreter(monkeypatch, fresh):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", "/opt/app/app")
    before = sd.procs()
    with pytest.raises(sd.LaunchWorkerError, match=r"frozen.*/opt/app/app.*exename="):
        sd.addprocs(2)
    assert sd.procs() == before
    [pid] = fresh(1, exename=PYTHON)
    assert sd.remotecall_fetch(lambda: 2 + len(sys.argv), pid) == 3


def test_no_executable_at_all(monkeypatch, fresh):
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(sd.LaunchWorkerError, match="exename="):
        sd.addprocs(2)
    [pid] = fresh(1, exename=PYTHON)
    assert sd.remotecall_fetch(abs, pid, -1) == 1


@pytest.mark.parametrize("program", ["/bin/true", "/bin/false", "/bin/echo"])
def test_another_program(monkeypatch, program):
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(sd.LaunchWorkerError, match=f"is {program} a Python interpreter.*exename="):
        sd.addprocs(2)


APP = f"""#!/bin/sh
echo once more >> "$0.log"
exec {PYTHON} "$0.py" "$0"
"""
PROGRAM = """
import sys, shmdist as sd
sys.executable = sys.argv[1]
try:
    sd.addprocs(2)
except sd.LaunchWorkerError as error:
    print(error, file=sys.stderr)
    sys.exit(9)
"""


def test_a_program_with_python_built_in_does_not_start_itself_for_ever(tmp_path):
    """Each of the two workers would be the program, and start two."""
    app = tmp_path / "app"
    app.write_text(APP)
    app.chmod(0o755)
    (tmp_path / "app.py").write_text(PROGRAM)
    ended = Script(command=[str(app)], env={"PYTHONPATH": str(ROOT)}).end()
    assert ended.code == 9, ended
    assert f"is {app} a Python interpreter" in ended.err, ended
    assert "in place of a Python interpreter" in ended.err, ended
    assert len((tmp_path / "app.log").read_text().splitlines()) == 3


def test_a_workers_own_programs_may_have_workers(cluster):
    def run():
        import subprocess

        source = "import shmdist as sd; [p] = sd.addprocs(1); print(sd.remotecall_fetch(abs, p, -5))"
        return subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
        ).stdout

    assert sd.remotecall_fetch(run, cluster[0]) == "5\n"
