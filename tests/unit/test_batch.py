"""The loop over a batch, in Python and in C: what it notes, and where it stops."""

import signal
import threading
import time
from array import array

import pytest

from shmdist.scheduling import batch
from shmdist.serialization import isolated_items
from shmdist.transport import native

LOOPS = {"python": batch._advance_in_python} | ({"c": native.module.advance} if native.module else {})
KINDS = {"python": isolated_items._kinds_in_python} | ({"c": native.module.kinds} if native.module else {})


@pytest.fixture(params=LOOPS)
def advance(request):
    return LOOPS[request.param]


@pytest.fixture(params=KINDS)
def kinds(request):
    return KINDS[request.param]


def until_it_is_over(advance, f, star, source, values, numbers, index=0, limit=10**9):
    while len(values) < limit and not advance(f, star, source, values, numbers, index, limit):
        pass


class TestAdvance:
    def test_to_the_end(self, advance):
        values, numbers = [], array("Q", [0, 0])
        until_it_is_over(advance, str, False, iter([5, 6, 7]), values, numbers, 1)
        assert values == ["5", "6", "7"]
        assert list(numbers) == [0, 2]

    def test_as_many_as_are_wanted(self, advance):
        values, numbers, source = ["first"], array("Q", [0]), iter(range(9))
        until_it_is_over(advance, abs, False, source, values, numbers, limit=3)
        assert values == ["first", 0, 1]
        assert numbers[0] == 2
        until_it_is_over(advance, abs, False, source, values, numbers, limit=4)
        assert values == ["first", 0, 1, 2]
        assert next(source) == 3, "no element is drawn that is not begun"

    def test_the_element_is_noted_before_it_is_begun(self, advance):
        numbers, seen = array("Q", [99]), []
        until_it_is_over(advance, lambda x: seen.append(numbers[0]), False, iter("abc"), [], numbers)
        assert seen == [0, 1, 2]

    def test_several_arguments(self, advance):
        values = []
        until_it_is_over(advance, pow, True, iter([(2, 3), [3, 2], (5, 3, 7)]), values, array("Q", [0]))
        assert values == [8, 9, 6]

    @pytest.mark.parametrize("error", [ValueError("no"), StopIteration("mine"), KeyboardInterrupt()])
    def test_errors_are_raised_as_they_are_and_the_rest_is_there(self, advance, error):
        def f(x):
            if x == 2:
                raise error
            return x

        values, numbers, source = [], array("Q", [0]), iter(range(4))
        with pytest.raises(type(error)) as caught:
            until_it_is_over(advance, f, False, source, values, numbers)
        assert caught.value is error
        assert values == [0, 1]
        assert numbers[0] == 2
        values.append(None)
        until_it_is_over(advance, f, False, source, values, numbers)
        assert values == [0, 1, None, 3]

    def test_what_is_taken_away_is_not_drawn(self, advance):
        batch = list(range(10))

        def f(x):
            if x == 3:
                del batch[5:]
            return x

        values = []
        until_it_is_over(advance, f, False, iter(batch), values, array("Q", [0]))
        assert values == [0, 1, 2, 3, 4]

    def test_signals_come_through_though_all_is_in_c(self, advance):
        values, numbers = [], array("Q", [0])
        threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            until_it_is_over(advance, hash, False, iter(range(10**9)), values, numbers)
        assert time.monotonic() - begin < 5
        assert len(values) <= numbers[0] + 1

    def test_other_threads_have_their_turn(self, advance):
        stop, turns = threading.Event(), []

        def count():
            while not stop.wait(0.001):
                turns.append(len(turns))

        thread = threading.Thread(target=count)
        thread.start()
        until_it_is_over(advance, hash, False, iter(range(5_000_000)), [], array("Q", [0]))
        assert turns
        stop.set()
        thread.join()

    @pytest.mark.skipif(native.module is None, reason="it was not compiled here")
    def test_bad_arguments_in_c(self):
        advance = native.module.advance
        good = (str, False, iter("abc"), [], array("Q", [0]), 0, 9)
        for place, bad in ((2, "abc"), (3, ()), (4, b"readonly"), (5, None), (6, "9")):
            with pytest.raises((TypeError, BufferError)):
                advance(*good[:place], bad, *good[place + 1 :])
        for index in (1, -1):
            with pytest.raises(IndexError):
                advance(*good[:5], index, 9)
        with pytest.raises(TypeError):
            advance(*good, 1)
        with pytest.raises(TypeError):
            advance(str, True, iter([5]), [], array("Q", [0]), 0, 9)
        assert advance(*good)


class TestKinds:
    def test_all_there_are(self, kinds):
        class Mine:
            pass

        assert kinds([]) == set()
        assert kinds([1, 2, True, 1, Mine(), "x", Mine()]) == {int, bool, Mine, str}

    def test_errors_of_a_class(self, kinds):
        class Meta(type):
            def __hash__(cls):
                raise ZeroDivisionError

        class Mine(metaclass=Meta):
            pass

        with pytest.raises(ZeroDivisionError):
            kinds([1, Mine()])

    @pytest.mark.skipif(native.module is None, reason="it was not compiled here")
    def test_only_of_lists_in_c(self):
        with pytest.raises(TypeError):
            native.module.kinds((1, 2))
