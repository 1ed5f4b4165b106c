"""How much memory there is to be had: the system's, a container's, within a process's own limits."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def address_space() -> int:
    """Return the bytes of address space that this process may still map (``ulimit -v``)."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return 1 << 62
        with open("/proc/self/statm") as file:
            return max(0, limit - int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE"))
    except (ImportError, OSError, ValueError):
        return 1 << 62


def available_memory() -> int:
    """Return how many bytes could be had now: the system's, or less where a cgroup says so."""
    left = 1 << 62
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                left = int(line.split()[1]) << 10
                break
    for limit, used in _group_limits():
        left = min(left, max(0, limit - used))
    return left


def total_memory() -> int:
    """Return the bytes of memory that this process may count on: the host's, or its cgroup's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(limit for limit, _ in _group_limits())])


def _group_limits() -> Iterator[tuple[int, int]]:
    """Yield limit and use, in bytes, of each cgroup above this process that has a limit."""
    try:
        with open("/proc/self/cgroup") as file:
            entries = [line.strip().split(":", 2) for line in file]
    except OSError:
        return
    for _, controllers, path in entries:
        if not controllers:
            root, names = "/sys/fs/cgroup", ("memory.max", "memory.current", "memory.stat", "inactive_file ")
        elif "memory" in controllers.split(","):
            root = "/sys/fs/cgroup/memory"
            names = (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "memory.stat",
                "total_inactive_file ",
            )
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            folder = os.path.join(root, *parts[:depth])
            with contextlib.suppress(OSError, ValueError):
                limit = _number(folder, names[0])
                if limit < 1 << 60:
                    yield limit, _number(folder, names[1]) - _reclaimable(folder, names[2], names[3])


def _number(folder: str, name: str) -> int:
    with open(os.path.join(folder, name)) as file:
        text = file.read().strip()
    return 1 << 62 if text == "max" else int(text)


def _reclaimable(folder: str, name: str, key: str) -> int:
    """Return the bytes of cached files in a cgroup that the system would drop first."""
    with open(os.path.join(folder, name)) as file:
        for line in file:
            if line.startswith(key):
                return int(line.split()[1])
    return 0
