"""Files and folders that change into something else under a server that runs: refused, or the right bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pytest

from tests.hostile.hostile_server import CONTENT, SECRET, HostileServer, outcome
from tests.hostile.places import KINDS, swapped, swapping, take_away
from tests.integration.server_process import ServerProcess, refused
from tests.waiting import until
from torchcache.errors import TorchCacheError
from torchcache.model import ObjectId, ObjectInfo, chunk_digest
from torchcache.save_names import CLAIM_NAME
from torchcache.wire.codec import encode_chunks
from torchcache.wire.v1 import cache_pb2 as pb

NUMBERS = count()
SMALL = b"what lies in a folder of its own"
MAKE: dict[str, Callable[[Path, Path], None]] = {
    "symlink": lambda path, outside: path.symlink_to(outside),
    "pipe": lambda path, _: os.mkfifo(path),
    "folder": lambda path, _: path.mkdir(),
}
SAVE = pb.SaveRef(store="file", path="races/step-1", save_id="id1")


@pytest.fixture
def place(server: HostileServer) -> Iterator[Path]:
    """A folder in the under-store with the file `x`. It is gone before the server is looked at."""
    folder = server.source / "races"
    folder.mkdir()
    (folder / "x").write_bytes(SMALL)
    yield folder
    server.client.call("Evict", pb.EvictRequest(namespace="n"))
    take_away(folder)


def listed(server: HostileServer, key: str) -> Any:
    (ref,) = [ref for ref in server.client.objects("file", key) if ref.key == key]
    return ref


def assert_refused_or(right: bytes, got: object) -> None:
    """What a read gave, or its error."""
    if isinstance(got, bytes):
        assert got == right
    else:
        assert '"error"' in str(got) or isinstance(got, TorchCacheError), got
        assert SECRET.decode() not in str(got)


def publish(server: HostileServer, key: str) -> Any:
    write_id = f"races-{next(NUMBERS)}"  # an answer once given is given again
    ref = pb.ObjectRef(store="file", key=key, version=f"save:{write_id}", size=len(CONTENT))
    server.put(
        f"put:file/{key}@{write_id}",
        [ref],
        [encode_chunks([(0, 0, chunk_digest(CONTENT), pa.py_buffer(CONTENT))])],
    )
    request = pb.PublishRequest(store="file", key=key, write_id=write_id, size=len(CONTENT), wait_s=20)
    return server.client.call("PublishObject", request)


@pytest.mark.hostile("races")
@pytest.mark.parametrize("kind", KINDS)
def test_an_object_that_became_something_else_since_it_was_listed(
    server: HostileServer, place: Path, kind: str
) -> None:
    ref = listed(server, "races/x")
    with swapped(server, place / "x", kind):
        (got,) = server.client.read([ref], timeout_s=20)
        assert isinstance(got, str), got
        assert_refused_or(SMALL, got)
        found = outcome(lambda: server.client.call("StatObject", pb.StatRequest(store="file", key="races/x")))
        # A hard link is the file itself: nobody can tell.
        assert isinstance(found, TorchCacheError) or kind == "a hard link out"
    assert server.client.read([listed(server, "races/x")]) == [SMALL]


FOLDERS = ("a symlink to a folder", "a symlink to nothing", "a symlink to itself", "a pipe", "a socket")


@pytest.mark.hostile("races")
@pytest.mark.parametrize("kind", FOLDERS)
def test_an_object_whose_folder_became_something_else(server: HostileServer, place: Path, kind: str) -> None:
    ref = listed(server, "races/x")
    (server.folder / "outside" / "sub" / "x").write_bytes(SECRET)
    try:
        with swapped(server, place, kind):
            (got,) = server.client.read([ref], timeout_s=20)
            assert isinstance(got, str) and SECRET.decode() not in got
            found = outcome(lambda: server.client.objects("file", "races/"))
            assert isinstance(found, TorchCacheError) or not found
            assert isinstance(outcome(partial(publish, server, "races/new")), TorchCacheError)
            deleted = pb.DeleteRequest(store="file", key="races/x")
            outcome(lambda: server.client.call("DeleteObject", deleted))
            assert (server.folder / "outside" / "sub" / "x").read_bytes() == SECRET
    finally:
        (server.folder / "outside" / "sub" / "x").unlink()


@pytest.mark.hostile("races")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_where_something_else_lies_goes_nowhere_else(
    server: HostileServer, place: Path, kind: str
) -> None:
    """It takes the place, or is refused; it isn't written through a link."""
    with swapped(server, place / "x", kind):
        done = outcome(partial(publish, server, "races/x"))
        if not isinstance(done, TorchCacheError):
            assert (place / "x").is_file() and not (place / "x").is_symlink()
            assert (place / "x").read_bytes() == CONTENT
    assert not (server.folder / "outside" / "new").exists()


