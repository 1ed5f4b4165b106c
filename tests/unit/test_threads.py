"""The threads of a node, at their end."""

import threading

from shmdist.runtime.threads import Threads


def test_a_thread_that_is_just_being_made_is_not_waited_for():
    threads = Threads(lambda strand: None)
    done = threading.Event()
    threads.start(done.set)
    assert done.wait(5)
    threads._all.add(threading.Thread(target=print))  # between its making and its start
    threads.close()
    assert threads.join(5.0)
