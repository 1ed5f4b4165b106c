"""The plan of the package, held by reading its source: who may import whom, and other rules of the house."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "shmdist"
SOURCE = Path(__file__).parent.parent / PACKAGE

# From bottom to top.  A unit is a module or a folder right under the package.  It may import units of lower
# floors; modules of one folder may import each other, in no circle.
FLOORS = (
    ("_ending", "_firmly", "_paths", "_rebuilding"),
    ("_tracebacks",),
    ("_exceptions", "_log"),
    ("errors", "_version", "_cancelled", "_parsing", "_timeouts", "_signals"),
    ("refcount",),
    ("memory",),
    ("transport",),
    ("serialization",),
    ("runtime", "managers"),
    ("references",),
    ("scheduling", "membership", "shared"),
    ("processes", "tasks"),
    ("worker", "pools"),
    ("calls",),
    ("cluster", "maps", "loops"),
    ("evaluation",),
    ("adapters",),
    ("_public",),
    ("testing",),
    ("__main__",),
)
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}

# The package itself: it may import all, and of the rest only the command line may import it.
ROOT = "__init__"

LONGEST = 600  # lines of a file: one concept each
PUBLIC_MODULES = {"shared"}  # names in __all__ that are meant to be modules
MAPPING = "memory/mapping.py"
SHARED_MEMORY_MODULES = {"mmap", "_posixshmem", "multiprocessing.shared_memory"}
SHARED_MEMORY_PREFIXES = ("memfd_", "MFD_", "shm_open", "shm_unlink", "posix_fallocate")


@dataclass(frozen=True)
class Import:
    """One import in the source: `target` is a dotted name of a module, or of something in one."""

    line: int
    target: str


@dataclass(frozen=True)
class Module:
    """A file of the package; `name` is dotted and starts with the package's, also for an ``__init__.py``."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def is_package(self):
        return self.path.name == "__init__.py"

    @property
    def unit(self):
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else ROOT


