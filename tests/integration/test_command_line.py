"""``python -m shmdist``: a script with workers."""

import sys

import pytest

from shmdist.__main__ import _machines
from tests.integration.helpers import Script

SCRIPT = """
import sys
import helper_of_script
import shmdist as sd

def square(x):
    return x * x

print(__name__, sys.argv[1:], sd.nworkers(), sd.workers())
print(sd.pmap(square, range(4)), sd.pmap(helper_of_script.cube, range(4)))
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "helper_of_script.py").write_text("def cube(x): return x**3\n")
    return str(tmp_path / "script.py")


def run(*arguments):
    return Script(command=[sys.executable, "-m", "shmdist", *arguments]).end()


def test_a_script_with_workers(script):
    out = run("-p", "2", script, "-x", "one").clean()
    assert out.splitlines() == ["__main__ ['-x', 'one'] 2 [2, 3]", "[0, 1, 4, 9] [0, 1, 8, 27]"]


def test_a_script_without(script):
    assert run(script).clean().splitlines()[0] == "__main__ [] 1 [1]"


def test_auto(script):
    assert run("-p", "auto", script).clean().startswith("__main__ [] ")


def test_how_a_script_ends_is_how_the_command_ends(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("raise SystemExit(7)")
    assert run("-p", "1", str(path)).code == 7
    path.write_text("1 / 0")
    ended = run("-p", "1", str(path))
    assert ended.code == 1 and "ZeroDivisionError" in ended.err


@pytest.mark.parametrize("arguments", [[], ["-p", "x", "script.py"], ["-p", "-1", "script.py"], ["--what"]])
def test_a_wrong_use_is_told(arguments):
    ended = run(*arguments)
    assert ended.code == 2 and "usage: python -m shmdist" in ended.err


def test_machine_files(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# hosts\n\none\n 3*user@two:2222 10.0.0.1:9000 # three\nauto*three\n")
    assert _machines(str(path)) == ["one", ("user@two:2222 10.0.0.1:9000", 3), ("three", "auto")]
