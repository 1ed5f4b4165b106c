"""``@distributed`` loops and reductions: the range is cut into chunks, one worker each."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import BuiltinFunctionType
from typing import Any

from shmdist._parsing import parsing
from shmdist.errors import SerializationError, capture, local_exception
from shmdist.pools import as_pool, workers_of
from shmdist.runtime.interrupts import current, is_interrupt
from shmdist.runtime.node import Node, current_node
from shmdist.runtime.replies import PendingReply, pack_error, unpack_error
from shmdist.runtime.ring_exchange import BatchedWakeups
from shmdist.runtime.waiting import Waiter
from shmdist.scheduling.batch import BatchRunner
from shmdist.scheduling.batch_sizing import positive_integer
from shmdist.scheduling.element_errors import name_element, name_in_chunk, note_offset
from shmdist.scheduling.engine import MapRun
from shmdist.scheduling.function_broadcast import BroadcastFunction
from shmdist.scheduling.inputs import as_of_now, is_array, is_sequence
from shmdist.scheduling.local_thread import run_on_thread
from shmdist.serialization import codec
from shmdist.serialization.local_copy import local_copy, unshared
from shmdist.serialization.pickled_functions import goes_by_name, kept
from shmdist.tasks import async_
from shmdist.transport.messages import BY_ID, IS_ERROR, NO_LANE, WANT_VALUE, Kind


class _None:
    """Stands for a value that was not given."""

    def __repr__(self) -> str:
        return "<no value>"

    def __reduce__(self) -> str:
        return "_NONE"  # the same one in every process


_NONE: Any = _None()


def splitrange(first: int, last: int, np: int) -> list[range]:
    """Cut the integers from `first` to `last`, both included, into at most `np` ranges.

    Their sizes differ by at most one, the larger ones first; empty ones are left out.

    Parameters
    ----------
    first, last : int
        Bounds, both included.
    np : int
        Number of parts.

    Returns
    -------
    list of range

    References
    ----------
    Julia's Distributed, `splitrange`.

    Examples
    --------
    >>> splitrange(1, 10, 3)
    [range(1, 5), range(5, 8), range(8, 11)]
    """
    if np < 1:
        raise ValueError(f"splitrange() needs at least one part, not {np!r}")
    count = max(0, last - first + 1)
    size, larger = divmod(count, np)
    parts = []
    start = first
    for part in range(min(np, count)):
        stop = start + size + (part < larger)
        parts.append(range(start, stop))
        start = stop
    return parts


class _Chunk:
    """What a worker does with a chunk.

    A reducer may change its first argument (``operator.iadd``). That is what the body returned, which on
    this process may be an object of the program or a part of the input, and anywhere a part of a shared
    array. So a partial result that is made `here`, or that is shared, begins with a copy.
    """

    def __init__(
        self,
        body: Callable[[Any], Any],
        reducer: Callable[[Any, Any], Any] | None,
        vectorized: bool,
        here: bool = False,
    ) -> None:
        self.body = body
        self.reducer = reducer
        self.vectorized = vectorized
        self._copy: Callable[[Any], Any] | None = None  # what makes a value the reducer's own
        if reducer is not None and not _leaves_arguments(reducer):
            self._copy = _unshared_copy if here else unshared

    def __reduce__(self) -> Any:
        body, reducer = self.body, self.reducer
        if reducer is None or goes_by_name(reducer):  # else they may share what the program has
            body = kept(body) or body  # type: ignore[assignment]  # it pickles as one
        return _Chunk, (body, reducer, self.vectorized)

    def _named_parts(self) -> Iterator[tuple[str, Any]]:
        yield "the function", self.body
        yield "the reducer", self.reducer

    def __call__(self, chunk: Any) -> Any:
        """Run the body over a chunk; returns the chunk's partial result."""
        if self.vectorized:
            value = self.body(chunk)
            if self.reducer is None:
                return None
            return value if self._copy is None else self._copy(value)
        elements = iter(chunk)
        try:
            if self.reducer is not None:
                return _fold(self.reducer, self.body, elements, self._copy)
            body = self.body
            for element in elements:
                body(element)
        except Exception as error:
            note_offset(error, chunk, elements)
            raise
        return None


