"""`torchcache doctor` as a process of its own, on stores with every kind of damage; then servers on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torchcache_server.cache.slots import Slots
from torchcache_server.store import Store

from tests.integration.server_process import ServerProcess
from tests.unit.damaged_store import (
    BEYOND_REPAIR,
    REPAIRABLE,
    SIZE,
    build,
    checkpoint_is_whole,
    one_copy_of_a_record,
    payload_of_a_checkpoint,
    payload_of_a_dataset,
    snapshot,
)
from tests.unit.store_parts import CAPACITY, held
from torchcache.local_pool import default_root


def doctor(*arguments: object, code: int, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-m", "torchcache.cli", "doctor", *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def doctor_json(*arguments: object, code: int) -> dict[str, Any]:
    """What it says of each store, by the store's name."""
    done = doctor(*arguments, "--json", code=code)
    return {Path(store["store"]).name: store for store in json.loads(done.stdout)["stores"]}


def damages(store: dict[str, Any]) -> set[str]:
    return {f["kind"] for f in store["findings"] if f["damage"] and not f["repaired"]}


def test_every_kind_of_damage_is_found_and_repaired(tmp_path: Path) -> None:
    """F6, F15, I2, I6: with the command, before and after; then a store opens and serves what it can."""
    stores = []
    for damage in REPAIRABLE:
        path = tmp_path / str(damage)
        build(path)
        damage.inflict(path)
        stores += ["--store", path]
    before = snapshot(tmp_path)
    found = doctor_json(*stores, code=1)
    assert {name: damages(store) for name, store in found.items()} == {str(d): d.kinds for d in REPAIRABLE}
    assert snapshot(tmp_path) == before, "nothing is written without --repair"

    repaired = doctor_json(*stores, "--repair", code=0)
    assert {name for name, store in repaired.items() if store["sound"]} == set(map(str, REPAIRABLE))
    after = snapshot(tmp_path)
    again = doctor_json(*stores, "--repair", code=0)
    assert not [f for store in again.values() for f in store["findings"] if f["repaired"]]
    assert snapshot(tmp_path) == after, "a second repair finds nothing to do"

    for damage in REPAIRABLE:
        store = Store(tmp_path / str(damage), capacity_bytes=CAPACITY)
        Slots(store)
        assert checkpoint_is_whole(store), damage
        assert tuple(n for n in range(15) if not held(store, n, SIZE)) == damage.loses, damage
        store.close()


def test_what_is_beyond_repair_stays_and_is_code_1(tmp_path: Path) -> None:
    """I2, I6."""
    stores = []
    for damage in BEYOND_REPAIR:
        path = tmp_path / str(damage)
        path.mkdir()
        build(path / "store")
        damage.inflict(path / "store")
        stores += ["--store", path / "store"]
    doctor(*stores, code=1)
    said = doctor(*stores, "--repair", code=1).stdout
    assert "the checkpoint s3/run/step-1 (save 0123abcd) isn't whole" in said
    assert "is a symlink, not a file" in said
    assert said.count("damages are left") == len(BEYOND_REPAIR)


def test_what_it_says_to_people(tmp_path: Path) -> None:
    path = tmp_path / "store"
    build(path)
    assert doctor("--store", path, code=0).stdout.startswith(f"{path}: sound; 3 segments, 17 records, ")
    one_copy_of_a_record(path)
    payload_of_a_dataset(path)
    said = doctor("--store", path, code=1).stdout
    assert "one of its two copies is damaged\n" in said
    assert "chunk 0 of s3/bucket/key-12@v1 is damaged, at " in said
    assert "    with --repair: marked as dead\n" in said
    assert f"{path}: 2 damages; 3 segments" in said
    said = doctor("--store", path, "--repair", code=0).stdout
    assert "    repaired: written anew from the other copy\n" in said
    assert f"{path}: sound; 3 segments" in said


def test_a_live_server_is_said(tmp_path: Path) -> None:
    """Nothing is read, let alone repaired, under a server's feet."""
    path = tmp_path / "store"
    options = ["--listen", "127.0.0.1:0", "--store", path, "--capacity", "1GiB", "--under-store", "s3=s3://"]
    with ServerProcess(*options, "--token-file", tmp_path / "token", token_file=tmp_path / "token"):
        done = doctor("--store", path, "--repair", code=2)
        assert f"{path} is in use by another server" in done.stderr
        assert "in use" in doctor_json("--store", path, code=2)["store"]["error"]
    assert doctor("--store", path, code=0).stdout


def test_a_server_starts_after_a_repair_and_says_what_was_set_aside(tmp_path: Path) -> None:
    """I2: from the refusal, by what it says, to a running server."""
    path = tmp_path / "store"
    build(path)
    next(d for d in REPAIRABLE if str(d) == "both_copies_of_a_record").inflict(path)
    options = ["--listen", "127.0.0.1:0", "--store", path, "--capacity", "64MiB", "--under-store", "s3=s3://"]
    options += ["--token-file", tmp_path / "token"]
    command = [sys.executable, "-m", "torchcache_server", *map(str, options)]
    refused = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
    assert refused.returncode == 2
    assert f"`torchcache doctor --store {path} --repair`" in refused.stderr
    doctor("--store", path, "--repair", code=0)
    with ServerProcess(*options, token_file=tmp_path / "token") as server:
        names = {namespace.name for namespace in server.client.status().namespaces}
        assert "save:s3/run/step-1@0123abcd" in names
        _, stderr = server.stop()
    assert "were damaged and set aside: no save that is here now is dropped" in stderr


def test_the_embedded_pools_stores_are_the_default() -> None:
    assert "there is no store of the embedded pool" in doctor(code=2).stderr
    for index in range(2):
        build(default_root() / f"server-{index}" / "store")
    payload_of_a_checkpoint(default_root() / "server-1" / "store")
    said = doctor(code=1).stdout
    assert "server-0/store: sound" in said
    assert "server-1/store: 2 damages" in said


def test_help_and_usage() -> None:
    done = doctor("--help", code=0)
    assert "--repair" in done.stdout
    assert "Exit codes" in done.stdout
    assert "no such option" in doctor("--wrong", code=2).stderr.lower()
    assert "/nowhere" in doctor("--store", "/nowhere", code=2).stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_read_only_file_system_can_be_checked(tmp_path: Path) -> None:
    """F15: and a repair says that it could not."""
    path = tmp_path / "store"
    build(path)
    one_copy_of_a_record(path)
    script = f"mount --bind {path} {path} && mount -o remount,bind,ro {path} && exec " + '"$@"'
    prefix = ("unshare", "--mount", "sh", "-c", script, "sh")
    assert "with --repair" in doctor("--store", path, code=1, prefix=prefix).stdout
    assert (
        "not repaired: [Errno 30] Read-only file system"
        in doctor("--store", path, "--repair", code=1, prefix=prefix).stdout
    )
