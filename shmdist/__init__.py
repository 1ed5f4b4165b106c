"""shmdist."""
from shmdist.errors import *
from shmdist._captured import *
from shmdist.errors import ShmdistError, RemoteException, ProcessExitedException, LaunchWorkerError, ChannelClosed, CompositeException, SerializationError
from shmdist.refs import *
from shmdist.refs import Future, RemoteChannel, fetch, wait, put, take, isready, close, isopen, isempty
from shmdist.channels import Channel
from shmdist.calls import *
from shmdist.cluster import *
from shmdist.managers.local import LocalManager
from shmdist.runtime.reftable import RRID, AlreadySet
from shmdist.runtime.node import Cancelled