#: Reducers that are known to change no argument; the rest of them is numpy's universal functions.
_PURE = frozenset({min, max, operator.mul, operator.and_, operator.or_, operator.xor, operator.concat})


def _leaves_arguments(reducer: Any) -> bool:
    """Return whether a reducer is known to change neither argument."""
    if reducer is operator.add or type(reducer).__name__ == "ufunc":
        return True
    return type(reducer) is BuiltinFunctionType and reducer in _PURE


def _unshared_copy(value: Any) -> Any:
    return local_copy(value, share=False)


def _fold(
    reducer: Callable[[Any, Any], Any],
    body: Callable[[Any], Any],
    elements: Iterator[Any],
    copy: Callable[[Any], Any] | None = None,
) -> Any:
    """Reduce the body's values over a chunk, from the left.

    A plain loop, for the interpreter runs a Python function called from bytecode faster
    than one called from C, as ``functools.reduce`` and ``map`` would. For addition, the most
    usual reducer, the operator itself saves another call.
    """
    value = body(next(elements))
    if copy is not None:
        value = copy(value)
    if reducer is operator.add:
        for element in elements:
            value = value + body(element)
    else:
        for element in elements:
            value = reducer(value, body(element))
    return value


class DistributedLoop:
    """A loop over a range or sequence, run by workers; made by :func:`distributed`.

    Calling it with what to loop over returns the reduced value, or, without a reducer, a
    `Task` at once. `body` is the function that was decorated.
    """

    __module__ = "shmdist"

    def __init__(self, body: Callable[[Any], Any], reducer: Any, options: dict[str, Any]) -> None:
        if not callable(body):
            raise TypeError(f"@distributed decorates a function of one argument, not {body!r:.80}")
        self.body = body
        self.reducer = reducer
        self._options = options
        functools.update_wrapper(self, body)

    def __repr__(self) -> str:
        return (
            f"<DistributedLoop {getattr(self.body, '__qualname__', self.body)!s}, reducer {self.reducer!r}>"
        )

    def __reduce__(self) -> Any:
        return DistributedLoop, (self.body, self.reducer, self._options)

    def __call__(self, iterable: Any, *, pool: Any = None) -> Any:
        """Run the loop.

        Parameters
        ----------
        iterable : range, sequence or ndarray
            Of an ndarray, the first axis. Any other iterable is read to its end first. A function
            instead, of a loop without reducer: its body;
            what was taken for the body is the reducer.
        pool : worker pool or list of int, optional
            A list, tuple or range of process ids is a pool of these. Default: the default worker pool.

        Returns
        -------
        object
            The reduced value; without a reducer a `Task`, whose error is the loop's.
        """
        if self.reducer is None and callable(iterable) and not hasattr(iterable, "__iter__"):
            # A reducer that looked like a body, such as `def add(a, b=0)`.
            return _with_pool(DistributedLoop(iterable, self.body, self._options), pool)
        sequence = _sequence(iterable)
        if self.reducer is not None:
            _check_reducer(self.reducer)
        if self.reducer is None:
            return async_(self._run, sequence, pool)
        return self._run(sequence, pool)

    def _run(self, sequence: Any, pool: Any) -> Any:
        options = self._options
        initial = options["initial"]
        if len(sequence) == 0:
            if self.reducer is None:
                return None
            if initial is _NONE:
                raise ValueError("a @distributed reduction over nothing has no value; give initial=")
            return _unshared_copy(initial)
        pool = as_pool(pool, "@distributed")
        pids = workers_of(pool)
        work = _Chunk(self.body, self.reducer, options["vectorized"], here=True)
        chunks = _chunks(sequence, len(pids), options["schedule"], options["chunk"])
        if pids == [current_node().pid]:
            partial = []
            try:
                for chunk in chunks:
                    partial.append(work(chunk))
            except BaseException as error:
                if is_interrupt(error):
                    raise
                told = local_exception(pids[0], error)
                name_in_chunk(told, chunks, len(partial), options["vectorized"])
                if told is error:
                    raise
                raise told from None  # its traceback is that of the cause as well
        elif options["schedule"] == "static":
            partial = scatter(work, [(pids[i % len(pids)], (chunk,)) for i, chunk in enumerate(chunks)])
        else:
            partial = _dynamic(work, chunks, pool)
        if self.reducer is None:
            return None
        if initial is not _NONE:
            partial = [_unshared_copy(initial), *partial]
        return functools.reduce(self.reducer, partial)


