"""Build hook: compiles ``transport/_native.c`` where there is a compiler, and does without elsewhere."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags

NAME = "shmdist/transport/_native"
FLAGS = ("-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter")


class Hook(BuildHookInterface):
    """Adds the compiled module to wheels, and puts it beside its source for an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; on failure the package is one of pure Python."""
        root = Path(self.root)
        target = root / f"{NAME}.abi3.so"  # an older one that stays is not used (transport/native.py)
        why = _compile(root / f"{NAME}.c", target)
        if why:
            self.app.display_warning(f"shmdist: without its part in C, calls take longer: {why}")
            return
        build_data["artifacts"].append(f"/{NAME}.abi3.so")
        build_data["pure_python"] = False
        # What is compiled here asks for this system, and not for the oldest ones (manylinux).
        systems = (tag.platform for tag in sys_tags())
        system = next(name for name in systems if "manylinux" not in name and "musllinux" not in name)
        build_data["tag"] = f"cp311-abi3-{system}"


def _compile(source: Path, target: Path) -> str:
    """Compile a module to the stable ABI; returns why that was not possible."""
    if os.environ.get("SHMDIST_PURE", "") not in ("", "0"):
        return "SHMDIST_PURE is set"
    if os.name != "posix" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "it is not for this Python"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    linking = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    parts = sorted(source.parent.glob("_native*.[ch]"))
    checksum = f"{zlib.crc32(b''.join(part.read_bytes() for part in parts)):08x}"
    command = [
        *compiler,
        *FLAGS,
        *linking,
        f'-DSOURCE="{checksum}"',
        f"-I{sysconfig.get_paths()['include']}",
        *shlex.split(os.environ.get("CFLAGS", "")),
        str(source),
        "-o",
        f"{target}.new",
    ]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(f"{target}.new", target)
    except subprocess.CalledProcessError as error:
        return (error.stderr.strip().splitlines() or [f"{compiler[0]} failed"])[0]
    except OSError as error:
        return str(error)
    return ""
