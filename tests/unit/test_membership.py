"""A server's announcement: kept, made again when it was lost, withdrawn at the end."""

from __future__ import annotations

import threading
from typing import Any, cast

from torchcache_server.process.membership import Membership

from torchcache.errors import ServerUnavailable
from torchcache.registry import Announcement, Registry

SERVER = Announcement(server_id="s1", address="10.0.0.1:7440", instance="i1")


class Script:
    """A registry that does as it is told, and notes what it was asked."""

    address = "etcd://h/p"

    def __init__(self) -> None:
        self.away = False
        self.forgets = False
        self.calls: list[str] = []
        self.changed = threading.Condition()

    def _note(self, call: str) -> None:
        with self.changed:
            self.calls.append(call)
            self.changed.notify_all()
        if self.away:
            raise ServerUnavailable("away")

    def wait_for(self, *calls: str, forgets: bool = False) -> None:
        """From now on; `forgets`: at once it knows of no server any more."""
        with self.changed:
            self.calls.clear()
            self.forgets = forgets
            assert self.changed.wait_for(lambda: set(calls) <= set(self.calls), 60), self.calls

    def announce(self, server: Announcement, ttl_s: int) -> object:
        assert (server, ttl_s) == (SERVER, 1)
        self._note("announce")
        with self.changed:
            self.forgets = False
        return object()

    def keep(self, lease: object) -> bool:
        with self.changed:
            self._note("keep")
            return not self.forgets

    def withdraw(self, lease: object) -> None:
        self._note("withdraw")

    def close(self) -> None:
        self.calls.append("close")


def join(script: Script) -> Membership:
    return Membership(cast(Registry, cast(Any, script)), SERVER, lease_s=1)


def test_it_is_announced_at_once_kept_and_withdrawn() -> None:
    script = Script()
    membership = join(script)
    assert script.calls[0] == "announce"
    script.wait_for("keep")
    membership.close()
    assert script.calls[-2:] == ["withdraw", "close"]
    assert script.calls.count("announce") == 0
    membership.close()
    assert script.calls.count("withdraw") == 1


def test_a_registry_that_forgot_it_is_told_again() -> None:
    script = Script()
    membership = join(script)
    script.wait_for("keep", "announce", forgets=True)
    membership.close()


def test_it_serves_on_while_the_registry_is_away() -> None:
    script = Script()
    script.away = True
    membership = join(script)
    script.wait_for("announce")
    script.away = False
    script.wait_for("keep")
    script.away = True
    membership.close()
    assert script.calls[-2:] == ["withdraw", "close"]