def _dynamic(work: _Chunk, chunks: Sequence[Any], pool: Any) -> list[Any]:
    """Give each worker the next chunk when it has done one; partial results in order."""

    def describe(error: BaseException, number: int, chunk: Any) -> None:
        name_in_chunk(error, chunks, number, work.vectorized)

    options: dict[str, Any] = {"total": len(chunks), "batch_size": 1, "describe": describe}
    run = MapRun(BatchRunner(work), iter(chunks), pool.workers, **options).outcomes()
    partial: list[Any] = [None] * len(chunks)
    try:
        for places, values, error in run:
            if error is not None:
                if type(error) is SerializationError:
                    [place] = places
                    error = _unsendable(chunks[place], sum(map(len, chunks[:place])), error)
                raise error
            for place, value in zip(places, values, strict=True):
                partial[place] = value
    finally:
        run.close()  # type: ignore[attr-defined]  # it is a generator
    return partial


def _sequence(iterable: Any) -> Any:
    """Return something that has a length and can be sliced."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(iterable, numpy.ndarray) and iterable.ndim == 0:
        raise TypeError("@distributed cannot loop over an array without dimensions")
    if is_sequence(iterable) or is_array(iterable):
        return iterable
    if hasattr(iterable, "__iter__") or hasattr(iterable, "__getitem__"):
        # By iter(), for list() asks for the length; and an input may fill one buffer again and again.
        return [as_of_now(element) for element in iter(iterable)]
    raise TypeError(f"@distributed loops over a range, sequence or array, not {iterable!r:.80}")


def _chunks(sequence: Any, workers: int, schedule: str, chunk: int | None) -> list[Any]:
    """Cut a sequence up: evenly over the workers, or into pieces of `chunk` elements."""
    count = len(sequence)
    if chunk is None and schedule == "static":
        return [sequence[part.start : part.stop] for part in splitrange(0, count - 1, workers)]
    if chunk is None:
        chunk = max(1, count // (workers * 16))
    return [sequence[start : start + chunk] for start in range(0, count, chunk)]


def _takes_two(f: Any) -> bool:
    """Return whether a callable is a reducer (of two values) and not a loop's body (of one)."""
    if hasattr(f, "nin"):  # a numpy ufunc
        return int(f.nin) == 2
    try:
        signature = parsing(inspect.signature, f)
    except (TypeError, ValueError):
        return True  # min, max: built-in functions that do not tell
    try:
        signature.bind(None, None)
    except TypeError:
        return False
    required = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    # A body with a default, as in `def body(i, n=10)`, is still a body.
    return len(required) != 1


#: Functions of one collection that are taken for reducers, and the reducers that are meant.
_REDUCERS = {"sum": "add", "prod": "multiply", "max": "maximum", "min": "minimum"}


