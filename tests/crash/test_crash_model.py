"""The model of a volatile disk itself: what is certain, and what isn't (F3). One that keeps too much finds no bug."""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.crash.recorder import Recorder
from tests.crash.volatile import Disk, Image, Op, Survival

ALL: list[Survival] = ["lost", "kept", "subset", "torn"]


def replayed(tmp_path: Path) -> tuple[Recorder, str]:
    root = tmp_path / "root"
    root.mkdir()
    return Recorder(str(root), Disk(), lambda path, node: None), str(root)


def disk_of(recorder: Recorder) -> Disk:
    disk = Disk()
    for item in recorder.trace:
        assert isinstance(item, Op)
        disk.apply(item)
    return disk


def images(disk: Disk, draws: int = 40) -> list[Image]:
    return [
        disk.image(names, data, random.Random(draw)) for names in ALL for data in ALL for draw in range(draws)
    ]


def contents(image: Image) -> dict[str, bytes]:
    return {path: bytes(content.data).ljust(content.size, b"\0") for path, _, content in image.files}


def write(recorder: Recorder, path: str, data: bytes, *, sync: bool = False) -> None:
    fd = recorder.create(path)
    recorder.pwritev(fd, [data[:3], data[3:]], 0)
    if sync:
        recorder.fsync(fd)
    recorder.close(fd)


def test_a_synced_file_may_have_no_name(tmp_path: Path) -> None:
    recorder, root = replayed(tmp_path)
    write(recorder, f"{root}/a", b"content", sync=True)
    found = [contents(image) for image in images(disk_of(recorder))]
    assert {} in found
    assert all(image in ({}, {"a": b"content"}) for image in found)


def test_a_name_may_have_no_content(tmp_path: Path) -> None:
    recorder, root = replayed(tmp_path)
    write(recorder, f"{root}/a", b"content")
    recorder.fsync_dir(root)
    found = {contents(image)["a"] for image in images(disk_of(recorder), 400)}
    assert {b"", b"content", bytes(7)} <= found


def test_writes_tear_at_sectors(tmp_path: Path) -> None:
    recorder, root = replayed(tmp_path)
    data = b"".join(bytes([65 + number]) * 512 for number in range(4))
    write(recorder, f"{root}/a", data)
    recorder.fsync_dir(root)
    found = {contents(image)["a"] for image in images(disk_of(recorder), 400)}
    assert data[:512] in found
    assert bytes(512) + data[512:] in found
    for image in found:
        for at in range(0, len(image), 512):
            assert image[at : at + 512] in (data[at : at + 512], bytes(512))


def test_of_unsynced_writes_any_may_be_lost(tmp_path: Path) -> None:
    recorder, root = replayed(tmp_path)
    fd = recorder.create(f"{root}/a")
    recorder.fsync_dir(root)
    recorder.truncate(fd, 6)
    recorder.pwritev(fd, [b"abc"], 0)
    recorder.pwritev(fd, [b"def"], 3)
    recorder.close(fd)
    found = {contents(image)["a"] for image in images(disk_of(recorder))}
    assert {b"", bytes(6), b"abc\0\0\0", b"\0\0\0def", b"abcdef"} <= found


def test_a_rename_is_one_step_and_not_durable_by_itself(tmp_path: Path) -> None:
    recorder, root = replayed(tmp_path)
    write(recorder, f"{root}/a", b"old", sync=True)
    recorder.fsync_dir(root)
    write(recorder, f"{root}/a.tmp", b"new", sync=True)
    recorder.rename(f"{root}/a.tmp", f"{root}/a")
    found = {contents(image)["a"] for image in images(disk_of(recorder))}
    assert found == {b"old", b"new"}
    recorder.fsync_dir(root)
    assert all(contents(image) == {"a": b"new"} for image in images(disk_of(recorder)))


def test_a_rename_between_folders_never_loses_the_file(tmp_path: Path) -> None:
    recorder, root = replayed(tmp_path)
    for folder in ("x", "y"):
        recorder.make_dir(f"{root}/{folder}")
    write(recorder, f"{root}/x/a", b"data", sync=True)
    recorder.fsync_dir(f"{root}/x")
    recorder.fsync_dir(root)
    recorder.rename(f"{root}/x/a", f"{root}/y/b")
    found = [set(contents(image)) for image in images(disk_of(recorder))]
    assert {"x/a"} in found and {"y/b"} in found and {"x/a", "y/b"} in found
    assert set() not in found
    recorder.fsync_dir(f"{root}/x")
    assert all(set(contents(image)) == {"y/b"} for image in images(disk_of(recorder)))


def test_an_unlink_may_not_have_happened_until_the_folder_is_synced(tmp_path: Path) -> None:
    recorder, root = replayed(tmp_path)
    write(recorder, f"{root}/a", b"data", sync=True)
    recorder.fsync_dir(root)
    recorder.unlink(f"{root}/a")
    assert {len(contents(image)) for image in images(disk_of(recorder))} == {0, 1}
    recorder.fsync_dir(root)
    assert not any(contents(image) for image in images(disk_of(recorder)))


def test_holes_truncations_and_folders_are_what_the_disk_makes_of_them(tmp_path: Path) -> None:
    """The recorder's model and the disk it recorded agree on every byte that is visible."""
    recorder, root = replayed(tmp_path)
    recorder.make_dir(f"{root}/x")
    fd = recorder.create(f"{root}/x/a")
    recorder.pwritev(fd, [bytes(range(256)) * 64], 100)
    recorder.deallocate(fd, 4096, 4096)
    recorder.truncate(fd, 9000)
    recorder.truncate(fd, 20_000)
    recorder.close(fd)
    recorder.make_dir(f"{root}/gone")
    recorder.remove_dir(f"{root}/gone")
    image = disk_of(recorder).image("kept", "kept", random.Random(0))
    assert image.folders == ("x",)
    assert contents(image) == {"x/a": Path(root, "x/a").read_bytes()}
    assert sorted(os.listdir(root)) == ["x"]


def test_the_digest_tells_images_apart() -> None:
    disk = Disk()
    disk.apply(Op("create", "a test", 1, name="a"))
    seen = {disk.image("kept", "kept", random.Random(0)).digest}
    for op in (
        Op("truncate", "a test", 1, size=4),
        Op("pwritev", "a test", 1, data=b"x"),
        Op("make_dir", "a test", 2, name="b"),
    ):
        disk.apply(op)
        digest = disk.image("kept", "kept", random.Random(0)).digest
        assert digest not in seen
        seen.add(digest)
