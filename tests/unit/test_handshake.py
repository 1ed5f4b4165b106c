import hashlib
import os
import pickle
import struct
import subprocess
import sys

import pytest

from shmdist.errors import AuthenticationError, VersionMismatch
from shmdist.transport import handshake
from shmdist.transport.handshake import PROTOCOL, Acceptor, Connector, Event, Role, State

COOKIE = "a cookie"
PYTHON = ".".join(map(str, sys.version_info[:3]))


def pair(connector_cookie=COOKIE, acceptor_cookie=COOKIE):
    return Connector(connector_cookie, 2), Acceptor(acceptor_cookie, 1)


def flip(data, index, bit=0):
    changed = bytearray(data)
    changed[index] ^= 1 << bit
    return bytes(changed)


def other_protocol(data, number=PROTOCOL + 1):
    return data[:8] + struct.pack(">H", number) + data[10:]


def assert_shut(machine):
    assert not machine.done
    assert machine.wants == 0
    assert machine.peer_pid == 0 or isinstance(machine, Connector)
    with pytest.raises(RuntimeError, match="illegal when failed"):
        machine.feed(b"")


class TestAgreement:
    def test_whole(self):
        connector, acceptor = pair()
        assert (connector.wants, acceptor.wants) == (0, 128)
        hello = connector.start()
        assert (len(hello), connector.wants) == (128, 160)
        answer = acceptor.feed(hello)
        assert (len(answer), acceptor.wants) == (160, 32)
        proof = connector.feed(answer)
        assert (len(proof), connector.wants) == (32, 128)
        assert not connector.done
        assert not acceptor.done
        welcome = acceptor.feed(proof)
        assert (len(welcome), acceptor.done, acceptor.wants) == (128, True, 0)
        assert connector.feed(welcome) == b""
        assert (connector.done, connector.wants) == (True, 0)
        for machine, pid in ((connector, 1), (acceptor, 2)):
            assert machine.peer_pid == pid
            assert machine.peer_python.startswith(PYTHON)
            assert machine.peer_version

    def test_peer_is_unknown_until_proved(self):
        connector, acceptor = pair()
        answer = acceptor.feed(connector.start())
        assert (acceptor.peer_pid, acceptor.peer_python, acceptor.peer_version) == (0, "", "")
        assert connector.peer_pid == 0
        connector.feed(answer)
        assert connector.peer_pid == 1

    @pytest.mark.parametrize("cookie", ["c", "ä" * 500, b"\0", b"\xff" * 64, b"x" * 65])
    def test_cookies(self, cookie):
        as_bytes = cookie.encode() if isinstance(cookie, str) else cookie
        connector, acceptor = pair(cookie, as_bytes)
        connector.feed(acceptor.feed(connector.feed(acceptor.feed(connector.start()))))
        assert connector.done
        assert acceptor.done

    @pytest.mark.parametrize("cookie", ["", b""])
    @pytest.mark.parametrize("kind", [Connector, Acceptor])
    def test_empty_cookie(self, kind, cookie):
        with pytest.raises(ValueError, match="empty"):
            kind(cookie, 1)

    def test_any_bytes_like(self):
        connector, acceptor = pair()
        answer = acceptor.feed(bytearray(connector.start()))
        assert len(connector.feed(memoryview(answer))) == 32

    def test_other_python_is_no_refusal(self, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(handshake.sys, "version", "3.99.1 (main)")
            connector = Connector(COOKIE, 2)
        acceptor = Acceptor(COOKIE, 1)
        acceptor.feed(connector.feed(acceptor.feed(connector.start())))
        assert acceptor.peer_python == "3.99.1"

    def test_nonces_are_fresh(self):
        assert len({Connector(COOKIE, 2).start() for _ in range(100)}) == 100

    def test_repr_hides_the_cookie(self):
        for machine in pair():
            assert COOKIE not in repr(machine)
        assert repr(Connector(COOKIE, 2)) == "<Connector idle, peer pid 0>"

    def test_cookie_is_never_sent(self):
        connector, acceptor = pair()
        hello = connector.start()
        answer = acceptor.feed(hello)
        proof = connector.feed(answer)
        assert COOKIE.encode() not in hello + answer + proof + acceptor.feed(proof)


class TestRefusal:
    def test_wrong_cookie_is_seen_by_the_connector_first(self):
        connector, acceptor = pair("one", "another")
        with pytest.raises(AuthenticationError, match="cookie refused") as caught:
            connector.feed(acceptor.feed(connector.start()))
        assert caught.value.reply == b""
        assert_shut(connector)
        assert connector.peer_pid == 0

    def test_wrong_proof_is_told(self):
        connector, acceptor = pair()
        connector.feed(acceptor.feed(connector.start()))
        with pytest.raises(AuthenticationError, match="cookie refused") as caught:
            acceptor.feed(bytes(32))
        assert_shut(acceptor)
        assert len(caught.value.reply) == 128
        with pytest.raises(AuthenticationError, match="refused by process 1: cookie refused"):
            connector.feed(caught.value.reply)
        assert_shut(connector)

    def test_wrong_magic(self):
        acceptor = Acceptor(COOKIE, 1)
        with pytest.raises(AuthenticationError, match="no shmdist process") as caught:
            acceptor.feed(b"GET / HTTP/1.1\r\n".ljust(128))
        assert caught.value.reply == b""
        assert_shut(acceptor)
        connector = Connector(COOKIE, 1)
        connector.start()
        with pytest.raises(AuthenticationError, match="no shmdist process"):
            connector.feed(b"SSH-2.0-OpenSSH".ljust(160))
        assert_shut(connector)

    @pytest.mark.parametrize("number", [0, PROTOCOL + 1, 65535])
    def test_wrong_protocol_is_told_to_both(self, monkeypatch, number):
        with monkeypatch.context() as patch:
            patch.setattr(handshake, "PROTOCOL", number)
            patch.setattr(handshake, "__version__", "9.8.7")
            connector = Connector(COOKIE, 2)
        acceptor = Acceptor(COOKIE, 1)
        with pytest.raises(VersionMismatch) as caught:
            acceptor.feed(connector.start())
        for part in (
            f"protocol {PROTOCOL}",
            f"protocol {number}",
            "shmdist 9.8.7",
            handshake.__version__,
            PYTHON,
        ):
            assert part in str(caught.value)
        assert_shut(acceptor)
        assert len(caught.value.reply) == 160
        assert caught.value.reply.endswith(bytes(32))  # No MAC for one who cannot use it.
        monkeypatch.setattr(handshake, "PROTOCOL", number)
        with pytest.raises(VersionMismatch, match=f"protocol {PROTOCOL}"):
            connector.feed(caught.value.reply)
        assert_shut(connector)

    def test_protocol_changed_on_the_way(self):
        connector, acceptor = pair()
        answer = acceptor.feed(connector.start())
        with pytest.raises(VersionMismatch) as caught:
            connector.feed(other_protocol(answer))
        assert caught.value.reply == b""

    def test_text_of_a_stranger_is_tame(self):
        hello = Connector(COOKIE, 2).start()
        hello = other_protocol(hello[:10] + b"\x1b[2J\n\xff".ljust(16, b"\0") + hello[26:])
        with pytest.raises(VersionMismatch) as caught:
            Acceptor(COOKIE, 1).feed(hello)
        assert str(caught.value).isprintable()

    def test_welcome_with_text_is_no_welcome(self):
        connector, acceptor = pair()
        acceptor.feed(connector.feed(acceptor.feed(connector.start())))
        with pytest.raises(AuthenticationError, match="refused by process 1: x"):
            connector.feed(b"\0x".ljust(128, b"\0"))

    def test_refusal_without_a_reason(self):
        connector, acceptor = pair()
        connector.feed(acceptor.feed(connector.start()))
        with pytest.raises(AuthenticationError, match="no reason given"):
            connector.feed(b"\1".ljust(128, b"\0"))


class TestAttacks:
    def test_reflection_of_everything(self):
        # One who knows nothing sends back whatever comes.
        connector = Connector(COOKIE, 2)
        hello = connector.start()
        with pytest.raises(AuthenticationError):
            connector.feed(hello + bytes(32))

        acceptor = Acceptor(COOKIE, 1)
        answer = acceptor.feed(hello)
        with pytest.raises(AuthenticationError):
            acceptor.feed(answer[128:])  # The acceptor's own MAC, as if it were the connector's.

    def test_reflection_through_a_second_connection(self):
        # Our own proofs, taken from another connection of the same two processes.
        first, second = Acceptor(COOKIE, 1), Acceptor(COOKIE, 1)
        connector = Connector(COOKIE, 2)
        hello = connector.start()
        proof = connector.feed(first.feed(hello))
        second.feed(hello)
        with pytest.raises(AuthenticationError):
            second.feed(proof)

    def test_labels_alone_tell_the_roles_apart(self):
        connector, acceptor = pair()
        connector.feed(acceptor.feed(connector.start()))
        assert connector._mac(Role.ACCEPTOR) == acceptor._mac(Role.ACCEPTOR)
        assert connector._mac(Role.CONNECTOR) != connector._mac(Role.ACCEPTOR)

    def test_replay_to_the_acceptor(self):
        connector, acceptor = pair()
        hello = connector.start()
        proof = connector.feed(acceptor.feed(hello))
        acceptor.feed(proof)
        again = Acceptor(COOKIE, 1)
        again.feed(hello)
        with pytest.raises(AuthenticationError):
            again.feed(proof)

    def test_replay_to_the_connector(self):
        connector, acceptor = pair()
        answer = acceptor.feed(connector.start())
        again = Connector(COOKIE, 2)
        again.start()
        with pytest.raises(AuthenticationError):
            again.feed(answer)

    @pytest.mark.parametrize("bit", [0, 7])
    def test_flips_in_hello(self, bit):
        for index in range(128):
            connector, acceptor = pair()
            with pytest.raises((AuthenticationError, VersionMismatch)):
                connector.feed(acceptor.feed(flip(connector.start(), index, bit)))
            assert not connector.done
            assert not acceptor.done

    @pytest.mark.parametrize("bit", [0, 7])
    def test_flips_in_hello_are_seen_by_the_acceptor_too(self, bit):
        # A connector that does not check: it proves itself for the HELLO it really sent.
        for index in range(10, 128):
            connector, acceptor = pair()
            hello = connector.start()
            answer = acceptor.feed(flip(hello, index, bit))
            connector._theirs = answer[:128]
            with pytest.raises(AuthenticationError):
                acceptor.feed(connector._mac(Role.CONNECTOR))
            assert_shut(acceptor)

    @pytest.mark.parametrize("bit", [0, 7])
    def test_flips_in_answer(self, bit):
        for index in range(160):
            connector, acceptor = pair()
            answer = acceptor.feed(connector.start())
            with pytest.raises((AuthenticationError, VersionMismatch)):
                connector.feed(flip(answer, index, bit))
            assert_shut(connector)

    @pytest.mark.parametrize("bit", [0, 7])
    def test_flips_in_proof(self, bit):
        for index in range(32):
            connector, acceptor = pair()
            proof = connector.feed(acceptor.feed(connector.start()))
            with pytest.raises(AuthenticationError):
                acceptor.feed(flip(proof, index, bit))
            assert_shut(acceptor)

    @pytest.mark.parametrize("bit", [0, 7])
    def test_flips_in_welcome(self, bit):
        for index in range(128):
            connector, acceptor = pair()
            welcome = acceptor.feed(connector.feed(acceptor.feed(connector.start())))
            with pytest.raises(AuthenticationError):
                connector.feed(flip(welcome, index, bit))
            assert_shut(connector)

    def test_truncated_and_too_long(self):
        for length in [*range(128), 129, 10_000]:
            acceptor = Acceptor(COOKIE, 1)
            hello = Connector(COOKIE, 2).start()
            with pytest.raises(AuthenticationError, match="of the 128 bytes of HELLO"):
                acceptor.feed((hello * 100)[:length])
            assert_shut(acceptor)
        connector, acceptor = pair()
        answer = acceptor.feed(connector.start())
        with pytest.raises(AuthenticationError, match="159 of the 160 bytes of ANSWER"):
            connector.feed(answer[:-1])
        with pytest.raises(AuthenticationError, match="0 of the 32 bytes of PROOF"):
            acceptor.feed(b"")

    def test_random_bytes(self):
        for _ in range(200):
            with pytest.raises((AuthenticationError, VersionMismatch)):
                Acceptor(COOKIE, 1).feed(b"SHMDIST\0"[: _ % 8] + os.urandom(128 - _ % 8))


class TestLifecycle:
    def test_start_twice(self):
        connector = Connector(COOKIE, 2)
        connector.start()
        with pytest.raises(RuntimeError, match="connector: 'start' is illegal when awaiting answer"):
            connector.start()

    def test_feed_before_start(self):
        with pytest.raises(RuntimeError, match="connector: 'feed' is illegal when idle"):
            Connector(COOKIE, 2).feed(bytes(160))

    def test_feed_after_the_end(self):
        connector, acceptor = pair()
        connector.feed(acceptor.feed(connector.feed(acceptor.feed(connector.start()))))
        with pytest.raises(RuntimeError, match="connector: 'feed' is illegal when done"):
            connector.feed(b"x")
        with pytest.raises(RuntimeError, match="acceptor: 'feed' is illegal when done"):
            acceptor.feed(b"")
        with pytest.raises(RuntimeError, match="'start' is illegal when done"):
            connector.start()
        assert connector.done
        assert acceptor.done

    def test_every_move_not_in_the_table_is_illegal(self):
        for kind, role in ((Connector, Role.CONNECTOR), (Acceptor, Role.ACCEPTOR)):
            for state in State:
                for event in Event:
                    machine = kind(COOKIE, 1)
                    machine._state = state
                    wanted = handshake._MOVES[role].get(state, {}).get(event)
                    if wanted is not None:
                        machine._move(event)
                        assert machine._state is wanted
                        continue
                    with pytest.raises(
                        RuntimeError, match=rf"{role.name.lower()}: '{event.value}' .*{state.value}"
                    ):
                        machine._move(event)
                    assert machine._state is state

    def test_tables_agree(self):
        for moves in handshake._MOVES.values():
            for state, events in moves.items():
                assert (Event.FAULT in events) == (state in handshake._EXPECTED)
                if state in handshake._EXPECTED:
                    assert handshake._EXPECTED[state][0] in events

    def test_an_unforeseen_error_shuts_the_machine(self, monkeypatch):
        acceptor = Acceptor(COOKIE, 1)
        hello = Connector(COOKIE, 2).start()
        monkeypatch.setattr(acceptor, "_mac", lambda role: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            acceptor.feed(hello)
        assert_shut(acceptor)


class TestHashes:
    def test_without_md5(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise ValueError("disabled for FIPS")

        monkeypatch.setattr(hashlib, "md5", refuse)
        self_test = TestAgreement()
        self_test.test_whole()

    def test_without_md5_from_the_start(self):
        code = (
            "import hashlib\n"
            "def refuse(*a, **k): raise ValueError('disabled for FIPS')\n"
            "hashlib.md5 = refuse; real = hashlib.new\n"
            "hashlib.new = lambda name, *a, **k: refuse() if 'md5' in name.lower() else real(name, *a, **k)\n"
            "from shmdist.transport.handshake import Connector, Acceptor\n"
            "c, a = Connector('x', 2), Acceptor('x', 1)\n"
            "c.feed(a.feed(c.feed(a.feed(c.start()))))\n"
            "print(c.done, a.done)\n"
        )
        folder = os.path.dirname(os.path.dirname(os.path.dirname(handshake.__file__)))
        env = {**os.environ, "PYTHONPATH": folder}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
        )
        assert done.stdout == "True True\n"

    def test_is_hmac_sha256(self):
        import hmac

        connector, acceptor = pair()
        hello = connector.start()
        answer = acceptor.feed(hello)
        label = b"shmdist handshake: proof of the acceptor\0"
        assert (
            answer[128:] == hmac.new(COOKIE.encode(), label + hello + answer[:128], hashlib.sha256).digest()
        )

    def test_refusals_pickle(self):
        with pytest.raises(AuthenticationError) as caught:
            Acceptor(COOKIE, 1).feed(b"")
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
