"""A cluster manager with a transport of its own: workers that listen nowhere.

Each worker is a child process that holds one end of a socket pair, its *line*.  Whenever a
connection to the worker is wanted, a new socket pair is made and one end of it is sent down the
line, as a descriptor.  Nothing has an address, so nobody else can even try to connect.

    python examples/own_transport.py
"""

import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection

import shmdist as sd


class LineManager(sd.ClusterManager):
    """Launches `n` workers that are reached by lines."""

    def __init__(self, n):
        self.n = n

    def launch(self, params):
        """Start the processes; called once by each addprocs."""
        command = [
            params["exename"] or sys.executable,
            *params["exeflags"],
            os.path.abspath(__file__),
            "worker",
        ]
        environment = {**os.environ, **params["env"], "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        for _ in range(self.n):
            ours, theirs = socket.socketpair()
            process = subprocess.Popen(
                command, stdin=theirs, cwd=params["dir"], env=environment, start_new_session=True
            )
            theirs.close()
            ours.sendall(params["cookie"].encode() + b"\n")
            # What a WorkerConfig has is for the manager; `userdata` is closed when the worker is gone.
            yield sd.WorkerConfig(host="localhost", process=process, ospid=process.pid, userdata=ours)

    def connect(self, id, config):
        """Return a connection to a worker; also asked for when two workers want to talk."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(config.userdata, [b"x"], [theirs.fileno()])
        return Connection(ours.detach())

    def manage(self, id, config, op):
        """Take note of what happens; here only the end matters: the process is reaped."""
        if op == "finalize":
            try:
                config.process.wait(5)
            except subprocess.TimeoutExpired:
                config.process.kill()
                config.process.wait()

    def kill(self, id, config):
        """End a worker that does not end by itself."""
        config.process.kill()


def worker():
    """Be a worker: the line is standard input, and its first line of text the cookie."""
    line = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    cookie = b""
    while not cookie.endswith(b"\n"):
        cookie += line.recv(1)
    sd.init_worker(cookie.strip())
    while True:
        message, descriptors, _, _ = socket.recv_fds(line, 1, 1)
        if not message:
            return  # process 1 is gone
        for descriptor in descriptors:
            sd.process_messages(Connection(descriptor))


def main():
    with sd.addprocs(LineManager(2)) as pids:
        print("workers:", pids)
        print("squares:", sd.pmap(lambda x: x * x, range(10)))
        print(
            "one worker asks the other:", sd.remotecall_fetch(sd.remotecall_fetch, pids[0], sd.myid, pids[1])
        )


if __name__ == "__main__":
    worker() if sys.argv[1:] == ["worker"] else main()
