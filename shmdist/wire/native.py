"""What is there in C: `module` is ``_native``, or None where Python must do.

It is compiled when shmdist is installed, if there is a compiler then. ``SHMDIST_PURE=1`` leaves it alone.
"""

from __future__ import annotations

import os
from typing import Any


def _find() -> Any:
    if os.environ.get("SHMDIST_PURE", "") not in ("", "0"):
        return None
    try:
        from shmdist.wire import _native  # type: ignore[attr-defined]  # no stubs: what it mirrors is typed
    except ImportError:
        return None
    return _native


module = _find()
