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


WRONG = {
    "": "required: script",
    "-p x SCRIPT": "not 'x'",
    "-p -1 SCRIPT": "not '-1'",
    "-p 2.5 SCRIPT": "not '2.5'",
    "--what": "",
    "-p 1 nofile.py": "script 'nofile.py' cannot be read: No such file",
    "-p 1 FOLDER": "without a __main__.py",
    "--machine-file nohosts SCRIPT": "machine file 'nohosts' cannot be read: No such file",
    "--machine-file FOLDER SCRIPT": "cannot be read: Is a directory",
    "--machine-file BAD SCRIPT": "line 2 of the machine file",
    "worker now": "worker takes no arguments, not now",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_use_is_told(arguments, script, tmp_path):
    (tmp_path / "hosts").write_text("one\nx*two\n")
    places = {"SCRIPT": script, "FOLDER": str(tmp_path), "BAD": str(tmp_path / "hosts")}
    ended = run(*(places.get(word, word) for word in arguments.split()))
    assert ended.code == 2 and "usage: python -m shmdist" in ended.err and WRONG[arguments] in ended.err
    assert "Traceback" not in ended.err


SEES = """
import sys
print(__name__, __file__, __doc__, __spec__, __package__, sys.path[0], sys.argv[0], sys.argv[1:], type(__loader__))
print(sorted(name for name in globals() if name != "__annotations__"), sys.modules["__main__"].sys is sys)

def outer():
    inner()

def inner():
    %s

outer()
"""


@pytest.mark.parametrize(
    "end", ["pass", "1 / 0", "sys.exit(3)", "sys.exit('text')", "raise KeyboardInterrupt"]
)
def test_a_script_sees_what_it_would_under_python(tmp_path, end):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "script.py").write_text(SEES % end)
    link = tmp_path / "link.py"
    link.symlink_to(tmp_path / "folder" / "script.py")
    plain = Script(command=[sys.executable, str(link), "-p", "2"]).end()
    ours = run(str(link), "-p", "2")
    assert (ours.code, ours.out, ours.err) == (plain.code, plain.out, plain.err)


def test_what_is_wrong_with_a_scripts_syntax(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("a b c")
    plain, ours = Script(command=[sys.executable, str(path)]).end(), run("-p", "1", str(path))
    assert (ours.code, ours.err) == (plain.code, plain.err)


def test_a_folder_with_a_main(tmp_path):
    (tmp_path / "__main__.py").write_text("import helper, sys; print(__name__, helper.x, sys.argv[1:])")
    (tmp_path / "helper.py").write_text("x = 5")
    assert run(str(tmp_path), "a").clean() == "__main__ 5 ['a']\n"


def test_an_excepthook_of_the_script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(
        "import sys\ndef hook(kind, error, tb): print('mine', tb.tb_frame.f_code.co_name)\n"
        "sys.excepthook = hook\nraise ValueError"
    )
    ended = run(str(path))
    assert (ended.code, ended.out, ended.err) == (1, "mine <module>\n", "")


# ---------------------------------------------------------------------- what help() tells


def test_the_tour():
    import doctest
    import pydoc

    import shmdist

    assert sorted(dir(shmdist)) == sorted(shmdist.__all__)
    lines = pydoc.plain(pydoc.render_doc(shmdist)).splitlines()
    assert "tour by theme" in "\n".join(lines[:10])
    themes = ["Processes", "Calls", "Futures", "Pools", "Local", "Arrays", "Errors", "Managers", "Examples"]
    places = [next(n for n, line in enumerate(lines) if line.strip().startswith(theme)) for theme in themes]
    assert places == sorted(places)
    finder = doctest.DocTestFinder(recurse=False)
    source = "".join(f"{e.source}" for [test] in [finder.find(shmdist)] for e in test.examples)
    assert Script(source).end().clean() == "2.0 [0, 1, 4, 9, 16] 5050\n"


def test_a_workers_names(cluster):
    assert shmdist_names() == shmdist_names(cluster[0])


def shmdist_names(pid=1):
    import shmdist as sd

    return sd.remotecall_fetch(lambda: sorted(dir(sd)), pid)


def test_machine_files(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# hosts\n\none\n 3*user@two:2222 10.0.0.1:9000 # three\nauto*three\n")
    assert _machines(str(path)) == ["one", ("user@two:2222 10.0.0.1:9000", 3), ("three", "auto")]