def _check_reducer(reducer: Any) -> None:
    """Raise a TypeError unless `reducer` can be called with two values, as far as is known."""
    name, cure = getattr(reducer, "__name__", ""), "operator.add"
    wrong = reducer is sum
    if name in _REDUCERS and getattr(reducer, "__module__", None) == "numpy" and not hasattr(reducer, "nin"):
        wrong, cure = True, f"numpy.{_REDUCERS[name]}"
    if not wrong:
        try:
            parsing(inspect.signature, reducer).bind(None, None)
        except ValueError:
            pass  # min, max: they do not tell
        except TypeError:
            wrong = True
    if wrong:
        raise TypeError(
            f"@distributed(reducer): the reducer takes two arguments, two values to combine; "
            f"{reducer!r:.80} does not: use {cure}, say"
        )


def distributed(
    reducer: Any = None,
    iterable: Any = _NONE,
    *,
    vectorized: bool = False,
    schedule: str = "static",
    chunk: int | None = None,
    initial: Any = _NONE,
    pool: Any = None,
) -> Any:
    """Make a loop over a range run on all workers: a decorator of its body.

    Parameters
    ----------
    reducer : callable, optional
        Combines two values; associative, need not be commutative: partial results are
        reduced in order. Left out, the loop returns a `Task` at once.
    iterable : range, sequence or ndarray, optional
        With it the loop is run now, and the name is bound to its value.
    vectorized : bool
        The body is given a whole chunk (a `range`, or a slice of the sequence or array)
        and returns the chunk's value.
    schedule : {"static", "dynamic"}
        One chunk for each worker, sizes differing by at most one; or many, each given to
        the next worker that is free.
    chunk : int, optional
        Elements in a chunk. ``"static"`` then deals chunks out in turn.
    initial : object, optional
        Value to begin with, and of an empty loop; the loop works on a copy of it.
    pool : worker pool or list of int, optional
        A list, tuple or range of process ids is a pool of these. Default: the default worker pool.

    Returns
    -------
    callable
        The loop; or its value, when `iterable` is given.

    Raises
    ------
    RemoteException, ProcessExitedException
        From the loop; what else runs is cancelled.

    References
    ----------
    Julia manual, `@distributed`; OpenMP, the ``schedule`` clause.

    Examples
    --------
    >>> import operator
    >>> @distributed(operator.add)
    ... def squares(i):
    ...     return i * i
    >>> squares(range(10))
    285
    >>> @distributed(max, [3, 1, 2])
    ... def largest(x):
    ...     return x
    >>> largest
    3
    """
    if schedule not in ("static", "dynamic"):
        raise ValueError(f"schedule must be 'static' or 'dynamic', not {schedule!r}")
    if chunk is not None:
        chunk = positive_integer("chunk", chunk)
    options = {"vectorized": vectorized, "schedule": schedule, "chunk": chunk, "initial": initial}
    if reducer is not None and not callable(reducer):
        raise TypeError(f"the reducer must be a function of two values, not {reducer!r:.80}")
    if reducer is not None and iterable is _NONE and not _takes_two(reducer):
        return _with_pool(DistributedLoop(reducer, None, options), pool)

    def decorate(body: Callable[[Any], Any]) -> Any:
        loop = _with_pool(DistributedLoop(body, reducer, options), pool)
        return loop if iterable is _NONE else loop(iterable)

    return decorate


def _with_pool(loop: DistributedLoop, pool: Any) -> Any:
    """Bind a loop to a pool, when one is given."""
    if pool is None:
        return loop
    return functools.partial(loop, pool=pool)


_CALL = int(Kind.CALL)


