"""How well do nearest neighbours read handwriting, and how sure is that?

1,797 images of handwritten digits are each named by a vote among the k images most like them, the image
itself left out.  Four measures of likeness and k from 1 to 20 are tried (``pmap`` over blocks of images).
A bootstrap then says how far the error of the best choice may be trusted (an ``@distributed`` loop).

The same is computed by numpy alone in this process and by ``multiprocessing.Pool``.  All arithmetic is on
integers, so the answers must be equal to the last digit; the script ends with exit code 1 if they are not.

Run it with ``python examples/digits.py``.
"""

import functools
import multiprocessing
import operator
import sys
import time
from pathlib import Path

import numpy as np

import shmdist as sd

WORKERS = 2
POWERS = (1, 2, 3, 4)  # Of the Minkowski distance: 1 is Manhattan's, 2 is Euclid's.
LARGEST_K = 20
BLOCK = 20  # Images per call: enough to be worth a call, few enough that the differences stay in the cache.
RESAMPLES = 20_000
SEED = 1998


def load():
    """Return the images, int16 of shape (1797, 64), and the digits they show, int64 of shape (1797,)."""
    table = np.loadtxt(Path(__file__).parent / "data" / "digits.csv.gz", delimiter=",", dtype=np.int16)
    return np.ascontiguousarray(table[:, :64]), table[:, 64].astype(np.int64)


def misread(images, labels, rows):
    """Tell which of the images in `rows` are misread: bool of shape (len(rows), len(POWERS), LARGEST_K)."""
    wrong = np.empty((len(rows), len(POWERS), LARGEST_K), dtype=bool)
    difference = np.abs(images[rows, None] - images).astype(np.int32)
    powered = difference
    for which, power in enumerate(POWERS):
        if power > 1:
            powered = powered * difference
        distance = powered.sum(axis=2, dtype=np.int64)
        # Leave the image itself out: it would be its own nearest neighbour.
        distance[np.arange(len(rows)), rows] = np.iinfo(np.int64).max
        # A stable sort, so that of two images equally near the first in the file counts first.
        nearest = labels[np.argsort(distance, axis=1, kind="stable")[:, :LARGEST_K]]
        # votes[i, k, d]: how many of the k + 1 nearest of image i show d.  A tie goes to the smaller d.
        votes = (nearest[:, :, None] == np.arange(10)).cumsum(axis=1)
        wrong[:, which] = votes.argmax(axis=2) != labels[rows, None]
    return wrong


def resample(wrong, i):
    """Count the misread images in the i-th bootstrap sample of `wrong`, bool of shape (images,)."""
    # Its own generator for each i: the answer does not depend on which process computes which i.
    rng = np.random.default_rng([SEED, i])
    return int(np.count_nonzero(wrong[rng.integers(len(wrong), size=len(wrong))]))


def best_of(wrong):
    """Return (index of the power, index of k) with the fewest misread images; on a tie the first."""
    errors = wrong.sum(axis=0)
    return np.unravel_index(errors.argmin(), errors.shape)


