"""The part in C: compiled where that is possible, and done without where it is not."""

import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "hatch_build.py"
SOURCE = Path(__file__).parents[2] / "shmdist" / "transport" / "_native.c"


@pytest.fixture
def hook(monkeypatch):
    """The build hook, which needs of its builder only the class to derive from."""
    names = ["hatchling", "builders", "hooks", "plugin", "interface"]
    for end in range(1, len(names) + 1):
        monkeypatch.setitem(sys.modules, ".".join(names[:end]), types.ModuleType(names[end - 1]))
    sys.modules[".".join(names)].BuildHookInterface = object
    spec = importlib.util.spec_from_file_location("hatch_build", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("SHMDIST_PURE", raising=False)
    return module


@pytest.fixture
def build(hook, tmp_path):
    """Build in a copy of the sources; returns what the builder is told, and the warnings."""
    folder = tmp_path / "shmdist" / "transport"
    folder.mkdir(parents=True)
    for path in SOURCE.parent.glob("_native*.[ch]"):
        (folder / path.name).write_bytes(path.read_bytes())

    def run():
        builder, warnings = hook.Hook(), []
        builder.root = str(tmp_path)
        builder.app = types.SimpleNamespace(display_warning=warnings.append)
        data = {"artifacts": [], "pure_python": True}
        builder.initialize("standard", data)
        return data, warnings, sorted(path.name for path in folder.iterdir() if ".so" in path.name)

    return run


def test_it_is_compiled(build):
    data, warnings, files = build()
    if warnings:
        pytest.skip(f"there is no compiler: {warnings}")
    assert files == ["_native.abi3.so"]
    assert data["artifacts"] == ["/shmdist/transport/_native.abi3.so"]
    assert not data["pure_python"]
    assert data["tag"].startswith("cp311-abi3-")


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("CC", "/there/is/no/compiler", "No such file"),
        ("CC", "false", "false failed"),
        ("CFLAGS", "-DSLOTS=)", "error"),
        ("SHMDIST_PURE", "1", "SHMDIST_PURE"),
    ],
)
def test_without_a_compiler_it_is_pure(build, monkeypatch, variable, value, why):
    monkeypatch.setenv(variable, value)
    data, (warning,), files = build()
    assert why in warning
    assert files == []
    assert data == {"artifacts": [], "pure_python": True}


def test_an_older_one_is_not_used(monkeypatch, tmp_path, caplog):
    from shmdist.transport import native

    if native.module is None:
        pytest.skip("there is none")
    for path in SOURCE.parent.glob("_native*.[ch]"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native._find() is native.module
    with open(tmp_path / SOURCE.name, "a") as source:
        source.write("/* newer */")
    assert native._find() is None
    assert "older than its source" in caplog.text
    for path in tmp_path.iterdir():
        path.unlink()  # as where a wheel was installed
    assert native._find() is native.module


@pytest.mark.parametrize(("value", "wanted"), [("", True), ("0", True), ("1", False)])
def test_it_can_be_left_alone(monkeypatch, value, wanted):
    from shmdist.transport import native

    monkeypatch.setenv("SHMDIST_PURE", value)
    program = "from shmdist.transport import native; print(native.module is not None)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(wanted and native.module is not None)


def test_no_macro_returns_an_object_without_its_reference():
    # Py_RETURN_NONE and the like do so in the headers of 3.12 and later; built there, it would abort 3.11.
    for path in SOURCE.parent.glob("_native*.[ch]"):
        assert "Py_RETURN_" not in path.read_text().split("*/", 1)[1], path.name
