"""Loads the compiled part: `module` is ``_native``, or None where Python code does its work.

It is compiled when shmdist is installed, if there is a compiler then. ``SHMDIST_PURE=1`` leaves it alone.
In a checkout its source lies beside it and may be newer; then it is not used until shmdist is installed
again.
"""

from __future__ import annotations

import os
import sys
import zlib
from typing import Any

from shmdist._log import Log

_log = Log("native")


def _find() -> Any:
    if os.environ.get("SHMDIST_PURE", "") not in ("", "0") or "t" in sys.abiflags:
        return None
    try:
        from shmdist.transport import _native  # type: ignore[attr-defined]  # no stubs: what it mirrors is typed
    except ImportError:
        return None
    if _checksum(os.path.dirname(__file__)) not in ("", _native.SOURCE):
        _log.warning("%s is older than its source: install shmdist again", _native.__file__)
        return None
    return _native


def _checksum(folder: str) -> str:
    """Return the checksum of the sources in a folder, as ``tools/hatch_build.py`` has it compiled in."""
    sources = b""
    for name in sorted(os.listdir(folder)):
        if name.startswith("_native") and name.endswith((".c", ".h")):
            with open(os.path.join(folder, name), "rb") as file:
                sources += file.read()
    return f"{zlib.crc32(sources):08x}" if sources else ""  # a hash of hashlib's would load OpenSSL


module = _find()
