"""What holds for all tests: Ctrl-C is as it is in a terminal, however the run was started."""

import signal

import pytest


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_interrupts():
    """Have SIGINT raise KeyboardInterrupt.

    Under `nohup`, or behind `&` in a script, a program finds it ignored; Python then leaves it so,
    and so do all programs that the tests start.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
