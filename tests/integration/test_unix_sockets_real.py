"""A pool on Unix sockets, end to end: real servers, both lanes, tokens, forks, restarts."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.pool_server import PoolServer
from tests.integration.server_process import ServerProcess, refused
from torchcache.cli.client_doctor import diagnose
from torchcache.connecting import connect
from torchcache.errors import ConfigurationError
from torchcache.model import Extent
from torchcache.pool import Pool

CONTENT = os.urandom(300_000)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short path, and a source in it."""
    with tempfile.TemporaryDirectory(prefix="tc-") as path:
        (Path(path) / "source").mkdir()
        (Path(path) / "source" / "a").write_bytes(CONTENT)
        yield Path(path)


def server(place: Path, name: str = "a.sock") -> ServerProcess:
    return ServerProcess(*arguments(place, name), token_file=place / "token")


def arguments(place: Path, name: str) -> tuple[object, ...]:
    return (
        *("--listen", f"unix://{place}/run/{name}", "--store", place / f"store-{name}"),
        *("--capacity", "200MB", "--under-store", f"file=file://{place}/source"),
        *("--token-file", place / "token", "--drain-s", "0.2"),
    )


def pool_of(place: Path, *names: str, lane: str, token: str | None = None) -> Pool:
    secret = (place / "token").read_text().strip()
    address = ",".join(f"unix://{place}/run/{name}" for name in names)
    return connect(address, token=token or secret, lane=lane)


def read(pool: Pool, place: Path) -> bytes:
    info = pool.stat(f"file://{place}/source/a")
    (view,) = pool.read([Extent(info)])
    return bytes(view)


@pytest.mark.forks
@pytest.mark.parametrize("lane", ["flight", "local"])
def test_a_child_reads_from_its_parents_pool(place: Path, lane: str) -> None:
    address = f"unix://{place}/run/a.sock"
    more = ("--listen", address)
    with PoolServer(place, source=place / "source", lane=lane, more=more) as one:
        assert one.address == address
        assert read(one.pool, place) == CONTENT
        assert one.pool.statistics().lanes == {address: lane}
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if read(one.pool, place) == CONTENT else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert read(one.pool, place) == CONTENT


@pytest.mark.parametrize("lane", ["flight", "local"])
def test_a_pool_of_two(place: Path, lane: str) -> None:
    with server(place), server(place, "b.sock"):
        sockets = [place / "run" / name for name in ("a.sock", "a.sock.data", "b.sock", "b.sock.data")]
        assert [path.stat().st_mode & 0o777 for path in sockets] == [0o600] * 4
        pool = pool_of(place, "a.sock", "b.sock", lane=lane)
        assert read(pool, place) == CONTENT
        assert pool.statistics().lanes == {
            f"unix://{place}/run/{name}": lane for name in ("a.sock", "b.sock")
        }
        assert [status.address for status in pool.status()] == sorted(pool.statistics().lanes)
        assert not [found for found in diagnose(pool) if found.state == "problem"]
        pool.close()


def test_the_token_is_asked_for_on_both_sockets(place: Path) -> None:
    with server(place) as one:
        stranger = pool_of(place, "a.sock", lane="flight", token="wrong")
        with pytest.raises(ConfigurationError):
            read(stranger, place)
        stranger.close()
        refs = one.client.objects("file")
        one.client.token = "wrong"
        with pytest.raises(Exception, match=r"(?i)token"):
            one.client.read(refs)


def test_a_path_is_one_servers_until_it_ends_however_that_is(place: Path) -> None:
    with server(place) as one:
        another = (*arguments(place, "a.sock"), "--store", place / "other")
        assert "another server listens" in refused(*another)
        pool = pool_of(place, "a.sock", lane="flight")
        assert read(pool, place) == CONTENT
        one.stop(signal.SIGKILL)
        assert (place / "run" / "a.sock").is_socket()  # nobody tidied up
        with server(place) as again:
            assert read(pool, place) == CONTENT
            pool.close()
            code, _ = again.stop()
            assert code == 0
    assert sorted(path.name for path in (place / "run").iterdir()) == ["a.sock.lock"]


def test_a_client_whose_socket_was_replaced_shows_nobody_its_token(place: Path) -> None:
    with server(place):
        (place / "run").chmod(0o777)
        with pytest.raises(ConfigurationError, match="others may write"):
            read(pool_of(place, "a.sock", lane="flight"), place)
