"""A program that ends while hundreds of megabytes are queued, or on their way: promptly and silently."""

import pytest

from tests.integration.helpers import Script

HEAD = """
import threading, numpy as np, shmdist as sd
from tests.integration.helpers import *
a, b = sd.addprocs(2)
MIB = 1 << 20
def big(n=0): return np.full(8 * MIB, n, "B")
def background(function, *args): threading.Thread(target=function, args=args, daemon=True).start()
"""

QUEUED = {
    "in a worker's channel": """
channel = sd.RemoteChannel(lambda: sd.Channel(float("inf")), a)
for n in range(18): channel.put(big(n))
""",
    "in a channel here": """
channel = sd.RemoteChannel(lambda: sd.Channel(float("inf")))
for pid in (a, b): sd.remotecall_wait(lambda: [channel.put(big(n)) for n in range(6)], pid)
assert len(channel) == 12
""",
    "in puts that wait for room": """
channel = sd.RemoteChannel(lambda: sd.Channel(1), a)
there = sd.RemoteChannel(lambda: sd.Channel(99))
for n in range(6): background(channel.put, big(n))
def put(n):
    there.put(n)
    channel.put(big(n))
for n in range(6): sd.remote_do(put, b, n)
for n in range(6): there.take(timeout=10)
until(lambda: len(channel) == 1)
""",
    "in futures nobody has fetched": """
futures = [sd.remotecall(big, pid, n) for n in range(6) for pid in (a, b)]
for future in futures: future.wait()
""",
    "in results on their way": """
futures = [sd.remotecall(big, pid, n) for n in range(6) for pid in (a, b)]
for future in futures: background(future.fetch)
""",
    "in arguments for a worker that does not read": """
started = sd.RemoteChannel(lambda: sd.Channel(1))
sd.remote_do(tell_and_run, a, started, hold_the_interpreter)
started.take(timeout=10)
begun = [threading.Event() for n in range(18)]
def send(event, array):
    event.set()
    sd.remotecall(len, a, array)
for n, event in enumerate(begun): background(send, event, big(n))
for event in begun: event.wait()
""",
    "in a map that goes on": """
generator = sd.pgenerate(lambda a: a, (big(n) for n in range(1000)))
next(generator)
background(sd.pmap, lambda a: a, (big(n) for n in range(1000)))
next(generator)
""",
}


@pytest.mark.parametrize("where", ["a worker that does not read", "elsewhere"])
def test_ends(where):
    """Each kind of queue is filled by a function; frames keep what they have until the end."""
    source = HEAD + "kept = []\n"
    for name, text in QUEUED.items():
        if name.endswith("does not read") == (where == "a worker that does not read"):
            body = "\n    ".join(text.strip().splitlines())
            source += f"def fill():\n    {body}\n    return locals()\nkept.append(fill())\n"
    Script(source).end(timeout=30, gone=5).clean()
