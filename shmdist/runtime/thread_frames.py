"""The frames of other threads, for those who look where a thread is.

Python 3.11 makes the object for a frame when it is asked for. To allocate it may run the collector there,
whose finalizers may let the other thread go on; the frame is gone then, and the process crashes when the
object is used. So the collector is off meanwhile. Later Pythons run it between two bytecodes alone.
"""

from __future__ import annotations

import gc
import sys
from types import FrameType

_COLLECTS_ANYWHERE = sys.version_info < (3, 12)


def frames_of_all() -> dict[int, list[FrameType]]:
    """Return the frames of each thread by its identifier, innermost first."""
    enabled = _COLLECTS_ANYWHERE and gc.isenabled()
    try:
        if enabled:
            gc.disable()
        return {ident: outwards(frame) for ident, frame in sys._current_frames().items()}
    finally:
        if enabled:
            gc.enable()


def frames_of(ident: int) -> list[FrameType]:
    """Return the frames of a thread, innermost first; none when it has ended."""
    enabled = _COLLECTS_ANYWHERE and gc.isenabled()
    try:
        if enabled:
            gc.disable()
        return outwards(sys._current_frames().get(ident))
    finally:
        if enabled:
            gc.enable()


def outwards(frame: FrameType | None) -> list[FrameType]:
    """Return a frame of the calling thread and those that it was called from."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


__all__ = ["frames_of", "frames_of_all", "outwards"]
