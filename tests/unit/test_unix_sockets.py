"""Unix sockets as addresses, and what a server and its clients make sure of before they use one."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from time import monotonic

import pytest
from torchcache_server.process.config import ServerConfig, Tls, from_settings
from torchcache_server.process.several import arguments, split
from torchcache_server.process.socket_files import SocketFiles

from torchcache.addresses import MOST_PATH_BYTES
from torchcache.errors import ConfigurationError, ServerUnavailable
from torchcache.lanes.access import Access
from torchcache.lanes.base import ReadOptions
from torchcache.lanes.flight import FlightLane
from torchcache.model import Extent, ObjectId, ObjectInfo
from torchcache.pool.control import ControlClient
from torchcache.pool.members import Endpoint, parse_address
from torchcache.unix_sockets import check_socket
from torchcache.wire.v1 import cache_pb2

ME = os.geteuid()


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short path: that of a socket has little room."""
    with tempfile.TemporaryDirectory(prefix="tc-") as path:
        yield Path(path)


def listening(path: Path) -> socket.socket:
    found = socket.socket(socket.AF_UNIX)
    found.bind(str(path))
    found.listen()
    return found


def config(listen: str, **more: object) -> ServerConfig:
    settings = {"listen": listen, "store": "/s", "capacity": 10**9, "under_stores": {"s3": "s3://"}}
    return from_settings(settings | more)


# ---- addresses ----


def test_a_pool_may_be_of_sockets_and_ports() -> None:
    found = parse_address("unix:///run/tc/a.sock, unix:///run/tc/b-1.sock,host:7440")
    assert found[:2] == (Endpoint(host="/run/tc/a.sock", port=0), Endpoint(host="/run/tc/b-1.sock", port=0))
    assert [one.address for one in found] == ["unix:///run/tc/a.sock", "unix:///run/tc/b-1.sock", "host:7440"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unix://run/a.sock", "is no socket"),
        ("unix:///", "is no socket"),
        ("unix:////run/a.sock", "is no socket"),
        ("unix:///run/../a.sock", "is no socket"),
        ("unix:///run/a%2fb", "is no socket"),
        ("unix:///run/a b", "is no socket"),
        ("unix:///run/a\0b", "is no socket"),
        ("unix:///run/a/", "is no socket"),
        ("unix:///" + "a" * MOST_PATH_BYTES, f"{MOST_PATH_BYTES} are the most"),
        ("unix:///run/a,unix:///run/a", "twice"),
        ("http://h:1", "is no pool address"),
    ],
)
def test_other_paths_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_address(text)
    if "," not in text and text.startswith("unix"):
        with pytest.raises(ConfigurationError, match=message):
            config(text)


def test_a_server_on_a_socket_has_neither_tls_nor_others_to_be_known_to() -> None:
    assert config("unix:///run/tc/a.sock").address == "unix:///run/tc/a.sock"
    with pytest.raises(ConfigurationError, match="drop --tls-cert"):
        config("unix:///run/tc/a.sock", tls_cert="/c", tls_key="/k")
    with pytest.raises(ConfigurationError, match="drop --join"):
        config("unix:///run/tc/a.sock", join="etcd://h/p")
    assert config("127.0.0.1:1", tls_cert="/c", tls_key="/k").tls == Tls(
        certificate=Path("/c"), key=Path("/k")
    )


def test_several_servers_have_a_socket_each() -> None:
    parts = split(config("unix:///run/tc/a.sock", servers=2))
    assert [part.address for part in parts] == ["unix:///run/tc/a.sock.0", "unix:///run/tc/a.sock.1"]
    assert list(arguments(parts[1]))[:2] == ["--listen", "unix:///run/tc/a.sock.1"]


# ---- the server's side ----


def test_what_a_dead_server_left_is_removed_and_ones_own_at_the_end(folder: Path) -> None:
    path = folder / "made" / "a.sock"
    path.parent.mkdir(mode=0o700)
    for file in (path, Path(f"{path}.data")):
        listening(file).close()
        assert file.is_socket()
    files = SocketFiles(str(path))
    assert not path.exists()
    assert not Path(f"{path}.data").exists()
    with closing(listening(path)), closing(listening(Path(f"{path}.data"))):
        files.protect()
        assert path.stat().st_mode & 0o777 == 0o600
        assert Path(f"{path}.data").stat().st_mode & 0o777 == 0o600
    files.close()
    assert not path.exists()


def test_its_folder_is_made_for_its_user_alone(folder: Path) -> None:
    SocketFiles(str(folder / "new" / "a.sock")).close()
    assert (folder / "new").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made_is_refused_with_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in /run, for all but root."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigurationError, match=r"Permission denied\. Let root make it .*\$XDG_RUNTIME_DIR"):
        SocketFiles(str(folder / "new" / "a.sock"))


def test_one_that_serves_is_left_alone(folder: Path) -> None:
    path = folder / "a.sock"
    first = SocketFiles(str(path))  # nothing is bound yet
    with pytest.raises(ConfigurationError, match="another server listens"):
        SocketFiles(str(path))
    first.close()
    for file in (path, Path(f"{path}.data")):
        with closing(listening(file)), pytest.raises(ConfigurationError, match="another server listens"):
            SocketFiles(str(path))
        assert file.is_socket()
        file.unlink()
    SocketFiles(str(path)).close()


