"""Two ways to be stuck, and six things that a program does meanwhile: the others go on.

A third one, a host that falls silent, is in ``test_ssh_stuck``. Each operation by itself, and from each
moment, is tried by the stress test of this name.
"""

import pytest

from tests.integration import stuck
from tests.integration.helpers import until


@pytest.mark.parametrize("operation", stuck.OPERATIONS)
@pytest.mark.parametrize("how", [stuck.Stopped, stuck.Holding])
def test_the_others_go_on(cluster, tmp_path, how, operation):
    pid = cluster[0]
    trouble = how(pid, tmp_path)
    trouble.begin()
    work = stuck.Work(operation, cluster, pid)
    try:
        work.start()
        until(lambda: work.others >= stuck.ALONE[operation], 9, f"{operation}: the others' elements are done")
    finally:
        trouble.end()
    assert work.join() == stuck.OUTCOMES[operation]
    assert len(work.done) == (3 if operation == "everywhere" else stuck.COUNT), "each ran once"
    stuck.forget_names(cluster)
