"""From where shmdist can be used: no guard is needed anywhere, and functions of `__main__` just work."""

import sys

import pytest

from tests.integration.helpers import Script

PROGRAM = """
import shmdist as sd

factor = 3

class Box:
    def __init__(self, value):
        self.value = value
    def __eq__(self, other):
        return type(other) is Box and other.value == self.value

def scale(box):
    return Box(box.value * factor)

def fact(n):
    return 1 if n < 2 else n * fact(n - 1)

pids = sd.addprocs(2)
assert sd.remotecall_fetch(scale, pids[0], Box(2)) == Box(6)
assert sd.remotecall_fetch(lambda: [fact(5), sd.myid()], pids[1]) == [120, pids[1]]
assert type(sd.remotecall(scale, pids[0], Box(1)).fetch()) is Box
factor = 4
assert sd.remotecall_fetch(scale, pids[0], Box(2)) == Box(8), "a changed global is sent again"
def fact(n):
    return -n
assert sd.remotecall_fetch(fact, pids[0], 5) == -5
print("done", sd.nworkers())
"""


def test_all_ways_to_run_a_program(tmp_path):
    """One after the other costs most of the time in starting Python; so they run side by side."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(PROGRAM)
    python = sys.executable
    scripts = {
        "script": Script(command=[python, str(path)]),
        "-c": Script(PROGRAM),
        "stdin": Script(command=[python, "-"], stdin=PROGRAM),
        "module": Script(command=[python, "-m", "package"], cwd=tmp_path),
        "folder": Script(command=[python, str(tmp_path / "package")]),
        "isolated working directory": Script(
            command=[python, "-W", "error", "-X", "dev", str(path)], cwd="/"
        ),
        "optimized": Script(command=[python, "-O", str(path)]),
    }
    for name, script in scripts.items():
        assert script.end(40).clean() == "done 2\n", name


def test_interactive():
    """`python -i` on a pipe: each statement is compiled by itself, as at the prompt."""
    source = PROGRAM.replace("\n    def __eq__", "\n    def __eq__").replace("\n\n", "\n")
    lines = []
    for line in source.splitlines():
        if lines and lines[-1].startswith(" ") and not line.startswith(" "):
            lines.append("")
        lines.append(line)
    ended = Script(command=[sys.executable, "-i", "-q"], stdin="\n".join(lines) + "\n").end()
    assert ended.code == 0 and "done 2" in ended.out, ended
    assert "Error" not in ended.err and "Traceback" not in ended.err, ended


_CLIENT = """
import sys, nbformat, nbclient
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, timeout=30, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[1])
"""


def test_notebook(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = [
        "import shmdist as sd\npids = sd.addprocs(1)",
        "class Box:\n    value = 5\ndef f(box):\n    print('printed there')\n    return box.value + 1",
        "sd.remotecall_fetch(f, pids[0], Box())",
        "def f(box):\n    return 'defined again'",
        "sd.remotecall_fetch(f, pids[0], Box())",
        "def g(x):\n    return 1 / x  # in a cell\nsd.remotecall_fetch(g, pids[0], 0)",
        "async def g():\n    return await sd.remotecall(pow, pids[0], 2, 5)\nawait g()",
        "sd.rmprocs(*pids)\nsd.nprocs()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.cells[5].metadata["tags"] = ["raises-exception"]
    path = tmp_path / "notebook.ipynb"
    nbformat.write(notebook, path)
    # In a process of its own: the client keeps sockets of its own open, which would look like ours.
    client = [sys.executable, "-W", "ignore", "-c", _CLIENT, str(path)]
    assert Script(command=client).end(timeout=60).code == 0
    notebook = nbformat.read(path, 4)
    results = [
        "".join(o.get("data", {}).get("text/plain", "") for o in cell.outputs) for cell in notebook.cells
    ]
    assert (results[2], results[4], results[6], results[7]) == ("6", "'defined again'", "32", "1")
    assert "printed there" in "".join(o.get("text", "") for o in notebook.cells[2].outputs)
    error = notebook.cells[5].outputs[0]
    assert "ZeroDivisionError" in error["ename"]
    assert "return 1 / x  # in a cell" in error["evalue"], "the worker has no such file"


def test_the_workers_find_what_the_program_finds(tmp_path):
    (tmp_path / "beside_it.py").write_text("def here():\n    import os\n    return __file__, os.getcwd()\n")
    path = tmp_path / "program.py"
    path.write_text(
        "import sys, os, shmdist as sd, beside_it\n"
        "[pid] = sd.addprocs(1)\n"
        "assert sd.remotecall_fetch(beside_it.here, pid) == beside_it.here()\n"
        "assert sd.remotecall_fetch(lambda: __import__('sys').path, pid) == [p or os.getcwd() for p in sys.path]\n"
        "assert sd.remotecall_fetch(os.getenv, pid, 'PYTHONPATH') == os.environ.get('PYTHONPATH')\n"
        "assert sd.remotecall_fetch(lambda: __import__('sys').argv, pid) == ['']\n"
        "assert sd.remotecall_fetch(lambda: __import__('sys').stdin.read(), pid) == ''\n"
        "assert sd.remotecall_fetch(lambda: __import__('__main__').__name__, pid) == '__main__'\n"
    )
    Script(command=[sys.executable, str(path)], cwd=tmp_path).end().clean()


def test_warnings_as_errors_and_threads_do_no_harm():
    Script(
        command=[
            sys.executable,
            "-W",
            "error",
            "-X",
            "dev",
            "-c",
            """
import threading, shmdist as sd
stop = threading.Event()
threads = [threading.Thread(target=stop.wait) for _ in range(10)]
for t in threads: t.start()
with sd.addprocs(2) as pids:
    assert sd.remotecall_fetch(abs, pids[0], -1) == 1
stop.set()
""",
        ]
    ).end().clean()


def test_numpy_is_not_imported_by_workers_that_need_none():
    Script(
        """
import sys, shmdist as sd
[pid] = sd.addprocs(1)
assert "paramiko" not in sys.modules
loaded = sd.remotecall_fetch(lambda: [m for m in ("numpy", "paramiko", "asyncio", "cloudpickle") if m in __import__("sys").modules], pid)
assert not {"numpy", "paramiko"} & set(loaded), loaded
"""
    ).end().clean()
