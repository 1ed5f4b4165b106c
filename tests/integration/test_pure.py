"""Without the part in C: where it was not compiled, or is not wanted, and beside processes that have it."""

import os
import subprocess
import sys

import numpy as np
import pytest

import shmdist as sd
from shmdist.transport import native

PROGRAM = """
import operator, time
import numpy as np
import shmdist as sd
from shmdist.transport import ring as mailbox, messages, native, ring_slots as slots

def kind():
    from shmdist.runtime.node import current_node
    from shmdist.transport import ring as mailbox
    box = current_node().reactor.rings.inbound
    return mailbox.RingWriter.__module__, box is not None

assert native.module is None and mailbox.RingWriter is slots.RingWriter and messages.Record is messages._Record
first, second = sd.addprocs(2)
for number in range(500):
    assert sd.remotecall_fetch(operator.neg, first, number) == -number
    if not number % 100:
        time.sleep(0.01)  # who reads goes to sleep, and must be woken
assert kind() == ("shmdist.transport.ring_slots", True)
assert sd.remotecall_fetch(kind, first) == ("shmdist.transport.ring_slots", True)
assert sd.pmap(abs, range(-1000, 0)) == list(range(1000, 0, -1))
array = np.arange(1 << 17)
assert sd.remotecall_fetch(np.sum, second, array) == array.sum()
assert sd.remotecall_fetch(sd.remotecall_fetch, first, abs, second, -3) == 3
print("done")
"""


def test_all_of_it_in_python():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        env={**os.environ, "SHMDIST_PURE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


def has_c():
    from shmdist.transport import native

    return native.module is not None


@pytest.mark.skipif(native.module is None, reason="it was not compiled here")
def test_beside_those_that_have_it():
    with sd.addprocs(1) as swift, sd.addprocs(1, env={"SHMDIST_PURE": "1"}) as plain:
        assert sd.remotecall_fetch(has_c, swift[0])
        assert not sd.remotecall_fetch(has_c, plain[0])
        for number in range(100):
            for here, there in ((swift[0], plain[0]), (plain[0], swift[0])):
                assert sd.remotecall_fetch(sd.remotecall_fetch, here, abs, there, -number) == number
        array = np.arange(5000.0)
        assert (sd.remotecall_fetch(np.negative, plain[0], array) == -array).all()
