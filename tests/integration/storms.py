"""Interrupts at random moments: none is lost or comes twice, tables are whole after them, and nothing is left."""

from tests.integration.helpers import Script

_PROGRAM = """
import os, random, signal, sys, threading, time
import shmdist as sd
from tests.integration import sweeping

def begin(world):
    for operation in 3 * [*world.operations.values()]:  # what the first of each makes stays, on each worker
        assert operation()
    world.before = world.settled()

def step(world, chance):
    for channel in world.channels:  # a put of which the take was interrupted
        while len(channel) > 4:
            channel.take(timeout=10)
    # Not what needs a channel to be empty, nor what stops a worker.
    name = chance.choice([name for name in world.names if name not in ("in no time", "stopped")])
    assert world.operations[name](), name
"""

#: One interrupt at most is under way at a time: those that come together are one.
_CTRL_C = """
def come():
    return caught[0] + len(sweeping._swallowed)

def shoot():
    chance, deadline = random.Random(7), time.monotonic() + 10
    begun.wait(10)
    while sent[0] < COUNT and time.monotonic() < deadline:
        while not inside[0] and time.monotonic() < deadline:
            time.sleep(1e-4)
        time.sleep(chance.expovariate(1000))
        sent[0] += 1
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 10
        while come() < sent[0] and time.monotonic() < deadline:
            time.sleep(1e-4)
    over.set()

def traffic(chance):
    inside[0] = True
    begun.set()
    while not over.is_set():
        step(world, chance)

world = sweeping.World(*sd.addprocs(2))
begin(world)
sent, caught, over, chance = [0], [0], threading.Event(), random.Random(8)
begun, inside = threading.Event(), [False]
shooter = threading.Thread(target=shoot)
shooter.start()
while True:
    try:
        traffic(chance)
        break
    except KeyboardInterrupt:
        inside[0] = False
        caught[0] += 1
shooter.join()
assert come() == sent[0] == COUNT, (caught, sweeping._swallowed, sent)
left = world.compare(10)
assert not left, left
for operation in world.operations.values():
    assert operation()
world.close()
"""

_INTERRUPTS = """
def set_up(*workers):
    sweeping.world = world = sweeping.World(*workers)
    begin(world)

def traffic(seed):
    chance = random.Random(seed)
    while True:
        step(sweeping.world, chance)

def proof():
    left = sweeping.world.compare(10)
    assert not left, left
    for operation in sweeping.world.operations.values():
        assert operation()
    sweeping.world.close()

caller, *workers = sd.addprocs(3)
sd.remotecall_fetch(set_up, caller, *workers)
chance = random.Random(9)
for turn in range(COUNT):
    future = sd.remotecall(traffic, caller, turn)
    time.sleep(chance.expovariate(300))
    sd.interrupt(caller)
    error = future.exception(timeout=20)
    assert type(error.captured.ex) is KeyboardInterrupt, error
sd.remotecall_fetch(proof, caller)
"""


def of_ctrl_c(count, timeout=60):
    """Press Ctrl-C `count` times in a program that calls, sends arrays, puts, takes, and uses pools."""
    Script(f"{_PROGRAM}COUNT = {count}\n{_CTRL_C}").end(timeout).clean()


def of_interrupts(count, timeout=60):
    """Interrupt such a program on a worker as often."""
    Script(f"{_PROGRAM}COUNT = {count}\n{_INTERRUPTS}").end(timeout).clean()
