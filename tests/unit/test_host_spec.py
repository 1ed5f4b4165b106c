"""Machine texts, and what they mean."""

import pytest

from shmdist.managers.ssh.host_spec import (
    Machine,
    check_hosts,
    env_for,
    for_machine,
    parse_machine,
    parse_machines,
)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("host", Machine("host", "host")),
        ("me@host", Machine("me@host", "host", "me")),
        ("me@corp@host", Machine("me@corp@host", "host", "me@corp")),
        ("host:2222", Machine("host:2222", "host", None, 2222)),
        ("host 10.0.0.1", Machine("host 10.0.0.1", "host", bind_addr="10.0.0.1")),
        ("me@host:22 10.0.0.1:9009", Machine("me@host:22 10.0.0.1:9009", "host", "me", 22, "10.0.0.1", 9009)),
        ("[fe80::1]", Machine("[fe80::1]", "fe80::1")),
        (
            "me@[::1]:2222 [fd00::2]:9009",
            Machine("me@[::1]:2222 [fd00::2]:9009", "::1", "me", 2222, "fd00::2", 9009),
        ),
        ("[fe80::1%eth0]", Machine("[fe80::1%eth0]", "fe80::1%eth0")),
        ("corp\\me@a_b-c.d", Machine("corp\\me@a_b-c.d", "a_b-c.d", "corp\\me")),
        ("bücher.example", Machine("bücher.example", "bücher.example")),
        (("host", 4), Machine("host", "host", count=4)),
        (["host", 4], Machine("host", "host", count=4)),
        (("host", "auto"), Machine("host", "host", count=None)),
    ],
)
def test_a_machine(item, expected):
    assert parse_machine(item) == expected
    assert parse_machines([item, "b"]) == [expected, Machine("b", "b")]


@pytest.mark.parametrize(
    ("item", "kind", "text"),
    [
        ("", ValueError, "not of the form"),
        ("a b c", ValueError, "not of the form"),
        ("@host", ValueError, "user before '@' is empty"),
        ("me@", ValueError, "no host name"),
        ("-oProxyCommand=x", ValueError, "no host name"),
        ("-x@host", ValueError, "no user name"),
        ("a;b", ValueError, "'a;b' is no host name: it has ';' in it"),
        ("$(a)", ValueError, "no host name"),
        ("`a`", ValueError, "no host name"),
        ("$(a)@host", ValueError, "no user name"),
        ("a\\@host", ValueError, "no user name"),
        ("a|b@host", ValueError, "no user name"),
        ("$a@host", ValueError, "no user name"),
        ("[::1;a]", ValueError, "no host name"),
        ("ho\x00st", ValueError, "no host name"),
        ("ho\x1bst", ValueError, "no host name"),
        ("m\x07e@host", ValueError, "no user name"),
        ("fe80::1", ValueError, r"in brackets, as in '\[fe80::1\]'"),
        ("[fe80::1", ValueError, "in brackets"),
        ("[fe80::1]22", ValueError, "in brackets"),
        ("host:", ValueError, "no port"),
        ("host:ssh", ValueError, "no port"),
        ("host:65536", ValueError, "no port"),
        ("host:0", ValueError, "no port"),
        (("host", 0), ValueError, "positive integer or 'auto'"),
        (("host", True), ValueError, "positive integer or 'auto'"),
        (("host", "many"), ValueError, "positive integer or 'auto'"),
        (("host", 1, 2), ValueError, "pair"),
        (3, TypeError, "a machine is a text"),
    ],
)
def test_no_machine(item, kind, text):
    with pytest.raises(kind, match=text):
        parse_machine(item)


def test_machines_come_as_a_list():
    with pytest.raises(TypeError, match=r"addprocs\(\['host'\]\)"):
        parse_machines("host")
    with pytest.raises(TypeError, match=r"addprocs\(\[\('host', 4\)\]\)"):
        parse_machines(("host", 4))
    assert [machine.host for machine in parse_machines(("a", "b"))] == ["a", "b"]
    with pytest.raises(ValueError, match="empty"):
        parse_machines([])


def test_values_for_each_machine():
    machine = parse_machine("me@node:2222 10.0.0.1")
    assert for_machine("all", machine) == "all"
    for name in ("node", "me@node", "me@node:2222", "me@node:2222 10.0.0.1"):
        assert for_machine({name: 1, "other": 2}, machine) == 1
    assert for_machine({"node": 1, "me@node": 2}, machine) == 2, "the most exact name counts"
    assert for_machine({"other": 2}, machine, "default") == "default"
    assert env_for({"A": 1}, machine) == {"A": "1"}
    assert env_for({"node": {"A": 1}, "other": {}}, machine) == {"A": "1"}
    assert env_for({"other": {"A": 1}}, machine) == {}
    assert env_for(None, machine) == {}
    check_hosts("env", {"A": 1}, [machine])
    check_hosts("dir", {"node": "/"}, [machine])
    with pytest.raises(ValueError, match=r"dir names the host 'nod', which is not among the machines: node"):
        check_hosts("dir", {"nod": "/"}, [machine])
    with pytest.raises(ValueError, match="env names the host"):
        check_hosts("env", {"nod": {"A": 1}}, [machine])
