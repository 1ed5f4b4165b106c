"""shmdist: Julia's Distributed for Python, on ``multiprocessing.connection``.

Top-level modules are what a user sees; folders are mechanism::

    errors                         every exception class
    memory/  wire/                 bytes shared on a host; bytes between two processes
    runtime/                       one process: its node, its threads, the calls it runs
    managers/                      how workers come to be
    channels  futures  refs        Channel, Future, RemoteChannel
    calls  cluster  evaluation     remotecall...; addprocs...; everywhere
    tasks  pools  maps  loops      async_, sync; WorkerPool...; pmap; @distributed

A call goes ``calls`` -> ``runtime.node`` -> ``wire.codec`` -> ``wire.link``, and on the other
side ``wire.link`` -> ``runtime.dispatch`` -> ``runtime.task`` -> the function.
"""

import logging as _logging

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
from shmdist.channels import Channel
from shmdist.cluster import (
    WorkerList,
    addprocs,
    cluster_cookie,
    interrupt,
    myid,
    nprocs,
    nworkers,
    other_procs,
    other_workers,
    procs,
    rmprocs,
    workers,
)
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
from shmdist.evaluation import everywhere, remotecall_eval
from shmdist.futures import Future
from shmdist.loops import DistributedLoop, distributed, splitrange
from shmdist.managers.base import ClusterManager, WorkerConfig
from shmdist.managers.local import LocalManager
from shmdist.maps import ExponentialBackOff, pgenerate, pmap
from shmdist.pools import (
    AbstractWorkerPool,
    CachingPool,
    WorkerPool,
    clear,
    default_worker_pool,
    set_default_worker_pool,
)
from shmdist.refs import (
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
from shmdist.runtime.reftable import RRID, AlreadySet
from shmdist.runtime.replies import Cancelled
from shmdist.runtime.worker import init_worker, process_messages, start_worker
from shmdist.tasks import Task, async_, sync, timedwait

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

_logging.getLogger("shmdist").addHandler(_logging.NullHandler())
