"""Finds arrays that one map would send many times, and copies them once."""

from __future__ import annotations

import sys
import threading
from typing import Any

from shmdist.memory.leases import PRIVATE, Lease, LeaseHandle
from shmdist.runtime.block_buffers import address_of
from shmdist.runtime.host_copies import HostCopy
from shmdist.runtime.node import current_node
from shmdist.serialization import arrays
from shmdist.serialization.arrays import LINE, StridedSource, extent


class RepeatedArrays:
    """Arrays that a map sends many times, or many overlapping views of: copied once.

    Parameters
    ----------
    bases : list of ndarray
        Contiguous arrays, which nobody writes to as long as the map runs.
    times : list of int
        Of each, how many times its bytes are going to be sent.
    """

    def __init__(self, bases: list[Any], times: list[int]) -> None:
        self._sharing = current_node().sharing
        self._spans = sorted(
            (base.__array_interface__["data"][0], base.nbytes, index) for index, base in enumerate(bases)
        )
        self._bases = bases
        self._times = times
        self._copies: dict[int, LeaseHandle | None] = {}
        self._far: dict[int, HostCopy] = {}  # copies on other hosts
        self._lock = threading.Lock()  # guards the two above: a base is copied once

    def find(self, source: Any) -> tuple[Lease, Lease] | None:
        """Return the lease of the copy in which a buffer's bytes lie, and one of just these bytes."""
        index, offset = self._locate(source)
        if index < 0:
            return None
        with self._lock:
            if index not in self._copies:
                often = self._times[index] >= 2
                self._copies[index] = self._sharing.copy_for_many(self._raw(index), grow=often)
        hold = self._copies[index]
        if hold is None:
            return None
        lease = hold.lease
        return lease, Lease(lease.segment, lease.serial, lease.offset + offset, len(source), PRIVATE)

    def copy_of(self, source: Any) -> tuple[HostCopy, memoryview, int, int] | None:
        """Return what is known of the base in which a buffer's bytes lie.

        Its copy on other hosts, its bytes, where in them the buffer's begin, and how many times
        they are going to be sent.
        """
        index, offset = self._locate(source)
        if index < 0:
            return None
        with self._lock:
            if index not in self._far:
                self._far[index] = HostCopy(self._sharing.copies)
        return self._far[index], self._raw(index), offset, self._times[index]

    def _locate(self, source: Any) -> tuple[int, int]:
        """Return the base in which a buffer's bytes lie, and where in it; -1 if there is none."""
        if not isinstance(source, StridedSource):
            address = address_of(source)
            for start, nbytes, index in self._spans:
                if start <= address and address + len(source) <= start + nbytes:
                    return index, address - start
        return -1, 0

    def _raw(self, index: int) -> memoryview:
        """Return the bytes of a base."""
        return memoryview(self._bases[index].reshape(-1, order="A").view("B"))


def find_repeated(iterables: tuple[Any, ...]) -> RepeatedArrays | None:
    """Return what is sent of some array more than once when each element of `iterables` goes out.

    Only lists and tuples of arrays are looked through: what a generator yields may be one
    array that it writes to in between.
    """
    numpy = sys.modules.get("numpy")
    if numpy is None or not hasattr(numpy, "ndarray"):
        return None
    bases: dict[int, Any] = {}
    sent: dict[int, int] = {}
    for iterable in iterables:
        if type(iterable) not in (list, tuple) or not iterable or type(iterable[0]) is not numpy.ndarray:
            continue
        for element in iterable:
            if type(element) is numpy.ndarray and element.nbytes >= LINE and element.flags.forc:
                base = _base(element, numpy.ndarray)
                bases[id(base)] = base
                sent[id(base)] = sent.get(id(base), 0) + element.nbytes
    repeated = [
        base for key, base in bases.items() if sent[key] > base.nbytes and base.flags.forc and _is_plain(base)
    ]
    times = [sent[id(base)] // base.nbytes for base in repeated]
    return RepeatedArrays(repeated, times) if repeated else None


def _base(array: Any, ndarray: type) -> Any:
    """Return the array that has the memory of a view."""
    while type(array.base) is ndarray:
        array = array.base
    return array


def _is_plain(base: Any) -> bool:
    """Return whether an array's bytes may be copied as they are, and are not shared ones."""
    find = arrays.find_shared
    return not base.dtype.hasobject and (find is None or find(*extent(base)) is None)
