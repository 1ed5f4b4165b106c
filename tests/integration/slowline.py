"""A line between two hosts that is slow, loses packets, or stalls: a program copies what goes over it.

It has an end in each of two network namespaces (tun devices), so that what it delays and loses is
packets, and the kernels' TCP deals with that as on a real line.  It keeps their order, and its loss is even:
of reordering, and of loss in bursts, it shows nothing.  While the program is stopped the line holds what
fits into the devices' queues, and loses the rest.
"""

import fcntl
import itertools
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from collections import deque

from tests.integration.helpers import ROOT

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_MOMENT = 0.05  # seconds
_numbers = itertools.count()


class SlowLine:
    """A host of its own, and the line to it; in the place of ``sshd.Host``.

    Parameters
    ----------
    delay : float
        Seconds that a packet takes, each way.
    loss : float
        The part of the packets that is lost, each way.
    kept : int, optional
        How many packets get through after a stall, each way, before all others of a moment are lost.  TCP has
        then measured that an answer takes as long as the stall, and waits some times that for the next one.
    """

    def __init__(self, number, delay=0.0, loss=0.0, kept=0):
        unique = f"{os.getpid() % 100000}s{next(_numbers)}"
        self.name = f"shmdist{unique}"
        self.here, self.address = f"10.213.{number}.1", f"10.213.{number}.2"
        self.prefix = ("ip", "netns", "exec", self.name)
        self.ends = [f"sd{unique}a", f"sd{unique}b"]
        command = [sys.executable, "-m", __name__, *self.ends, str(delay), str(loss), str(kept)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
        try:
            if self.process.stdout.readline() != b"ready\n":
                raise OSError("this machine has no tun devices")
            for command in (
                f"netns add {self.name}",
                f"link set {self.ends[1]} netns {self.name}",
                f"address add {self.here} peer {self.address} dev {self.ends[0]}",
                f"link set {self.ends[0]} up",
                f"-n {self.name} address add {self.address} peer {self.here} dev {self.ends[1]}",
                f"-n {self.name} link set {self.ends[1]} up",
                f"-n {self.name} link set lo up",
            ):
                subprocess.run(["ip", *command.split()], check=True, capture_output=True)
        except BaseException:
            self.remove()
            raise

    def stall(self):
        """Let nothing through."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self):
        """Let through what has come meanwhile, and all that comes."""
        self.process.send_signal(signal.SIGCONT)

    def remove(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        inside = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        for ospid in inside.stdout.split():
            os.kill(int(ospid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", self.name], check=False, capture_output=True)


def open_tun(name):
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return fd


def carry(first, second, delay, loss, kept):
    """Copy packets for ever."""
    lots = random.Random(1)
    lost_until, left = 0.0, {}  # after a stall: how many packets of each end still get through, meanwhile

    def go_on(number, frame):
        nonlocal lost_until, left
        lost_until, left = time.monotonic() + _MOMENT, {first: kept, second: kept}

    if kept:
        signal.signal(signal.SIGCONT, go_on)
    on_the_way = {first: deque(), second: deque()}  # by where they go: when they arrive, and the packets
    other = {first: second, second: first}
    while True:
        now = time.monotonic()
        for end, packets in on_the_way.items():
            while packets and packets[0][0] <= now:
                try:
                    os.write(end, packets.popleft()[1])
                except OSError:
                    pass  # its queue is full, or it is down
        arrivals = [packets[0][0] for packets in on_the_way.values() if packets]
        wait = max(0.0, min(arrivals) - now) if arrivals else None
        for end in select.select([first, second], [], [], wait)[0]:
            try:
                packet = os.read(end, 1 << 16)
            except OSError:
                continue
            if time.monotonic() < lost_until:
                left[end] -= 1
                if left[end] < 0:
                    continue
            if lots.random() >= loss:
                on_the_way[other[end]].append((time.monotonic() + delay, packet))


if __name__ == "__main__":
    ends = [open_tun(name) for name in sys.argv[1:3]]
    print("ready", flush=True)
    carry(*ends, *map(float, sys.argv[3:5]), int(sys.argv[5]))
