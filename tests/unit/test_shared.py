"""What makes shared arrays, beside the functions of numpy that bear the same names."""

import fractions

import numpy as np
import pytest

import shmdist as sd
from tests.integration.kinds import KINDS, Tagged
from tests.likeness import agree

NAN, INF = float("nan"), float("inf")
BLOCK = np.arange(24.0).reshape(2, 3, 4)
FIELDS = [("x", "f4"), ("y", "i8"), ("name", "S3")]


class Filled(np.ndarray):
    """A subclass that takes an attribute over from what it is made of."""

    def __array_finalize__(self, other):
        self.unit = getattr(other, "unit", "none")


class Offers:
    """No array, but it offers one."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array if dtype is None else self.array.astype(dtype)


SHAPES = [
    *(0, 5, (), (2, 3), (0, 4), (4, 0, 3), [2, 2], range(1, 4), np.int64(3), (np.int8(2), 3), np.array([2, 3]), np.array(3)),
    *(-1, (2, -1), 2.0, (2, 2.0), "ab", "3", None, True, (2, None), (1,) * 65, 1 << 62, (1 << 62, 0), 1 << 64, {2: 3}),
]  # fmt: skip
DTYPES = [
    *(
        float,
        None,
        "f4",
        bool,
        ">i4",
        "c16",
        "f2",
        "g",
        str,
        bytes,
        "U",
        "U3",
        "S0",
        "S3",
        "V",
        "V5",
        np.str_,
    ),
    *("M8", "M8[s]", "m8", "m8[25ms]", "3f4", "(2,3)i2", "(2,0)f4", FIELDS, [("a", "S0"), ("b", "U2", 2)]),
    *(np.dtype("f4", metadata={"unit": "m"}), np.dtype([("x", "i1"), ("y", "f8")], align=True)),
    *(np.dtype((np.record, FIELDS)), "no such", 5, ("f4", -1), np.dtype("i4,U0")),
]


@pytest.mark.parametrize("name", ["empty", "zeros", "ones"])
def test_shapes_and_dtypes(name):
    used = sd.shared.full(100_000, 7, "u1")  # so that zeros are not found by chance
    del used
    elements = name != "empty"
    for shape in SHAPES:
        agree(name, shape, elements=elements)
        agree(name, shape=shape, dtype="i2", order="F", elements=elements)
    for dtype in DTYPES:
        for order in ("C", "F"):
            agree(name, (2, 3), dtype, order, elements=elements)
        agree(name, (2, 0, 3), dtype=dtype)
    for order in ("c", "f", None, "A", "K", "X", "CC", "", 1):
        agree(name, (2, 3), order=order, elements=elements)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        *((3, None), (2.5, None), (True, None), (1j, None), ("abc", None), (b"ab", None), ([1, 2, 3], None)),
        *(("ab", str), ("ab", "U5"), (b"ab", "S"), (12, str), (2.5, int), (300, "u1"), (-1, "u8"), (NAN, int)),
        *((np.array(300), "u1"), (np.float64(2.7), "i4"), (1j, float), ("x", int), ("12", int), (INF, "f2")),
        *(("2020-01-01", "M8"), ("2020-01-01", "M8[D]"), (np.datetime64("2020-01-01"), None), (5, "m8[s]")),
        *(("NaT", "m8"), ([1, 2], None), ([[1], [2]], "f4"), ([1, 2, 3], "3f4"), ((1, 2, b"a"), FIELDS)),
        *((np.array((1, 2, b"a"), FIELDS), None), (np.ma.masked, None), (7, ">i4"), (2**70, "u8"), (2**63, None)),
        *((np.arange(1, 4).reshape(1, 3).view(np.matrix), None), ([], None), ("", None)),
    ],
)  # fmt: skip
def test_full(value, dtype):
    for order in ("C", "F"):
        agree("full", (2, 3), value, dtype, order)
    agree("full", (), value, dtype=dtype)
    agree("full", (0, 3), value, dtype=dtype)


def test_full_of_what_numpy_does_not_know():
    agree("full", (2, -1), 3)
    agree("full", 2, 3, "no such")
    agree("full", 2, 3, order="K")


#: No arrays, of which numpy makes one.
THINGS = {
    "text": [["a", "bc"], "text", "", [""], ["1", "22"], [b"ab", b"c"], "12"],
    "numbers": [[1, 22], [300], [-1], [NAN], [1j], [2**53 + 1, 1.0], [2**63], [2**64 - 1, 1], [2**53 + 1], [True, 2]],
    "few numbers": [5, 2.5, [], [[], []], [[1, 2], [3, 4]], ((1, 2), (3, 4)), range(3), 2**53 + 1, [1.7, -2.7]],
    "mixed": [[1, "a"], [1, 2.5, 3j], [None, 1.0], [1, None], [[1, 2], [3]], {1: 2}, [[1], 2], object, [2**70]],
    "scalars": [np.float32(1.5), np.float64(300), [np.float64(300)], np.int64(-1), np.str_("ab"), np.True_],
    "dates": [
        ["2020-01-01"], ["2020-01-01T12", "2021"], np.datetime64("2020-01"), [np.datetime64(5, "s"), np.datetime64(5, "D")],
        [np.timedelta64(5, "h")], ["NaT"],
    ],
    "structures": [[(1, 2, b"abcd")], (1, 2, b"a"), np.zeros(2, FIELDS)[0], [(1, 2), (3, 4)]],
    "arrays within": [[np.arange(3), np.arange(3.0)], [np.ones(2), [1, 2]], [np.array(300)], [np.float32([1, NAN])]],
    "buffers": [b"abc", bytearray(b"abc"), memoryview(b"abc"), memoryview(np.asfortranarray(BLOCK)), memoryview(BLOCK)[::-1]],
    "offers": [Offers(BLOCK), Offers(BLOCK.T), Offers(BLOCK.transpose(1, 0, 2)), Offers(np.ones((2, 2)).view(np.matrix)), [Offers(BLOCK)]],
    "others": [fractions.Fraction(1, 2), [fractions.Fraction(1, 2)], {1}, (n for n in ()), np.random.default_rng],
}  # fmt: skip
TARGETS = [
    *(None, float, int, "u1", "i8", "u8", ">f8", "f2", complex, bool, str, bytes, "U1", "S", "V", "V8", np.str_, "g"),
    *("M8", "M8[s]", "m8", "m8[D]", FIELDS, "i4,U2", np.dtype("f8", metadata={"unit": "m"}), "no such"),
]  # fmt: skip


@pytest.mark.parametrize("things", THINGS)
def test_array_of_what_is_none(things):
    for thing in THINGS[things]:
        for dtype in TARGETS:
            agree("array", thing, dtype)
        for order in "CFAK":
            agree("array", thing, order=order, ndmin=4)
            agree("array", thing, order=order, subok=True)


def test_array_with_arrays_as_elements():
    for thing in ([[1, 2, 3], [4, 5, 6]], [1, 2], 5, [(1, 2, 3)], [], [300.5, 1j]):
        agree("array", thing, "3f4")
        agree("array", thing, "(3,)u1", ndmin=4)
    # In this order numpy 2.4 leaves elements of its own unset.
    assert (sd.shared.array([[1, 2], [3, 4]], "3f4", order="F") == np.array([[[1], [2]], [[3], [4]]])).all()


#: Arrays that are copied, each with a layout or a dtype of its own.
SOURCES = {
    **{name: (lambda make=make: make(np.arange(40.0))) for name, make in KINDS.items()},
    "C": lambda: BLOCK,
    "F": lambda: np.asfortranarray(BLOCK),
    "two axes swapped": lambda: BLOCK.transpose(1, 0, 2),
    "axes turned": lambda: BLOCK.transpose(2, 0, 1),
    "steps": lambda: np.arange(240.0).reshape(4, 6, 10)[::2, 1::3, ::-2].transpose(1, 0, 2),
    "all negative": lambda: BLOCK.T[::-1, ::-1, ::-1],
    "broadcast, turned": lambda: np.broadcast_to(BLOCK[:, 0], (5, 2, 4)).transpose(1, 2, 0),
    "equal strides": lambda: np.lib.stride_tricks.sliding_window_view(np.arange(10.0), 3),
    "axes of one": lambda: BLOCK[:, :1].T,
    "empty, turned": lambda: BLOCK[:, :0].transpose(1, 0, 2),
    "empty F": lambda: np.empty((3, 0), order="F"),
    "nan and inf": lambda: np.array([NAN, INF, -1.5, 300.7]),
    "large": lambda: np.array([2**53 + 1, 2**62, -1]),
    "unsigned": lambda: np.array([2**64 - 1, 2**53 + 1], "u8"),
    "0-d int": lambda: np.array(300),
    "0-d text": lambda: np.array("2020-01-01"),
    "digits": lambda: np.array(["1", "22", "-3"]),
    "days as text": lambda: np.array(["2020-01-01", "2021-05"]),
    "S0": lambda: np.zeros(2, [("a", "S0"), ("b", "i4")])["a"],
    "days": lambda: np.array(["2020-01-01", "NaT"], "M8[D]"),
    "no unit": lambda: np.array(["NaT"], "M8"),
    "hours": lambda: np.array([[1, 2]], "m8[h]"),
    "numbers as objects": lambda: np.array([1, 2.5, 2**53 + 1], object),
    "with metadata": lambda: np.ones(3, np.dtype("f4", metadata={"unit": "m"})),
    "field of many": lambda: np.ones((3, 2), FIELDS)[["x", "name"]],
}


@pytest.mark.filterwarnings(
    "ignore:The .generic. unit:DeprecationWarning"
)  # numpy 2.5 on times without a unit
@pytest.mark.parametrize("name", SOURCES)
def test_array_of_an_array(name):
    source = SOURCES[name]()
    if source.dtype.kind == "m" and np.__version__.startswith("1."):
        pytest.skip("numpy 1 writes beyond a text that is too short for a timedelta")
    # Others, numpy itself fills with what lies about.
    arrays_as_elements = ["3f4", "2i4"] * source.flags.forc
    for dtype in [*TARGETS, source.dtype, *arrays_as_elements]:
        agree("array", source, dtype)
    for order in ("C", "F", "A", "K", "c", None):
        for ndmin in (0, 2, 5):
            agree("array", source, order=order, ndmin=ndmin)
    agree("array", source, order="B")
    agree("array", source, ndmin=65)


def test_a_subclass():
    tagged = np.arange(12.0).reshape(3, 4).T.view(Tagged)
    filled = BLOCK.view(Filled)
    filled.unit = "m"
    records = np.rec.array([(1, 2.0)] * 3, dtype=[("a", "i4"), ("b", "f8")])
    for source in (tagged, filled, records, np.ones((2, 2)).view(np.matrix), Offers(tagged)):
        for order in "CFAK":
            agree("array", source, order=order)
            agree("array", source, order=order, subok=True)
        agree("array", source, subok=True, ndmin=2)
    assert sd.shared.array(filled, subok=True).unit == np.array(filled, subok=True).unit == "m"
    assert sd.shared.array(filled[0], subok=True, ndmin=3).unit == "m"


@pytest.mark.parametrize("kind", ["masked", "subclass with state"])
def test_a_subclass_that_would_not_go_by_reference(kind):
    source = KINDS[kind](np.arange(40.0))
    with pytest.raises(TypeError, match="by reference"):
        sd.shared.array(source, subok=True)
    agree("array", source)


def test_an_array_of_text_that_python_holds():
    if not hasattr(np.dtypes, "StringDType"):
        pytest.skip("this numpy has no such dtype")
    kind = np.dtypes.StringDType()
    with pytest.raises(TypeError, match="pointers"):
        sd.shared.zeros(3, kind)
    with pytest.raises(TypeError, match="pointers"):
        sd.shared.array(["a", "b"], kind)
    agree("array", np.array(["a", "bcd"], kind), "U")


def test_a_copy_only_where_one_is_needed():
    shared = sd.shared.array(BLOCK.transpose(1, 0, 2))
    for copy in (None, False):
        assert sd.shared.array(shared, copy=copy) is shared
        assert sd.shared.array(shared, shared.dtype, copy=copy, order="A") is shared
        assert sd.shared.array(shared.T, copy=copy).strides == shared.T.strides
        assert sd.shared.array(shared[:, 0], copy=copy, order="C").strides == shared[:, 0].strides
        assert np.shares_memory(sd.shared.array(shared, copy=copy, ndmin=5), shared)
        assert np.shares_memory(sd.shared.array(memoryview(shared), copy=copy), shared)
        matrix = shared[0].view(np.matrix)
        assert type(sd.shared.array(matrix, copy=copy)) is np.ndarray
        assert sd.shared.array(matrix, copy=copy, subok=True) is matrix
    for source, asked in (
        (BLOCK, {}),
        ([1, 2], {}),
        (shared, {"dtype": "f4"}),
        (shared, {"order": "C"}),
        (shared, {"order": "F"}),
    ):
        with pytest.raises(ValueError, match="copy=False"):
            sd.shared.array(source, copy=False, **asked)
        copied = sd.shared.array(source, copy=None, **asked)
        assert sd.shared.is_shared(copied) and not np.shares_memory(copied, shared)
        assert copied.tolist() == np.array(source).tolist()
    assert not np.shares_memory(sd.shared.array(shared), shared)
    with pytest.raises(TypeError, match="positional"):
        sd.shared.array(BLOCK, None, "C")


class _Named(np.ndarray):
    """A subclass that is pickled in its own way."""

    def __reduce__(self):
        return np.asarray, (self.tolist(),)


def test_what_is_pickled_in_its_own_way_does_not_go_by_reference():
    array = sd.shared.zeros(4)
    assert sd.shared.is_shared(array) and sd.shared.is_shared(np.ma.masked_array(array, array > 0))
    assert not sd.shared.is_shared(array.view(_Named))


@pytest.mark.parametrize("dtype", ["U5", "M8[s]", "S3", "f8"])
def test_an_axis_of_length_one_keeps_its_place(dtype):
    """Where texts are converted on the way, too."""
    source = np.zeros((3, 6), "U3")[:1, :2].T
    agree("array", source, dtype, order="K")
