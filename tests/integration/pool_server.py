"""A server on a store that tests do harm to, its pool, and the self-describing data that goes through both."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.integration.self_describing import content, difference
from tests.integration.store_process_parts import Starter, forking
from torchcache.connecting import connect
from torchcache.errors import NotResident, TorchCacheError
from torchcache.model import Extent, ObjectInfo
from torchcache.pool import Pool
from torchcache.pool.reports import ServerStatus

DEADLINE_S = 60.0


class PoolServer:
    """One server, from `start` to the end of the `with` block; over restarts its pool is a new one.

    Everything lies under `folder`: its token, its log and, unless they are given, the source of its
    under-store `file` and its store.
    """

    def __init__(
        self,
        folder: Path,
        *,
        source: Path | None = None,
        store: Path | None = None,
        capacity: str = "1GB",
        starter: Starter | None = None,
        lane: str | None = None,
        more: Sequence[str] = (),
    ) -> None:
        self.source = source or folder / "source"
        self.source.mkdir(exist_ok=True)
        self.store = store or folder / "store"
        self.log = folder / "server.log"
        self._token = folder / "token"
        self._lane = lane
        self._starter = starter or forking()
        self._arguments = [
            *("--listen", "127.0.0.1:0", "--store", str(self.store), "--token-file", str(self._token)),
            *(
                "--capacity",
                capacity,
                "--under-store",
                f"file=file://{self.source}",
                "--drain-s",
                "0.2",
                "--scrub-rate",  # damage is found by whoever reads, whenever the scrub would have come by
                "0",
                *more,
            ),
        ]

    def __enter__(self) -> PoolServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()
        self.life.end()

    def start(self) -> None:
        self.life = self._starter.start(self._arguments, self.log)
        try:
            self.address = self.life.wait_ready()
        except BaseException:
            self.life.end()
            raise
        self.pool: Pool = connect(self.address, token=self.token, lane=self._lane)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int | None:
        """Ends the process; its exit code."""
        self.pool.close()
        return self.life.end(number)

    def restart(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.end(number)
        self.start()

    @property
    def token(self) -> str:
        return self._token.read_text().strip()

    @property
    def status(self) -> ServerStatus:
        """Also proof that the same process lives on."""
        assert self.life.alive, self.log.read_text()[-3000:]
        return self.pool.status()[0]

    # ---- checkpoints ----

    def save(self, path: str, number: int, size: int, *, overwrite: bool = False) -> None:
        from tests.integration.described_saves import save  # torch, which other processes need not import

        save(self.pool, self._uri(path), number, size, overwrite=overwrite)

    def assert_loads(self, path: str, number: int, size: int) -> None:
        from tests.integration.described_saves import load

        assert load(self.pool, self._uri(path), size) == (number, [])

    def hinder_upload(self, path: str) -> Path:
        """Puts a folder in the way of a checkpoint's first file; to be removed for the upload to succeed."""
        (self.source / path / "__0_0.distcp" / "in the way").mkdir(parents=True)
        return self.source / path / "__0_0.distcp"

    def _uri(self, path: str) -> str:
        return f"file://{self.source}/{path}"


class Dataset:
    """Self-describing objects in a folder of a server's source."""

    def __init__(self, server: PoolServer, name: str, sizes: Iterable[int]) -> None:
        folder = server.source / name
        folder.mkdir()
        self.namespace = f"file://{folder}"
        self._objects: list[tuple[str, ObjectInfo]] = []
        for number, size in enumerate(sizes):
            key = f"{name}/{number}"
            (folder / str(number)).write_bytes(content(key, 0, size))
            self._objects.append((key, server.pool.stat(f"{self.namespace}/{number}")))

    def read(self, pool: Pool, *, timeout_s: float = DEADLINE_S) -> None:
        """Reads all of it, and every byte must be right (I1)."""
        assert self._read(pool, resident_only=False, timeout_s=timeout_s) == len(self._objects)

    def resident(self, pool: Pool) -> int:
        """How many objects the pool still holds whole, each read and found right."""
        return self._read(pool, resident_only=True, timeout_s=DEADLINE_S)

    def _read(self, pool: Pool, *, resident_only: bool, timeout_s: float) -> int:
        extents = [Extent(info) for _, info in self._objects]
        outcomes = pool.read_each(
            extents, namespace=self.namespace, resident_only=resident_only, timeout_s=timeout_s
        )
        right = 0
        for (key, info), outcome in zip(self._objects, outcomes, strict=True):
            if isinstance(outcome, TorchCacheError):
                if resident_only and isinstance(outcome, NotResident):
                    continue
                raise outcome
            assert len(outcome) == info.size
            assert not difference(key, 0, 0, outcome)
            right += 1
        return right
