"""What is there in C: `slots` is the module ``_slots``, or None where Python must do.

It is compiled when shmdist is installed, if there is a compiler then. ``SHMDIST_PURE=1`` leaves it alone.
"""

from __future__ import annotations

import os
from typing import Any


def _find() -> Any:
    if os.environ.get("SHMDIST_PURE", "") not in ("", "0"):
        return None
    try:
        from shmdist.wire import _slots  # type: ignore[attr-defined]  # there are no stubs; wire.slots is typed
    except ImportError:
        return None
    return _slots


slots = _find()