def with_numpy(images, labels, clock):
    """Compute both answers in this process."""
    blocks = np.array_split(np.arange(len(images)), len(images) // BLOCK)
    wrong = np.concatenate([misread(images, labels, rows) for rows in blocks])
    clock("neighbours")
    column = wrong[(slice(None), *best_of(wrong))]
    counts = np.bincount([resample(column, i) for i in range(RESAMPLES)], minlength=len(images) + 1)
    clock("bootstrap")
    return wrong, counts


def with_pool(images, labels, clock):
    """Compute both answers with multiprocessing.Pool."""
    blocks = np.array_split(np.arange(len(images)), len(images) // BLOCK)
    with multiprocessing.Pool(WORKERS) as pool:
        clock("start")
        wrong = np.concatenate(pool.map(functools.partial(misread, images, labels), blocks))
        clock("neighbours")
        column = wrong[(slice(None), *best_of(wrong))]
        counts = pool.map(functools.partial(resample, column), range(RESAMPLES))
        counts = np.bincount(counts, minlength=len(images) + 1)
        clock("bootstrap")
    return wrong, counts


def with_shmdist(images, labels, clock):
    """Compute both answers with shmdist."""
    blocks = np.array_split(np.arange(len(images)), len(images) // BLOCK)
    with sd.addprocs(WORKERS):
        clock("start")
        # The lambda, and the arrays it closes over, go to each worker once.
        wrong = np.concatenate(sd.pmap(lambda rows: misread(images, labels, rows), blocks))
        clock("neighbours")
        column = wrong[(slice(None), *best_of(wrong))]

        @sd.distributed(operator.add)
        def histogram(i):
            one = np.zeros(len(column) + 1, dtype=np.int64)
            one[resample(column, i)] = 1
            return one

        counts = histogram(range(RESAMPLES))
        clock("bootstrap")
    return wrong, counts


def interval(counts, level=0.95):
    """Return the bounds that hold the middle `level` of the counted values."""
    share = np.cumsum(counts) / counts.sum()
    tail = (1 - level) / 2
    return int(np.searchsorted(share, tail)), int(np.searchsorted(share, 1 - tail))


def timed(compute, images, labels):
    """Return what `compute` returns, and the seconds of each of its steps."""
    seconds = {}
    last = time.perf_counter()

    def clock(step):
        nonlocal last
        now = time.perf_counter()
        seconds[step] = now - last
        last = now

    return compute(images, labels, clock), seconds


def report(images, wrong, counts):
    """Print the answers."""
    errors = wrong.sum(axis=0)
    print(f"{len(images)} handwritten digits, each named by its nearest neighbours among the others\n")
    print("misread, in per cent       " + "".join(f"{k:>7}" for k in ("k = 1", 3, 5, 10, 20)))
    for power, row in zip(POWERS, errors, strict=True):
        shown = "".join(f"{100 * row[k - 1] / len(images):7.2f}" for k in (1, 3, 5, 10, 20))
        print(f"  Minkowski distance, p = {power}{shown}")
    which, k = best_of(wrong)
    low, high = (100 * bound / len(images) for bound in interval(counts))
    print(
        f"\nbest: p = {POWERS[which]}, k = {k + 1}, {errors[which, k]} misread, "
        f"{100 * errors[which, k] / len(images):.2f} %; "
        f"95 % of {RESAMPLES:,} bootstrap samples lie in {low:.2f} to {high:.2f} %\n"
    )


def main():
    """Compute everything three times, print it, and return the exit code."""
    images, labels = load()
    answers, times = {}, {}
    # The pool comes before shmdist: by default it forks this process on many systems, and does that best
    # while there is one thread.
    for name, compute in {
        "numpy, one process": with_numpy,
        f"multiprocessing.Pool({WORKERS})": with_pool,
        f"shmdist, {WORKERS} workers": with_shmdist,
    }.items():
        answers[name], times[name] = timed(compute, images, labels)
    alone = answers["numpy, one process"]
    report(images, *alone)

    print(f"{'seconds':<24}{'start':>8}{'neighbours':>12}{'bootstrap':>11}{'all':>8}   against numpy alone")
    all_equal = True
    for name, answer in answers.items():
        equal = all(np.array_equal(mine, theirs) for mine, theirs in zip(answer, alone, strict=True))
        all_equal &= equal
        steps = times[name]
        start = f"{steps['start']:8.2f}" if "start" in steps else f"{'':8}"
        verdict = "" if answer is alone else "equal" if equal else "DIFFERENT"
        line = f"{name:<24}{start}{steps['neighbours']:12.2f}{steps['bootstrap']:11.2f}"
        print(f"{line}{sum(steps.values()):8.2f}   {verdict}".rstrip())
    return 0 if all_equal else 1


# multiprocessing needs this guard: where it spawns its workers, each of them imports this file again.
# A script that uses shmdist alone needs none.
if __name__ == "__main__":
    sys.exit(main())
