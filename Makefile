# Each target makes the virtual environment it needs; only Python 3.11 or newer, make and git must be there.
#   make test PYTHON=python3.12    with another interpreter
#   make stress N=5                fewer rounds
#   make test ARGS="-k future -x"  arguments for pytest

VENV ?= .venv
BIN := $(VENV)/bin
N ?= 20
ARGS ?=
export PYTHON

.PHONY: help demo test bench check check-pythons stress clean

help:
	@echo "make demo    the main example: handwritten digits, beside numpy alone and multiprocessing.Pool"
	@echo "make test    all tests but the stress tests"
	@echo "make bench   the benchmarks, each beside its peers; CHECK=1 fails where one is too slow"
	@echo "make check   ruff, mypy and the layers of the package"
	@echo "make check-pythons  a fast part of the tests with Python 3.12 and 3.13, where they are"
	@echo "make stress  the stress tests, N=$(N) times in a row"
	@echo "make clean   remove what the others made"

demo:
	@tools/venv $(VENV)
	@$(BIN)/python examples/digits.py

test:
	@tools/venv $(VENV) test
	@$(BIN)/python tools/run_tests.py $(ARGS)

# Peers may fork a process that has threads; newer Pythons warn of that, and it is not ours to mend.
bench:
	@tools/venv $(VENV) bench
	@$(BIN)/python -m pytest -q benchmarks -W "ignore:This process:DeprecationWarning" \
		--benchmark-group-by=group --benchmark-columns=median,iqr,min,rounds $(ARGS)

check:
	@tools/venv $(VENV) dev
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m mypy
	@$(BIN)/python -m pytest -q tests/test_layers.py

check-pythons:
	@tools/check_pythons

stress:
	@tools/venv $(VENV) test
	@round=1; while [ $$round -le $(N) ]; do \
		echo "stress: round $$round of $(N)"; \
		$(BIN)/python -m pytest -q tests/stress $(ARGS) || exit 1; \
		round=$$((round + 1)); \
	done

clean:
	rm -rf $(VENV) .venv-3.* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
