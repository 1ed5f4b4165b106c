"""Every public name; the package takes them from here.

A worker that starts does without: what it needs to answer its first call is less than half
of this. It loads the rest when something in it is asked for (see ``__init__``).

The plan of the package
-----------------------
Top-level modules are what a user sees; folders are mechanism::

    errors                         every exception class
    memory/  refcount/             bytes shared on a host; who holds them
    transport/  serialization/     frames between two processes; objects to bytes
    runtime/                       one process: its node, its threads, the calls it runs
    managers/                      how workers come to be
    channels  futures  refs        Channel, Future, RemoteChannel
      completion  references         what waits for an outcome; what Future and RemoteChannel share
      faces  travel                  a Future's face of concurrent.futures; its value in a pickle
      owners                         the owner's side of references
    calls  cluster  evaluation     remotecall...; addprocs...; everywhere
      membership  places             process 1's side of the cluster; where a call is to run
      relays                         joining two workers that have no direct way
    tasks  pools  maps  loops      async_, sync; WorkerPool...; pmap; @distributed
      poolstate  shipping            a pool where it lives; a function sent once to each worker
      repeats                        arrays that go out many times in one map
      batches  runs                  elements in one call; the calls of a map, under way

A call goes ``calls`` -> ``runtime.node`` -> ``serialization.codec`` -> ``transport.link``, and on the other
side ``transport.link`` -> ``runtime.reactor`` -> ``runtime.executor`` -> the function.
"""

import logging
from types import FunctionType

from shmdist import shared
from shmdist._version import __version__
from shmdist.calls import (
    fetchany,
    fetchfrom,
    remote,
    remote_do,
    remotecall,
    remotecall_fetch,
    remotecall_wait,
    spawn,
    spawnat,
)
from shmdist.cluster import WorkerList, addprocs, cluster_cookie, interrupt, rmprocs
from shmdist.errors import (
    AuthenticationError,
    CapturedException,
    ChannelClosed,
    CompositeException,
    LaunchWorkerError,
    ProcessExitedException,
    RemoteException,
    SerializationError,
    ShmdistError,
    VersionMismatch,
)
from shmdist.evaluation import clear, everywhere, remotecall_eval
from shmdist.loops import DistributedLoop, distributed, splitrange
from shmdist.managers.base import ClusterManager, WorkerConfig
from shmdist.managers.local import LocalManager
from shmdist.managers.ssh.manager import SSHManager
from shmdist.maps import ExponentialBackOff, pgenerate, pmap
from shmdist.pools import (
    AbstractWorkerPool,
    CachingPool,
    WorkerPool,
    default_worker_pool,
    set_default_worker_pool,
)
from shmdist.processes import (
    myid,
    nprocs,
    nworkers,
    other_procs,
    other_workers,
    procs,
    workers,
)
from shmdist.refcount.table import RRID, AlreadySet
from shmdist.references.channel import Channel
from shmdist.references.future import Future
from shmdist.references.future_interface import Cancelled
from shmdist.references.remote_channel import (
    RemoteChannel,
    channel_from_id,
    close,
    fetch,
    isempty,
    isopen,
    isready,
    put,
    remoteref_id,
    take,
    wait,
    worker_id_from_socket,
)
from shmdist.tasks import Task, async_, sync, timedwait
from shmdist.worker.main import init_worker, process_messages, start_worker

__all__ = [
    "RRID",
    "AbstractWorkerPool",
    "AlreadySet",
    "AuthenticationError",
    "CachingPool",
    "Cancelled",
    "CapturedException",
    "Channel",
    "ChannelClosed",
    "ClusterManager",
    "CompositeException",
    "DistributedLoop",
    "ExponentialBackOff",
    "Future",
    "LaunchWorkerError",
    "LocalManager",
    "ProcessExitedException",
    "RemoteChannel",
    "RemoteException",
    "SSHManager",
    "SerializationError",
    "ShmdistError",
    "Task",
    "VersionMismatch",
    "WorkerConfig",
    "WorkerList",
    "WorkerPool",
    "__version__",
    "addprocs",
    "async_",
    "channel_from_id",
    "clear",
    "close",
    "cluster_cookie",
    "default_worker_pool",
    "distributed",
    "everywhere",
    "fetch",
    "fetchany",
    "fetchfrom",
    "init_worker",
    "interrupt",
    "isempty",
    "isopen",
    "isready",
    "myid",
    "nprocs",
    "nworkers",
    "other_procs",
    "other_workers",
    "pgenerate",
    "pmap",
    "process_messages",
    "procs",
    "put",
    "remote",
    "remote_do",
    "remotecall",
    "remotecall_eval",
    "remotecall_fetch",
    "remotecall_wait",
    "remoteref_id",
    "rmprocs",
    "set_default_worker_pool",
    "shared",
    "spawn",
    "spawnat",
    "splitrange",
    "start_worker",
    "sync",
    "take",
    "timedwait",
    "wait",
    "worker_id_from_socket",
    "workers",
]

for _name in __all__:
    _thing = globals()[_name]
    if isinstance(_thing, FunctionType):
        # What is pickled and printed says shmdist, and not the file that it happens to live in.
        _thing.__module__ = "shmdist"

logging.getLogger("shmdist").addHandler(logging.NullHandler())
