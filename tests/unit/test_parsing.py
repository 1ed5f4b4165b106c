"""Parsing beside other threads: an error that passes is tried again, and one that stays is raised."""

import inspect

import pytest

from shmdist import _parsing
from shmdist._parsing import parsing


def fails(times):
    calls = []

    def function(what):
        calls.append(what)
        if len(calls) <= times:
            raise SystemError("AST constructor recursion depth mismatch")
        return what

    return function, calls


def test_what_passes_is_tried_again(monkeypatch):
    monkeypatch.setattr(_parsing, "_TRIES", 3)
    function, calls = fails(2)
    assert parsing(function, "text") == "text" and len(calls) == 3


@pytest.mark.parametrize("tries", [1, 3, _parsing._TRIES])
def test_what_stays_is_raised(tries, monkeypatch):
    monkeypatch.setattr(_parsing, "_TRIES", tries)
    function, calls = fails(1000)
    with pytest.raises(SystemError, match="mismatch"):
        parsing(function, "text")
    assert len(calls) == tries


def test_other_errors_are_raised_at_once():
    with pytest.raises(TypeError):
        parsing(inspect.signature, 5)