@pytest.mark.hostile("races")
@pytest.mark.parametrize("kind", KINDS)
def test_temporary_files_that_are_none(server: HostileServer, place: Path, kind: str) -> None:
    """They look like what a writer who was killed left there; the first write into a folder removes that."""
    planted = place / ".torchcache-tmp-0123456789abcdef0123456789abcdef"
    KINDS[kind](planted, server)
    assert not isinstance(outcome(partial(publish, server, "races/new")), TorchCacheError)
    assert (place / "new").read_bytes() == CONTENT
    assert [ref.key for ref in server.client.objects("file", "races/")] == ["races/new", "races/x"]


@pytest.mark.hostile("races")
@pytest.mark.parametrize("kind", KINDS)
def test_a_claim_that_became_something_else(server: HostileServer, place: Path, kind: str) -> None:
    """Between a save's beginning and its end, which may be neither renewed nor said to be what it isn't."""
    server.client.call("ReserveSave", pb.ReserveSaveRequest(save=SAVE, writer="hostile"))
    asked = pb.GetSaveRequest(store="file", path=SAVE.path, check_claim=True)
    with swapped(server, place / "step-1" / CLAIM_NAME, kind):
        outcome(lambda: server.client.call("RenewSave", pb.RenewSaveRequest(save=SAVE)))
        found = outcome(lambda: server.client.call("GetSave", asked))
        assert isinstance(found, TorchCacheError) or found.state != pb.SAVE_STATE_COMMITTED
    server.client.call("AbandonSave", pb.AbandonSaveRequest(save=SAVE))
    until(lambda: not (place / "step-1" / CLAIM_NAME).exists())
    assert not (server.folder / "outside" / "new").exists()


RACERS = ("a symlink out", "a symlink to itself", "a device", "a pipe", "a folder", "a hard link out")


@pytest.mark.hostile("races")
@pytest.mark.parametrize("kind", RACERS)
def test_an_object_that_changes_back_and_forth_while_it_is_read(
    server: HostileServer, place: Path, kind: str
) -> None:
    ref = listed(server, "races/x")
    with swapping(server, place / "x", kind) as turns:
        before = turns()
        for _ in range(30):
            (got,) = server.client.read([ref], timeout_s=20)
            assert_refused_or(SMALL, got)
            outcome(lambda: server.client.call("StatObject", pb.StatRequest(store="file", key="races/x")))
            outcome(lambda: server.client.objects("file", "races/"))
            server.client.call("Evict", pb.EvictRequest(namespace="n"))
        until(lambda: turns() > before)


@pytest.mark.hostile("races")
@pytest.mark.parametrize("kind", ["a symlink to a folder", "a symlink to nothing", "a pipe", "a folder"])
def test_a_folder_that_changes_back_and_forth_while_it_is_written_to(
    server: HostileServer, place: Path, kind: str
) -> None:
    inner = place / "inner"
    inner.mkdir()
    with swapping(server, inner, kind) as turns:
        before = turns()
        for number in range(20):
            outcome(partial(publish, server, f"races/inner/{number}"))
        until(lambda: turns() > before)
    assert not list((server.folder / "outside" / "sub").iterdir())
    assert not (server.folder / "outside" / "new").exists()


def sample(number: int) -> Any:
    return pb.ObjectRef(store="samples", key=f"races-{number}", version="1", size=len(CONTENT))