def scatter(f: _Chunk, parts: Iterable[tuple[int, tuple[Any, ...]]]) -> list[Any]:
    """Run `f` once for each part, on the worker that the part names, all at once.

    Parameters
    ----------
    f : _Chunk
        Pickled once, sent once to each worker.
    parts : iterable of (pid, arguments)
        What runs where.

    Returns
    -------
    list
        The values, in the order of `parts`.

    Raises
    ------
    RemoteException, ProcessExitedException
        Of a part that failed, as soon as it has; the others are cancelled.
    """
    node = current_node()
    shipped = BroadcastFunction(f)
    replies: list[Any] = []
    thread_state = current()
    parts = list(parts)
    over = _Over(node, len(parts))
    try:
        with BatchedWakeups(node.reactor.rings) as wakeups:
            how: dict[str, Any] = {"lane": NO_LANE, "callback": over.note, "wakeups": wakeups}
            for pid, arguments in parts:
                if pid == node.pid:
                    with thread_state:  # an interrupt must not come between the start and the note of it
                        replies.append(_Here(node, f, arguments, over.note))
                    continue
                payload = _dump_chunk(shipped.number, arguments, parts[: len(replies)])
                thread_state.enter()
                try:
                    shipped.send_to(pid, wakeups)
                    replies.append(node.requests.request(pid, _CALL, WANT_VALUE | BY_ID, payload, **how))
                finally:
                    thread_state.leave()
                wakeups.turn()
        thread_state.enter()
        try:
            node.requests.wait(over)
        finally:
            thread_state.leave()
        values = []
        for reply in replies if over.failed is None else [over.failed]:
            try:
                values.append(
                    reply.get() if isinstance(reply, _Here) else node.requests.open(reply, "the loop")
                )
            except Exception as error:
                number = next(number for number, each in enumerate(replies) if each is reply)
                name_in_chunk(error, [chunk for _, (chunk,) in parts], number, f.vectorized)
                raise
        return values
    finally:
        with thread_state:
            for reply in replies:
                if isinstance(reply, PendingReply):
                    node.requests.cancel(reply)
                else:
                    reply.task.interrupt()
            shipped.drop()


def _dump_chunk(number: int, arguments: tuple[Any, ...], before: Sequence[Any]) -> codec.Payload:
    """Pickle the call for a part."""
    try:
        return codec.dumps((number, arguments, {}), "the chunk")
    except SerializationError as error:
        raise _unsendable(arguments[0], sum(len(chunk) for _, (chunk,) in before), error) from error.__cause__


def _unsendable(chunk: Any, first: int, error: SerializationError) -> SerializationError:
    """Return the error that names the element of a chunk that cannot be sent; `first` is its first place."""
    for place, element in enumerate(chunk, first):
        try:
            codec.dumps(element, "the element", f"element {place}")
        except SerializationError as named:
            name_element(named, place, element)
            return named
    return error


class _Over(Waiter):
    """Done when all parts are, or one has failed: an early end must not wait for the slow ones."""

    __slots__ = ("_counter", "_node", "_parts", "failed")

    def __init__(self, node: Node, parts: int) -> None:
        super().__init__()
        self._node = node
        self._parts = parts
        self.done = not parts
        self._counter = itertools.count(1)  # next() of it is atomic: parts end on several threads
        self.failed: Any = None

    def note(self, part: PendingReply | _Here) -> None:
        """Note that a part is done."""
        frame = part.frame
        if part.error is not None or (frame is not None and frame.flags & IS_ERROR):
            self.failed = part
        if next(self._counter) == self._parts or self.failed is not None:
            self._node.reactor.complete(self)


class _Here(Waiter):
    """A part that runs on a thread of this process."""

    __slots__ = ("error", "task", "value")
    frame = None  # as a Reply has one

    def __init__(
        self, node: Node, f: Callable[..., Any], arguments: tuple[Any, ...], note: Callable[[_Here], None]
    ) -> None:
        super().__init__()
        self.value: Any = None
        self.error: BaseException | None = None

        def ended(value: Any, failure: BaseException | None) -> None:
            self.value = value
            if failure is not None:
                self.error = unpack_error(node.pid, *pack_error(capture(failure)))
            self.done = True
            note(self)

        self.task = run_on_thread(node, f, arguments, ended)

    def get(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


__all__ = ["DistributedLoop", "distributed", "splitrange"]
