"""A ProxyCommand that fails, and the program's working directory; neither needs a server."""

import os

import pytest

import shmdist as sd
from tests.integration.helpers import run_script, within


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("no-such-program %h %p", "there is no program 'no-such-program' here"),
        ("exec no-such-program %h %p", "there is no program 'no-such-program' here"),
        ("sh -c 'exit 3'", "it ended with code 3 before the server said anything"),
    ],
)
def test_a_proxy_command_that_fails_is_an_error_at_once(tmp_path, command, text):
    (tmp_path / "config").write_text(f"Host *\n  ProxyCommand {command}\n")
    with within(5), pytest.raises(sd.LaunchWorkerError, match=text) as caught:
        sd.addprocs(["host"], ssh_config=tmp_path / "config", known_hosts=tmp_path / "known")
    assert caught.value.phase == "connect" and command.split()[0] in str(caught.value)


def test_a_deleted_working_directory(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    ended = run_script(
        f"""
import os
os.rmdir({str(folder)!r})
import shmdist as sd
with sd.addprocs(1) as [a]:
    print(sd.remotecall_fetch(os.getcwd, a))
with sd.addprocs(1, dir="/") as [a]:
    print(sd.remotecall_fetch(os.getcwd, a))
""",
        cwd=folder,
    )
    assert ended.code == 0 and ended.out.splitlines() == [os.path.expanduser("~"), "/"]
    assert ended.err.count("working directory is gone") == 1 and "dir=" in ended.err


def test_addprocs_when_the_program_ends():
    ended = run_script(
        """
import atexit
def late():
    try:
        print(len(sd.addprocs(1)))
    except sd.ShmdistError as error:
        print(error)
atexit.register(late)
import shmdist as sd
sd.addprocs(1)
atexit.register(late)
"""
    )
    first, second = ended.clean().splitlines()
    assert first == "1" and "no more can be added" in second