ROW = (0, 0, chunk_digest(CONTENT), pa.py_buffer(CONTENT))
OURS = (
    "store.json",
    "store-copy.json",
    "store.lock",
    "index/data.mdb",
    "segments/*/*.segment",
    "flags/*.record",
)


@pytest.mark.hostile("races")
@pytest.mark.parametrize("kind", ["a symlink out", "a pipe", "a folder", "a hard link out"])
@pytest.mark.parametrize("victim", OURS)
def test_a_file_of_the_store_that_became_something_else(
    server: HostileServer, victim: str, kind: str
) -> None:
    """What the server has open it goes on with; what it opens anew it refuses, or makes anew."""
    server.put("races", [sample(0)], [encode_chunks([ROW])])
    server.client.call("SetPolicy", pb.SetPolicyRequest(namespace="races", pinned=True))
    victims = sorted(server.store.glob(victim))
    assert victims
    with ExitStack() as put_back:
        for path in victims:
            put_back.enter_context(swapped(server, path, kind))
        assert_refused_or(CONTENT, server.client.read([sample(0)])[0])
        assert_refused_or(CONTENT, server.client.read([server.ref])[0])
        outcome(lambda: server.client.call("SetPolicy", pb.SetPolicyRequest(namespace="races", pinned=False)))
        outcome(lambda: server.client.call("SetPolicy", pb.SetPolicyRequest(namespace="races", priority=3)))
        outcome(lambda: server.client.call("GetStatus", pb.StatusRequest()))
    outcome(lambda: server.client.call("SetPolicy", pb.SetPolicyRequest(namespace="races", pinned=False)))
    server.client.call("SetPolicy", pb.SetPolicyRequest(namespace="races", pinned=True, priority=0))
    server.client.call("SetPolicy", pb.SetPolicyRequest(namespace="races", pinned=False))
    server.put("races", [sample(1)], [encode_chunks([ROW])])
    assert server.client.read([sample(1)]) == [CONTENT]
    server.client.call("Evict", pb.EvictRequest(namespace="races"))


@pytest.mark.hostile("races")
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_file_that_became_something_else(server: HostileServer, kind: str) -> None:
    """The tokens of the start are those that count."""
    stranger = server.with_token(SECRET.decode().replace(" ", "-"))
    try:
        with swapped(server, server.token_file, kind):
            assert server.client.read([server.ref]) == [CONTENT]
            with pytest.raises(grpc.RpcError) as caught:
                stranger.call("GetInfo", pb.InfoRequest())
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    finally:
        stranger.close()


@pytest.mark.hostile("races")
@pytest.mark.parametrize(
    ("victim", "kind"),
    [
        ("store/store.json", "symlink"),
        ("store/segments/*/*.segment", "symlink"),
        ("store/flags/*.record", "folder"),
        ("token", "pipe"),
    ],
)
def test_what_was_swapped_under_a_server_keeps_it_from_starting_again(
    tmp_path: Path, victim: str, kind: str
) -> None:
    """It ends in order, and the next start names what is there."""
    (tmp_path / "source").mkdir()
    outside = tmp_path / "outside"
    outside.write_bytes(SECRET)
    outside.chmod(0o600)
    arguments = (
        *("--listen", "127.0.0.1:0", "--store", tmp_path / "store", "--capacity", "256MB"),
        *("--under-store", f"file=file://{tmp_path / 'source'}", "--token-file", tmp_path / "token"),
    )
    with ServerProcess(*arguments, token_file=tmp_path / "token") as server:
        server.client.put("races", ObjectInfo(ObjectId("samples", "races", "1"), len(CONTENT)), CONTENT)
        server.client.call("SetPolicy", pb.SetPolicyRequest(namespace="races", pinned=True))
        path = sorted(tmp_path.glob(victim))[0]
        path.unlink()
        MAKE[kind](path, outside)
        code, said = server.stop()
        assert code in (0, 1), said
        assert "Traceback" not in said
    assert str(path) in refused(*arguments)
    assert outside.read_bytes() == SECRET
