"""`torchcache checkpoint` over a real pool and a real S3: wait, rm, export; and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

import torchcache as tc
from examples.seaweedfs import SeaweedFS, environment
from tests.e2e.throwaway import throwaway
from tests.unit.checkpoint_states import assert_same, blank, state
from torchcache.cli.app import run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def shared(
    s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, tc.LocalPool]]:
    root = tmp_path_factory.mktemp("pool")
    local = tc.LocalPool(root, "1GB")
    with environment(s3_server.environment()), throwaway(local, root):
        yield root, local


def name_pool(monkeypatch: pytest.MonkeyPatch, root: Path, local: tc.LocalPool) -> None:
    """As a user does."""
    monkeypatch.setenv("TORCHCACHE_POOL", local.address)
    monkeypatch.setenv("TORCHCACHE_TOKEN_FILE", str(root / "token"))


@pytest.fixture
def pool(shared: tuple[Path, tc.LocalPool], s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> tc.Pool:
    name_pool(monkeypatch, *shared)
    return shared[1].pool


@pytest.fixture
def root(s3: SeaweedFS) -> str:
    return f"s3://{s3.make_bucket()}/run"


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert run(["checkpoint", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def save(pool: tc.Pool, uri: str, content: dict[str, Any], **options: Any) -> None:
    dcp.save(content, storage_writer=tc.CacheStorageWriter(uri, pool=pool, **options), no_dist=True)


def test_wait_until_all_of_a_run_is_in_storage(
    pool: tc.Pool, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["checkpoint", "wait", root]) == 1
    assert "no committed checkpoint" in capsys.readouterr().err
    for step in range(3):
        save(pool, f"{root}/step-{step}", {"a": torch.ones(100_000)})
    report = run_json(capsys, "wait", root, "--timeout", "1m")
    assert [c["uri"] for c in report["checkpoints"]] == [f"{root}/step-{step}" for step in range(3)]
    assert {c["state"] for c in run_json(capsys, "ls", root)["checkpoints"]} == {"durable"}
    assert run(["checkpoint", "wait", root]) == 0
    assert "3 checkpoints" in capsys.readouterr().out


def test_wait_tells_an_upload_that_hangs_and_one_that_failed(
    pool: tc.Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "step-1/__0_0.distcp/in the way").mkdir(parents=True)
    save(pool, str(tmp_path / "step-1"), {"a": 1})
    code = run(["checkpoint", "wait", str(tmp_path / "step-1"), "--timeout", "1s"])
    assert code in (1, 3)  # failed, or the pool is still trying
    assert "saved " in capsys.readouterr().err
    assert run(["checkpoint", "wait", str(tmp_path / "step-1"), "--timeout", "soon"]) == 2
    assert run(["checkpoint", "rm", "--yes", str(tmp_path / "step-1")]) == 0  # or the pool would go on trying


def test_rm_takes_the_folder_in_a_tree_of_files(pool: tc.Pool, tmp_path: Path) -> None:
    for step in (1, 2):
        save(pool, f"{tmp_path}/run/step-{step}", {"a": 1}, durability="store")
        assert run(["checkpoint", "rm", "--yes", f"{tmp_path}/run/step-{step}"]) == 0
        assert list(tmp_path.rglob("*")) == [tmp_path / "run"]


def test_rm_takes_all_of_it_and_only_that(
    pool: tc.Pool, root: str, s3: SeaweedFS, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 10):
        save(pool, f"{root}/step-{step}", {"a": 1}, durability="store" if step == 1 else "pool")
    report = run_json(capsys, "rm", f"{root}/step-1", f"{root}/step-2/", f"{root}/step-3", code=1)
    assert [c["deleted"] for c in report["checkpoints"]] == [True, True, False]
    assert "no checkpoint at" in report["checkpoints"][2]["error"]
    assert [c["uri"] for c in run_json(capsys, "ls", root)["checkpoints"]] == [f"{root}/step-10"]
    bucket = root.split("/")[2]
    s3.client.put_object(Bucket=bucket, Key="run/stock/.metadata", Body=b"torch's own")
    s3.client.put_object(Bucket=bucket, Key="run/left/.torchcache.save.json", Body=b"{}")
    s3.client.put_object(Bucket=bucket, Key="run/left/__0_0.distcp", Body=b"half")
    assert run(["checkpoint", "rm", "--yes", f"{root}/stock"]) == 1
    assert "tools of the storage" in capsys.readouterr().err
    states = {c["uri"]: c["state"] for c in run_json(capsys, "ls", root)["checkpoints"]}
    assert (states[f"{root}/stock"], states[f"{root}/left"]) == ("stock", "unfinished")


def test_rm_of_one_that_is_being_read_is_refused(
    pool: tc.Pool, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(pool, f"{root}/step-1", {"a": 1})
    reader = tc.CacheStorageReader(f"{root}/step-1", pool=pool)
    reader.read_metadata()
    assert run(["checkpoint", "rm", "--yes", f"{root}/step-1"]) == 1
    assert "is being read by" in capsys.readouterr().err
    reader.reset()
    assert run(["checkpoint", "rm", "--yes", f"{root}/step-1"]) == 0


def test_export_to_dcp_is_a_stock_checkpoint(
    pool: tc.Pool, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(pool, f"{root}/step-1", state())
    report = run_json(capsys, "export", f"{root}/step-1", str(tmp_path / "out"), "--to", "dcp")
    assert report["files"] == ["__0_0.distcp", ".metadata"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".metadata", "__0_0.distcp"]
    loaded = blank(state())
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(tmp_path / "out"), no_dist=True)
    assert_same(loaded, state())


def test_export_to_safetensors(
    pool: tc.Pool, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = state()["model"]
    del model["complex"]  # saved as it is; as a lazy conjugate it has no bytes of its own to compare
    model["half a byte"] = torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    model["large"] = torch.arange(12_000_000, dtype=torch.int32)  # more than one read
    save(pool, f"{root}/step-1", {"model": model, "optimizer": state()["optimizer"]})
    uri, folder = f"{root}/step-1", tmp_path / "out"
    report = run_json(capsys, "export", uri, str(folder), "--to", "safetensors", "--prefix", "model.")
    assert (report["files"], report["tensors"]) == (["model.safetensors"], len(model))
    loaded = safetensors.torch.load_file(folder / "model.safetensors")
    expected = {name: tensor.detach() for name, tensor in model.items()}
    assert_same({name: loaded[name] for name in expected}, expected)
    assert_same(tc.load_safetensors(folder, pool=pool), loaded)

    several = tmp_path / "several"
    command = ["export", uri, str(several), "--to", "safetensors", "--max-file-size", "10kB"]
    report = run_json(capsys, *command)
    assert len(report["files"]) > 2
    assert report["files"][-1] == "model.safetensors.index.json"
    assert report["left_out"] == 4  # the optimizer's settings
    assert_same(tc.load_safetensors(several, pool=pool), {f"model.{n}": t for n, t in loaded.items()})


def test_what_export_refuses(
    pool: tc.Pool, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"{root}/step-1"
    save(pool, uri, {"model": {"a": torch.ones(3)}, "sparse": torch.eye(3).to_sparse(), "n": 1})
    to = ["--to", "safetensors"]
    assert run(["checkpoint", "export", uri, str(tmp_path), *to]) == 2
    assert "'sparse' is no plain tensor" in capsys.readouterr().err
    assert run(["checkpoint", "export", uri, str(tmp_path), *to, "--prefix", "nothing."]) == 2
    assert run(["checkpoint", "export", uri, str(tmp_path), *to, "--prefix", "model."]) == 0
    assert run(["checkpoint", "export", uri, str(tmp_path), *to, "--prefix", "model."]) == 2
    assert "not empty" in capsys.readouterr().err
    assert run(["checkpoint", "export", f"{root}/step-2", str(tmp_path / "new"), *to]) == 1
    assert not (tmp_path / "new").exists()


def test_export_writes_no_byte_that_is_wrong(
    pool: tc.Pool,
    root: str,
    s3: SeaweedFS,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = f"{root}/step-1"
    save(pool, uri, {"a": torch.ones(100_000)}, durability="store")
    bucket = root.split("/")[2]
    key = "run/step-1/__0_0.distcp"
    data = bytearray(s3.client.get_object(Bucket=bucket, Key=key)["Body"].read())
    data[len(data) // 2] ^= 1
    s3.client.put_object(Bucket=bucket, Key=key, Body=bytes(data))
    other = tc.LocalPool(tmp_path / "other", "300MB")
    with other:  # which has no good copy of its own
        name_pool(monkeypatch, tmp_path / "other", other)
        for kind in ("dcp", "safetensors"):
            folder = tmp_path / kind
            assert run(["checkpoint", "export", uri, str(folder), "--to", kind]) == 1
            assert "checksum" in capsys.readouterr().err
            assert list(folder.iterdir()) == []
