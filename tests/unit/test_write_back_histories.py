"""Random histories of three servers that write one path: whoever is asked, what was acknowledged last is what counts.

Each server may be caught at any of its calls, and others go on meanwhile. One may be lost for good, if others have what
only the pool holds; and copies are made again, of what their maker believed to be wanted any time before.
"""

from __future__ import annotations

import os
import random
from contextlib import suppress

import pytest
from torchcache_server.cache.catalogue import HeldElsewhere
from torchcache_server.cache.saves import Save
from write_back_world import (
    KEY,
    LEASE_S,
    Bucket,
    Server,
    always_whole,
    manifest_of,
    metadata_of,
    parts_of,
    published,
    soon,
)

from torchcache.errors import AlreadyExists, CheckpointError, DeadlineExceeded, NotCommitted, Overloaded

SEED = int(os.environ.get("CRASH_SEED", "1"))
STEPS = 30
DEEPEST = 2
CALLS = 45
"""Of one operation, of which one is where it is caught."""

ALLOWED = (AlreadyExists, CheckpointError, DeadlineExceeded, NotCommitted, Overloaded)


class History:
    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._bucket = Bucket()
        always_whole(self._bucket)
        self._servers = [Server(self._bucket, name) for name in "abc"]
        self._busy: list[Server] = []
        self._written: dict[str, Server] = {}  # ids of saves that are being written, and where
        self._under_way: list[
            Save
        ] = []  # copies that were begun to be made again, from servers that may be gone
        self._lost = 0
        self._saves = 0
        self._moment = 0
        self._acknowledged: dict[str, int] = {}  # when, by id
        self._begun_last = 0  # when the commit began, of those acknowledged, that began last
        self.log: list[str] = []

    def run(self) -> None:
        for _ in range(STEPS):
            self._step()
            self._check()
        for save_id, server in self._written.items():
            server.write_back.abandon(KEY, save_id)
        for _ in range(10):
            for server in self._servers:
                server.clock_ahead_s += 1.2 * LEASE_S  # what lost ones have left is taken over
                server.write_back.tidy()
                with suppress(Overloaded, AlreadyExists):
                    server.upload()
            self._check()
        if self._acknowledged:
            self._assert_counts(published(self._bucket) or "nothing", "the under-store")

    def _check(self) -> None:
        for server in self._servers:
            if server in self._busy:
                continue
            try:
                status = server.write_back.get(KEY, deadline=soon(), check_claim=True)
            except HeldElsewhere:
                continue
            except NotCommitted:
                self._assert_counts("nothing", server.store.server_id)
            else:
                if not status.superseded and not status.uncertain:
                    self._assert_counts(status.save_id, server.store.server_id)

    def _assert_counts(self, save_id: str, who: str) -> None:
        """No save was acknowledged whose commit began when this one had been acknowledged already."""
        if save_id == "nothing":
            assert not self._acknowledged, f"{who} tells of nothing:\n" + "\n".join(self.log)
        elif save_id in self._acknowledged:
            assert self._acknowledged[save_id] > self._begun_last, f"{who} tells of {save_id}:\n" + "\n".join(
                self.log
            )

    # ---- what happens ----

    def _step(self) -> None:
        server = self._chance.choice(self._servers)
        if server in self._busy:
            return
        writing = (self._reserve, self._commit, self._abandon)
        act = self._chance.choices(
            [*writing, self._upload, self._restart, self._tidy, self._begin_copy, self._end_copy, self._lose],
            [30, 25, 10, 20, 5, 10, 20, 20, 10],
        )[0]
        self._busy.append(server)
        if (
            len(self._busy) <= DEEPEST
            and act not in (self._restart, self._lose)
            and self._chance.random() < 0.5
        ):
            server.gate.trap_at = server.gate.calls + self._chance.randrange(1, CALLS)
            server.gate.trap = self._some_steps
        self.log.append("  " * len(self._busy) + f"{server.store.server_id} {act.__name__[1:]}")
        try:
            act(server)
        except ALLOWED as error:
            self.log.append("  " * len(self._busy) + f"{server.store.server_id}: {error}"[:100])
        finally:
            server.gate.trap_at = None
            self._busy.remove(server)

    def _some_steps(self) -> None:
        for _ in range(self._chance.randrange(1, 4)):
            self._step()

    def _reserve(self, server: Server) -> None:
        save_id = str(self._saves)
        self._saves += 1
        server.reserve(save_id, overwrite=True, wait_s=0.01)
        self._written[save_id] = server

    def _commit(self, server: Server) -> None:
        save_id = self._one_of(server)
        if save_id is None:
            return
        files = [(name, len(data)) for name, data in parts_of(save_id).items()]
        server.put(save_id)
        began = self._moment = self._moment + 1
        other = self._chance.choice(self._servers)
        has_copy = other not in self._busy and self._chance.random() < 0.7
        if has_copy:
            other.put(save_id)
            other.write_back.prepare_copy(
                KEY,
                save_id,
                files,
                metadata_of(save_id),
                manifest_of(save_id),
                replaceable=server.write_back.replaceable(KEY),
                overwrite=True,
                writer="writer",
                owner=server.store.server_id,
                deadline=soon(),
            )
        status = server.write_back.commit(
            KEY,
            save_id,
            files,
            metadata_of(save_id),
            manifest_of(save_id),
            replicas=1 + has_copy,
            deadline=soon(),
        )
        self._moment += 1
        self._acknowledged[save_id] = self._moment
        self._begun_last = max(self._begun_last, began)
        self.log.append("  " * len(self._busy) + f"{save_id} is acknowledged")
        if has_copy and self._chance.random() < 0.7:
            other.write_back.confirm_copy(
                KEY, save_id, committed_unix_s=status.committed_unix_s, replicas=2, deadline=soon()
            )

    def _abandon(self, server: Server) -> None:
        save_id = self._one_of(server)
        if save_id is not None:
            server.write_back.abandon(KEY, save_id)
            server.write_back.tidy()

    def _upload(self, server: Server) -> None:
        server.upload()

    def _tidy(self, server: Server) -> None:
        server.write_back.tidy()

    def _restart(self, server: Server) -> None:
        server.restart()
        self._written = {save_id: where for save_id, where in self._written.items() if where is not server}

    def _begin_copy(self, _: Server) -> None:
        """By whoever has something to copy. Which server shall have it isn't decided yet."""
        for server in self._servers:
            holdings = server.write_back.holdings
            saves = [waiting.save for waiting in holdings.waiting() if server not in self._busy]
            self._under_way += [save for save in saves if holdings.is_responsible(save, deadline=soon())]

    def _end_copy(self, server: Server) -> None:
        if not self._under_way:
            return
        save = self._under_way.pop(self._chance.randrange(len(self._under_way)))
        server.put(save.save_id)
        self.log.append("  " * len(self._busy) + f"of {save.save_id}")
        server.write_back.prepare_copy(
            KEY,
            save.save_id,
            save.files,
            save.metadata,
            save.manifest,
            replaceable=save.replaceable,
            overwrite=save.overwrite,
            writer=save.writer,
            owner="whoever",
            committed_unix_s=save.committed_unix_s,
            replicas=save.replicas,
            deadline=soon(),
        )

    def _lose(self, server: Server) -> None:
        """For good, if others have all that only it and they hold; an empty one takes its place."""
        others = [other for other in self._servers if other is not server and other not in self._busy]
        elsewhere = {save.save_id for other in others for save in other.write_back.holdings.all()}
        if not {save.save_id for save in server.write_back.holdings.all()} <= elsewhere:
            return
        self._written = {save_id: where for save_id, where in self._written.items() if where is not server}
        server.gate.dead = True
        server.write_back.close()
        self._lost += 1
        self.log.append("  " * len(self._busy) + f"{server.store.server_id} is lost")
        self._servers[self._servers.index(server)] = Server(
            self._bucket, f"{server.store.server_id}{self._lost}"
        )

    def _one_of(self, server: Server) -> str | None:
        mine = [save_id for save_id, where in self._written.items() if where is server]
        if not mine:
            return None
        save_id = self._chance.choice(mine)
        del self._written[save_id]
        return save_id


def test_what_was_acknowledged_last_is_what_counts() -> None:
    for seed in range(SEED, SEED + 60):
        History(seed).run()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_ten_thousand_histories() -> None:
    for seed in range(SEED, SEED + 10_000):
        History(seed).run()
