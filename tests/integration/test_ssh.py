"""Workers on other hosts, through real SSH servers on the loopback interface."""

import os

import numpy as np
import pytest

import shmdist as sd
from tests.integration import helpers
from tests.integration.helpers import until, within
from tests.integration.sshd import needs_sshd

pytestmark = needs_sshd


def descriptors():
    return len(os.listdir("/proc/self/fd"))


# ---------------------------------------------------------------------- the road


@pytest.mark.parametrize("tunnel", [False, True])
def test_calls_arrays_and_maps(sshd, tunnel):
    logins = sshd.logins()
    with within(30), sd.addprocs([(sshd.text, 2)], tunnel=tunnel, **sshd.params()) as pids:
        assert sd.remotecall_fetch(os.getpid, pids[0]) != os.getpid()
        array = np.arange(1 << 20, dtype=float)
        there = sd.remotecall_fetch(np.multiply, pids[0], array, 2.0)
        assert np.array_equal(there, array * 2) and there.flags.writeable
        assert sd.pmap(lambda x: x * x, range(20)) == [x * x for x in range(20)]
        # One worker calls the other.
        assert sd.remotecall_fetch(sd.remotecall_fetch, pids[0], sd.myid, pids[1]) == pids[1]
        with pytest.raises(ZeroDivisionError):
            sd.remotecall_fetch(divmod, pids[1], 1, 0)
        listening = sd.remotecall_fetch(addresses, pids[0])
        assert listening == ["127.0.0.1"]
    assert sshd.logins() == logins + 1, "one login for both workers"
    assert not set(pids) & set(sd.procs())


def addresses():
    from shmdist.runtime.node import current_node

    node = current_node()
    return [place[0] for family, place in node.peers[node.pid].addresses if family == "tcp"]


def test_nothing_is_left_of_a_cluster(sshd):
    with sd.addprocs([sshd.text], tunnel=True, **sshd.params()):
        pass
    before, threads = descriptors(), helpers.threading.active_count()
    for tunnel in (False, True):
        with sd.addprocs([(sshd.text, 2)], tunnel=tunnel, **sshd.params()) as pids:
            ospids = [sd.remotecall_fetch(os.getpid, pid) for pid in pids]
        until(lambda: not any(map(helpers.is_alive, ospids)))  # noqa: B023 - called here alone
    until(lambda: descriptors() <= before, what=f"no more than {before} descriptors")
    until(lambda: helpers.threading.active_count() <= threads, what=f"no more than {threads} threads")
