"""Arrays through the connection."""

import numpy as np

import shmdist as sd


def size(array):
    return array.nbytes


def bench_argument(compare, pool, workers):
    array = np.ones(64 << 20, dtype=np.uint8)
    pid = workers[0]
    compare(
        "argument of 64 MiB",
        lambda: sd.remotecall_fetch(size, pid, array),
        lambda: pool.apply(size, (array,)),
        peer_name="Pool.apply",
        most=1 / 4,
        rounds=9,
    )
