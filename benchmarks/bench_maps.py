"""Maps and reductions."""

import operator

import shmdist as sd

ELEMENTS = range(10_000)
ITERATIONS = 2_000_000


def nothing(x):
    return x


def bench_pmap(compare, pool, workers):
    compare(
        "pmap of a no-op, 10,000 elements",
        lambda: sd.pmap(nothing, ELEMENTS),
        lambda: pool.map(nothing, ELEMENTS),
        peer_name="Pool.map",
        most=1.0,
        rounds=41,
    )


def bench_pmap_one_by_one(compare, pool, workers):
    compare(
        "the same with batch_size=1",
        lambda: sd.pmap(nothing, ELEMENTS, batch_size=1),
        lambda: pool.map(nothing, ELEMENTS, chunksize=1),
        peer_name="Pool.map(chunksize=1)",
        most=1.0,
        rounds=15,
    )


def body(i):
    return i & 7


def chunk_sum(chunk):
    return sum(body(i) for i in chunk)


def bench_reduction(compare, pool, workers):
    loop = sd.distributed(operator.add)(body)
    halves = [range(ITERATIONS // 2), range(ITERATIONS // 2, ITERATIONS)]
    assert loop(range(ITERATIONS)) == sum(pool.map(chunk_sum, halves))
    compare(
        "@distributed sum, 2,000,000 iterations",
        lambda: loop(range(ITERATIONS)),
        lambda: sum(pool.map(chunk_sum, halves)),
        peer_name="Pool.map, cut by hand",
        most=1.0,
        rounds=15,
    )
