"""A host that falls silent while a program does six things at once: the others go on."""

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration import stuck
from tests.integration.helpers import until, within
from tests.integration.sshd import needs_sshd

TIMEOUT = 4.0


@needs_sshd
def test_a_silent_host(fresh, host, server):
    """All at once; they end when the host is taken for lost, and no sooner."""
    local = fresh(2)
    [pid] = sd.addprocs([server.text], **server.params())
    trouble = stuck.Silent(host)
    trouble.begin()
    with within(TIMEOUT + 6):
        works = [stuck.Work(operation, [pid, *local], pid).start() for operation in stuck.OPERATIONS]
        for work in works:
            # Something was written, and it may be at that: one large element, or two short ones.
            enough = min(stuck.ALONE[work.kind], stuck.COUNT - (2 if work.kind == "broadcast" else 1))
            until(
                lambda work=work, enough=enough: work.others >= enough, 9, f"{work.kind}: the others are done"
            )
        assert pid in sd.procs(), "it took as long as to give the host up"
        for work in works:
            outcome = work.join()
            # What was not written whole has not begun, and goes to others when it is known that the host is lost.
            assert isinstance(outcome, Exception) or outcome == stuck.OUTCOMES[work.kind], work.kind
            assert work.others == len(work.done)
    assert pid not in current_node().peers.links
    stuck.forget_names([1, *local])