def test_what_is_no_socket_is_neither_removed_nor_followed(folder: Path) -> None:
    path = folder / "a.sock"
    path.write_text("precious")
    with pytest.raises(ConfigurationError, match="no socket"):
        SocketFiles(str(path))
    assert path.read_text() == "precious"
    path.rename(folder / "kept")
    path.symlink_to("kept")
    with pytest.raises(ConfigurationError, match="no socket"):
        SocketFiles(str(path))
    path.unlink()
    (folder / "a.sock.lock").unlink()
    (folder / "a.sock.lock").symlink_to("kept")
    with pytest.raises(ConfigurationError, match="can't be used"):
        SocketFiles(str(path))
    assert (folder / "kept").read_text() == "precious"


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
def test_a_folder_that_others_may_write_is_refused_at_both_ends(folder: Path, mode: int) -> None:
    path = folder / "a.sock"
    with closing(listening(path)):
        check_socket(str(path))
        folder.chmod(mode)
        with pytest.raises(ConfigurationError, match="others may write"):
            check_socket(str(path))
    path.unlink()
    with pytest.raises(ConfigurationError, match="others may write"):
        check_socket(str(path))  # who comes first would be shown the token
    with pytest.raises(ConfigurationError, match="others may write"):
        SocketFiles(str(path))


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_the_way_to_it_may_not_be_others_to_change(folder: Path, mode: int) -> None:
    path = folder / "shared" / "own" / "a.sock"
    path.parent.mkdir(parents=True, mode=0o700)
    (folder / "link").symlink_to("shared/own")
    for name in (path, folder / "link" / "a.sock"):
        path.parent.parent.chmod(0o1777)  # as /tmp is
        check_socket(str(name))
        SocketFiles(str(name)).close()
        path.parent.parent.chmod(mode)
        with pytest.raises(ConfigurationError, match=r"others may write .*/shared, on the way"):
            check_socket(str(name))
        with pytest.raises(ConfigurationError, match=r"others may write .*/shared, on the way"):
            SocketFiles(str(name))


@pytest.mark.skipif(ME != 0, reason="only root gives files away")
def test_it_is_not_reached_over_links_of_others(folder: Path) -> None:
    (folder / "own").mkdir(mode=0o700)
    (folder / "theirs").symlink_to("own")
    (folder / "link").symlink_to("theirs")
    os.lchown(folder / "theirs", 4711, -1)
    for name in ("theirs", "link"):
        with pytest.raises(
            ConfigurationError, match="theirs, on the way to the socket, is a link of user 4711"
        ):
            check_socket(str(folder / name / "a.sock"))
    check_socket(str(folder / "own" / "a.sock"))


# ---- the client's side ----


def test_the_token_is_shown_to_ones_own_server_alone(folder: Path) -> None:
    path = folder / "a.sock"
    check_socket(str(path))  # nobody is there, nor can be but ourselves: connecting tells
    check_socket(str(folder / "none" / "a.sock"))
    with closing(listening(path)):
        check_socket(str(path))
        stranger = ME + 1
        if ME != 0:
            with pytest.raises(ConfigurationError, match="belongs to user"):
                check_socket(str(path), stranger)
        (folder / "link.sock").symlink_to("a.sock")
        with pytest.raises(ConfigurationError, match="a symbolic link"):
            check_socket(str(folder / "link.sock"))
    (folder / "file").touch()
    with pytest.raises(ConfigurationError, match="no socket"):
        check_socket(str(folder / "file"))


@pytest.mark.skipif(ME != 0, reason="only root gives files away")
def test_sockets_and_folders_of_other_users_are_refused(folder: Path) -> None:
    path = folder / "a.sock"
    with closing(listening(path)):
        os.chown(path, 4711, -1)
        with pytest.raises(ConfigurationError, match="belongs to user 4711"):
            check_socket(str(path), 4712)
        os.chown(path, 4712, -1)
        check_socket(str(path), 4712)
        os.chown(folder, 4711, -1)
        with pytest.raises(ConfigurationError, match="belongs to user 4711"):
            check_socket(str(path), 4712)
    path.unlink()
    with pytest.raises(ConfigurationError, match="belongs to user 4711"):
        SocketFiles(str(path))
    with pytest.raises(ConfigurationError, match="belongs to user 4711"):
        check_socket(str(path), 4712)
    check_socket(str(path), 4711)
    check_socket(str(path), 0)  # root takes everybody's


def test_a_socket_that_strangers_may_have_put_there_since_is_shown_no_token(folder: Path) -> None:
    """By either lane's calls: the connection was made when all was well, and is made anew by gRPC itself."""
    path, access = folder / "a.sock", Access(token="secret")
    control = ControlClient(f"unix://{path}", access)
    lane = FlightLane(str(path), 0, access=access, server=f"unix://{path}", server_id="id")
    extents = [Extent(ObjectInfo(ObjectId("s3", "a", "v"), 1))]
    try:
        for _ in range(2):
            with pytest.raises(ServerUnavailable):
                control.call("GetInfo", cache_pb2.InfoRequest(), deadline=monotonic() + 60)
            [outcome] = lane.read(extents, [None], ReadOptions(), deadline=monotonic() + 60)
            assert isinstance(outcome, ServerUnavailable)
        folder.chmod(0o777)
        with pytest.raises(ConfigurationError, match="others may write"):
            control.call("GetInfo", cache_pb2.InfoRequest(), deadline=monotonic() + 60)
        [outcome] = lane.read(extents, [None], ReadOptions(), deadline=monotonic() + 60)
        assert isinstance(outcome, ConfigurationError)
    finally:
        control.close()
        lane.close()
