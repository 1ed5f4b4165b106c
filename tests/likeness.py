"""Functions of numpy, and those of `shmdist.shared` that bear their names, called alike."""

import warnings

import numpy as np

import shmdist as sd


def outcome(make, *args, **keywords):
    """Return the array, or the type of the error, and the categories of the warnings."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            result = make(*args, **keywords)
        except Exception as exc:
            result = type(exc)
    return result, sorted(str(warning.category) for warning in heard)


def _face(array):
    """Return all of an array but its elements."""
    return array.shape, array.strides, str(array.flags).split("OWNDATA")[0], array.dtype, array.dtype.type


def _elements(array):
    """Return the elements so that they compare bit by bit, but for what lies between them."""
    bare = np.ndarray.view(array, np.ndarray)
    return repr(bare.tolist()) if bare.dtype.kind == "V" or bare.dtype.char in "gG" else bare.tobytes()


def agree(name, *args, elements=True, **keywords):
    """Assert that numpy's function and ours do the same with these arguments."""
    call = f"{name}{args} {keywords}"
    ours, our_warnings = outcome(getattr(sd.shared, name), *args, **keywords)
    numpys, numpys_warnings = outcome(getattr(np, name), *args, **keywords)
    assert our_warnings == numpys_warnings, call
    if isinstance(numpys, type):
        assert ours is numpys, call
        return
    if numpys.dtype.hasobject:
        assert ours is TypeError, call
        return
    assert type(ours) is type(numpys), (call, ours)
    assert _face(ours) == _face(numpys), call
    assert ours.flags.writeable and ours.flags.aligned and sd.shared.is_shared(ours), call
    assert not elements or _elements(ours) == _elements(numpys), call