def read_package(source):
    """Return the modules under the folder `source`, by dotted name."""
    modules = {}
    for path in sorted(source.rglob("*.py")):
        parts = (source.name, *path.relative_to(source).with_suffix("").parts)
        name = ".".join(parts[:-1] if path.name == "__init__.py" else parts)
        modules[name] = Module(name, path, ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
    return modules


def imports_of(module):
    """Yield each Import in `module`, wherever in the file it stands, for annotations alone as well."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node.level, node.module)
            for alias in node.names:
                yield Import(node.lineno, base if alias.name == "*" else f"{base}.{alias.name}")
        elif isinstance(node, ast.Call):
            target = dynamic_import(node, module)
            if target is not None:
                yield Import(node.lineno, target)


def absolute(module, level, name):
    """Return the dotted name that ``from <level dots><name>`` means in `module`."""
    if level == 0:
        return name
    parts = module.name.split(".")
    up = level - 1 if module.is_package else level
    base = parts[: len(parts) - up]
    return ".".join([*base, name] if name else base)


def dynamic_import(call, module):
    """Return what ``import_module("...")`` or ``__import__("...")`` imports, None if `call` is neither."""
    function = call.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
    if called not in ("import_module", "__import__") or not call.args:
        return None
    name = call.args[0]
    if not (isinstance(name, ast.Constant) and isinstance(name.value, str)):
        return None
    dots = len(name.value) - len(name.value.lstrip("."))
    return absolute(module, dots, name.value[dots:])


def resolve(target, modules):
    """Return the module of the package that `target` is, or is in; None if it is none of ours."""
    if target.split(".")[0] != PACKAGE:
        return None
    while target not in modules and "." in target:
        target = target.rpartition(".")[0]
    return modules.get(target)


def imports_within(modules):
    """Yield (importer, line, imported) for each import of one module of the package by another."""
    for module in modules.values():
        for found in imports_of(module):
            imported = resolve(found.target, modules)
            if imported is not None and imported is not module:
                yield module, found.line, imported


def allowed(importer, imported):
    """Whether unit `importer` may import from unit `imported`."""
    if importer == ROOT:
        return True
    if imported == ROOT:
        return importer == "__main__"
    return importer == imported or FLOOR_OF[imported] < FLOOR_OF[importer]


def layer_faults(modules):
    """Return a line of text for each breach of the floors."""
    faults = [
        f"{module.path}: the unit {module.unit!r} has no floor: give it one in FLOORS and in the plan"
        for module in modules.values()
        if module.unit != ROOT and module.unit not in FLOOR_OF
    ]
    if faults:
        return faults
    faults = [
        f"{importer.path}:{line}: {importer.name} may not import {imported.name}"
        for importer, line, imported in imports_within(modules)
        if not allowed(importer.unit, imported.unit)
    ]
    graph = {name: set() for name in modules}
    for importer, _, imported in imports_within(modules):
        # Names for annotations alone as well: what must know each other's types is one part.
        graph[importer.name].add(imported.name)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        # graphlib lists each module before the one that imports it.
        faults.append("modules import each other in a circle: " + " -> ".join(reversed(error.args[1])))
    return faults


def length_faults(modules):
    """Return a line of text for each file that is too long."""
    lengths = {m.path: len(m.path.read_text(encoding="utf-8").splitlines()) for m in modules.values()}
    return [f"{path}: {n} lines, more than {LONGEST}" for path, n in lengths.items() if n > LONGEST]


def name_faults(modules, public):
    """Return a line of text for each module that bears a public name."""
    return [
        f"{module.path}: hides, or is hidden by, the public name {last!r}"
        for module in modules.values()
        if (last := module.name.rpartition(".")[2]) in set(public) - PUBLIC_MODULES
    ]


def shared_memory_faults(modules):
    """Return a line of text for each touch of shared memory outside the one file that may."""
    faults = []
    for module in modules.values():
        if module.path.as_posix().endswith(MAPPING):
            continue
        for found in imports_of(module):
            names = {found.target, found.target.rpartition(".")[0]}
            last = found.target.rpartition(".")[2]
            if names & SHARED_MEMORY_MODULES or last.startswith(SHARED_MEMORY_PREFIXES):
                faults.append(f"{module.path}:{found.line}: imports {found.target}; only {MAPPING} may")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith(SHARED_MEMORY_PREFIXES):
                faults.append(f"{module.path}:{node.lineno}: uses {node.attr}; only {MAPPING} may")
    return faults


def report(faults):
    """Fail with `faults`, if there are any."""
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


# --------------------------------------------------------------------------- the package


@pytest.fixture(scope="module")
def package():
    modules = read_package(SOURCE)
    assert PACKAGE in modules, f"no package in {SOURCE}"
    return modules


def test_imports_go_down_only(package):
    report(layer_faults(package))


def test_no_file_is_too_long(package):
    report(length_faults(package))


def test_only_one_file_touches_shared_memory(package):
    report(shared_memory_faults(package))


def test_no_module_bears_a_public_name(package):
    import shmdist

    report(name_faults(package, shmdist.__all__))


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.worker.main"])
def test_start_imports_no_third_party(module):
    # Another process: in this one, other tests have imported everything long ago.
    code = (
        f"import sys, {module}\n"
        "heavy = {'numpy', 'cloudpickle', 'paramiko', 'joblib', 'tqdm'} & set(sys.modules)\n"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SOURCE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------- the tests above can fail

GOOD = {
    "__init__.py": "from .maps import pmap\nfrom .adapters import executor",
    "__main__.py": "import shmdist\nfrom . import cluster",
    "_version.py": "__version__ = '1'",
    "errors.py": "import os.path",
    "memory/__init__.py": "",
    "memory/mapping.py": "import mmap, os\nos.memfd_create",
    "memory/segment.py": "from . import mapping",
    "transport/__init__.py": "from .codec import dumps",
    "transport/messages.py": "from .. import errors",
    "transport/codec.py": "from . import messages\nfrom ..memory import segment\nfrom shmdist.errors import X",
    "runtime/__init__.py": "",
    "runtime/node.py": "from ..transport import codec",
    "managers/__init__.py": "",
    "managers/local.py": "import shmdist.transport.codec",
    "calls.py": "import shmdist.errors",
    "cluster.py": "def f():\n    from .managers import local\n    from .runtime import node",
    "maps.py": "from . import calls as c, errors",
    "loops.py": "import shmdist.errors",
    "adapters/__init__.py": "",
    "adapters/executor.py": "from ..maps import pmap",
}


def tree(folder, changed=()):
    """Return the modules of the made-up package `GOOD`, with the files `changed` or added."""
    for name, text in (GOOD | dict(changed)).items():
        path = folder / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return read_package(folder / PACKAGE)


def test_a_good_tree_has_no_faults(tmp_path):
    modules = tree(tmp_path)
    assert len(modules) == len(GOOD)
    assert layer_faults(modules) == []
    assert length_faults(modules) == []
    assert shared_memory_faults(modules) == []
    assert name_faults(modules, ["pmap", "shared", "addprocs"]) == []


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        (
            "errors.py",
            "from .transport import codec",
            "shmdist.errors may not import shmdist.transport.codec",
        ),
        (
            "errors.py",
            "from .transport.codec import dumps",
            "shmdist.errors may not import shmdist.transport.codec",
        ),
        ("errors.py", "import shmdist.maps as m", "shmdist.errors may not import shmdist.maps"),
        ("errors.py", "from . import _version", "shmdist.errors may not import shmdist._version"),
        ("errors.py", "from . import *", "shmdist.errors may not import shmdist"),
        ("transport/messages.py", "from ..runtime import node", "may not import shmdist.runtime.node"),
        ("transport/messages.py", "from shmdist import runtime", "may not import shmdist.runtime"),
        ("runtime/node.py", "def f():\n    def g():\n        import shmdist.cluster", ":3:"),
        ("runtime/node.py", "import typing as t\nif t.TYPE_CHECKING:\n    from ..maps import pmap", ":3:"),
        ("runtime/node.py", "class A:\n    async def f(self):\n        from ..maps import pmap", ":3:"),
        ("runtime/node.py", "try:\n    from ..managers import local\nexcept ImportError:\n    pass", ":2:"),
        ("managers/local.py", "from ..runtime import node", "may not import shmdist.runtime.node"),
        ("maps.py", "from .loops import loop", "shmdist.maps may not import shmdist.loops"),
        ("loops.py", "from . import pmap", "shmdist.loops may not import shmdist"),
        ("loops.py", "import shmdist", "shmdist.loops may not import shmdist"),
        ("cluster.py", "from importlib import import_module\nimport_module('.maps', __package__)", ":2:"),
        ("cluster.py", "import importlib\nimportlib.import_module('shmdist.maps')", "import shmdist.maps"),
        ("cluster.py", "__import__('shmdist.maps')", "may not import shmdist.maps"),
        ("transport/messages.py", "from . import codec", "circle"),
        ("transport/messages.py", "def f():\n    from .codec import dumps", "circle"),
        (
            "transport/messages.py",
            "import typing\nif typing.TYPE_CHECKING:\n    from .codec import dumps",
            "circle",
        ),
        ("adapters/__init__.py", "from .executor import Executor", None),
        ("elsewhere.py", "", "'elsewhere' has no floor"),
        ("adapters/deep/__init__.py", "import shmdist.maps", None),
    ],
)
def test_a_breach_of_the_floors_is_found(tmp_path, file, text, fault):
    faults = layer_faults(tree(tmp_path, {file: text}))
    if fault is None:
        assert faults == []
    else:  # An import that goes up may close a circle as well, which is a second fault.
        assert any(fault in found for found in faults), faults


def test_a_long_file_is_found(tmp_path):
    assert length_faults(tree(tmp_path, {"maps.py": "x = 1\n" * LONGEST})) == []
    (fault,) = length_faults(tree(tmp_path, {"maps.py": "x = 1\n" * (LONGEST + 1)}))
    assert f"maps.py: {LONGEST + 1} lines" in fault


def test_a_public_name_is_found(tmp_path):
    (fault,) = name_faults(tree(tmp_path, {"runtime/pmap.py": ""}), ["pmap"])
    assert "pmap.py" in fault


@pytest.mark.parametrize(
    "text",
    [
        "import mmap",
        "from mmap import mmap, ACCESS_READ",
        "def f():\n    from multiprocessing import shared_memory",
        "from multiprocessing.shared_memory import SharedMemory",
        "from os import memfd_create",
        "import os\nf = os.memfd_create('x', os.MFD_CLOEXEC)",
        "import os\nos.posix_fallocate(3, 0, 1)",
    ],
)
def test_a_touch_of_shared_memory_is_found(tmp_path, text):
    faults = shared_memory_faults(tree(tmp_path, {"transport/codec.py": text}))
    assert faults
    assert all("codec.py" in fault for fault in faults)


# --------------------------------------------------------------------------- the docs


def undescribed(modules, text):
    """Return the files whose line in the tree of the docs is missing, or is not their first sentence."""
    missing = []
    for module in modules.values():
        if not module.is_package:
            doc = ast.get_docstring(module.tree) or ""
            first = " ".join(doc.split("\n\n")[0].split()).replace("``", "`").replace(":mod:", "").rstrip(".")
            if f"| `{module.path.name}` | {first.replace('|', '/')} |" not in text:
                missing.append(f"{module.name}: {first}")
    return missing


def test_the_docs_describe_each_file():
    text = (SOURCE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = read_package(SOURCE)
    assert undescribed(modules, text) == []
    assert len(undescribed(modules, text.replace("| `reactor.py` |", "| `other.py` |"))) == 1
