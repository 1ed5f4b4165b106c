"""How much memory there is: the limits of the system, of a container and of the process."""

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


def out_of_memory_kills() -> int:
    """Return how often the system has ended a process of this cgroup for lack of memory.

    Where that is not counted, as in the root of all cgroups, how often it has ended any process.
    """
    counters = ["/proc/vmstat"]
    for version, folder in control_groups("memory"):
        counters.append(os.path.join(folder, "memory.events" if version == 2 else "memory.oom_control"))
    for path in reversed(counters):  # the innermost group that is seen here
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            for line in file:
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def _group_limits() -> Iterator[tuple[int, int]]:
    """Yield limit and use, in bytes, of each cgroup above this process that has a limit."""
    for version, folder in control_groups("memory"):
        limit_name, used_name, cached = _FILES[version]
        with contextlib.suppress(OSError, ValueError):
            limit = _number(folder, limit_name)
            if limit < 1 << 60:
                yield limit, _number(folder, used_name) - _reclaimable(folder, "memory.stat", cached)


#: By the version of cgroups: the files of a limit and of what is used, and the line for cached files.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
    2: ("memory.max", "memory.current", "inactive_file "),
}


def control_groups(controller: str) -> Iterator[tuple[int, str]]:
    """Yield version and folder of each cgroup that may limit this process, the outermost first.

    Not all need be in sight: a container may be told its path on the host, and see only itself,
    as the root.
    """
    try:
        with open("/proc/self/cgroup") as file:
            entries = [line.strip().split(":", 2) for line in file]
    except OSError:
        return
    for _, controllers, path in entries:
        if not controllers:
            version, root = 2, "/sys/fs/cgroup"
        elif controller in controllers.split(","):
            version, root = 1, f"/sys/fs/cgroup/{controller}"
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            yield version, os.path.join(root, *parts[:depth])


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
