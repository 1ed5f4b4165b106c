"""The ssh configuration: which logins lead to a machine."""

import getpass
import os

import pytest

from shmdist.managers.ssh.config import find_route, read_config
from shmdist.managers.ssh.host_spec import Machine, parse_machine

PARAMS = {"known_hosts": None, "host_key_policy": None}


@pytest.fixture
def route(tmp_path):
    """Finds the way to a machine by a configuration."""

    def route(text, machine, **params):
        path = tmp_path / "config"
        path.write_text(text)
        return find_route(parse_machine(machine), {**PARAMS, **params}, read_config(path))

    return route


def test_nothing_configured(route):
    (hop,) = route("", "node")
    assert (hop.host, hop.port, hop.user) == ("node", 22, getpass.getuser())
    assert hop.agent and hop.policy == "reject" and hop.key_names == ("node",)
    assert os.path.expanduser("~/.ssh/id_ed25519") in hop.key_files
    assert os.path.expanduser("~/.ssh/known_hosts") == hop.known_hosts[0]
    (hop,) = route("", "me@node:2222")
    assert (hop.host, hop.port, hop.user) == ("node", 2222, "me")
    assert hop.key_names == ("[node]:2222", "node") and str(hop) == "me@node:2222"


def test_an_alias(route, tmp_path):
    text = f"""
    Host alias
        HostName real.example
        User them
        Port 2200
        IdentityFile {tmp_path}/%r_key
        IdentitiesOnly yes
        UserKnownHostsFile {tmp_path}/known {tmp_path}/more
        HostKeyAlias keyname
        StrictHostKeyChecking accept-new
    Host *
        User nobody
    """
    (hop,) = route(text, "alias")
    assert (hop.alias, hop.host, hop.port, hop.user) == ("alias", "real.example", 2200, "them")
    assert hop.key_files == (f"{tmp_path}/them_key",) and not hop.agent
    assert hop.known_hosts[:2] == (f"{tmp_path}/known", f"{tmp_path}/more")
    assert hop.key_names == ("keyname",) and hop.policy == "accept-new"
    # What the machine's text and the parameters say comes first.
    (hop,) = route(text, "me@alias:2222", known_hosts="/else", host_key_policy="reject")
    assert (hop.port, hop.user, hop.known_hosts, hop.policy) == (2222, "me", ("/else",), "reject")
    assert hop.key_files == (f"{tmp_path}/me_key",)


def test_jumps(route):
    text = """
    Host target
        ProxyJump me@first:2201,second
    Host second
        Port 2202
        ProxyJump ignored
    Host first
        ProxyJump zero
    Host uri
        ProxyJump ssh://you@first:2203
    Host none
        ProxyJump none
    """
    ways = [str(hop) for hop in route(text, "u@target")]
    me = getpass.getuser()
    assert ways == [f"{me}@zero:22", "me@first:2201", f"{me}@second:2202", "u@target:22"]
    assert [str(hop) for hop in route(text, "uri")][1:] == ["you@first:2203", f"{me}@uri:22"]
    assert len(route(text, "none")) == 1
    with pytest.raises(ValueError, match="circle"):
        route("Host a\nProxyJump b\nHost b\nProxyJump a\n", "a")


def test_commands(route):
    (hop,) = route("Host a\nProxyCommand nc -X %h %p %r\n", "me@a:2222")
    assert hop.proxy_command == "nc -X a 2222 me"
    assert route("Host a\nProxyCommand none\n", "a")[0].proxy_command is None


def test_includes(route, tmp_path):
    (tmp_path / "one.conf").write_text("User inner\nHost b\nUser bee\n")
    text = f"Host a\nInclude {tmp_path}/*.conf\nPort 2222\nHost *\nUser all\n"
    (hop,) = route(text, "a")
    assert (hop.user, hop.port) == ("inner", 2222)
    assert route(text, "c")[0].user == "all"
    (tmp_path / "self").write_text(f"Include {tmp_path}/self\n")
    with pytest.raises(ValueError, match="includes itself"):
        read_config(tmp_path / "self")


def test_what_is_wrong_is_named(route, tmp_path):
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot be read"):
        route("Host a\nthis-is-no-setting\n", "a")
    with pytest.raises(ValueError, match="host_key_policy must be one of reject, accept-new, not 'yes'"):
        route("", "a", host_key_policy="yes")
    # What OpenSSH calls "no" would take changed keys as well.
    assert route("StrictHostKeyChecking no\n", "a")[0].policy == "accept-new"


@pytest.mark.parametrize("value", ["$(a)", "a;b", "`a`", "-x", "a|b", "a&b"])
def test_names_of_the_configuration_are_no_commands(route, value):
    with pytest.raises(ValueError, match=r"the ssh configuration for 'a'.* no host name"):
        route(f"Host a\nHostName {value}\nProxyCommand nc %h %p\n", "a")
    with pytest.raises(ValueError, match=r"the ssh configuration for 'a'.* no user name"):
        route(f"Host a\nUser {value}\nProxyCommand nc -X %r %h %p\n", "a")
    with pytest.raises(ValueError, match=r"no host name|no user name"):
        route(f"Host a\nProxyJump {value}@b\n", "a")


def test_a_machine_made_by_hand_is_looked_at_too(tmp_path):
    """Before anything is run with its names."""
    text = f'Match exec "touch {tmp_path}/ran; true # %h"\nPort 1\n'
    for machine in (Machine("a", "$(touch b)"), Machine("a", "b", "x\nProxyCommand touch")):
        with pytest.raises(ValueError, match=r"no host name|no user name"):
            find_route(machine, PARAMS, text)
    assert not list(tmp_path.iterdir())
