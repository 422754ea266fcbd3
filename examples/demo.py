"""`make demo`: the whole of torchcache on this machine, against a real S3 server.

Puts two datasets into a bucket, reads them twice, trains on one of them, kills the training with SIGKILL, lets it
resume, and checks that the weights are those of a run that was never interrupted. Ends with a table of what it
measured; exits with 1 if anything it claims did not hold.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import torchcache as tc
from examples.seaweedfs import SeaweedFS, environment

FOLDER = Path(".demo")
RECORD_BYTES = 114_660  # ResNet50's record in MLPerf Storage
RECORDS = 2_500
BATCH = 128
EPOCHS = 4
WIDTH = 1536  # of the model: a checkpoint of about 25 MB
SAVE_EVERY = 20

console = Console()
T = TypeVar("T")


class DemoFailed(Exception):
    """Something the demo claims did not hold."""


def progress() -> Progress:
    return Progress(
        TextColumn("  {task.description:<38}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
    )


def tracked(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    with progress() as bar:
        task = bar.add_task(what, total=total, note="")
        for item in items:
            yield item
            bar.advance(task)


# ---- 1. the bucket ----


def digits() -> Iterator[tuple[str, bytes]]:
    """scikit-learn's 1,797 handwritten digits: (`<label>/<number>.png`, PNG)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    for number, (image, label) in enumerate(zip(data.images, data.target, strict=True)):
        png = io.BytesIO()
        Image.fromarray((image * (255 / 16)).astype(np.uint8)).save(png, format="PNG")
        yield f"{label}/{number:04d}.png", png.getvalue()


def records() -> Iterator[tuple[str, bytes]]:
    """Generated records of the ResNet50 shape: no two alike, nothing to compress."""
    generator = np.random.default_rng(0)
    for number in range(RECORDS):
        yield f"{number:05d}.bin", generator.bytes(RECORD_BYTES)


def upload(s3: SeaweedFS, bucket: str, folder: str, files: Iterator[tuple[str, bytes]], total: int) -> None:
    def put(file: tuple[str, bytes]) -> None:
        s3.client.put_object(Bucket=bucket, Key=f"{folder}/{file[0]}", Body=file[1])

    with ThreadPoolExecutor(8) as threads:
        for _ in tracked(threads.map(put, files), total, f"upload s3://{bucket}/{folder}"):
            pass


# ---- 2. bandwidth ----


@dataclass(frozen=True)
class Pass:
    """One pass over a dataset."""

    seconds: float
    bytes: int
    s3_requests: int
    s3_bytes: int

    @property
    def speed(self) -> str:
        return f"{self.bytes / self.seconds / 1e6:,.0f} MB/s"


def read_all(pool: tc.Pool, dataset: Any, what: str) -> Pass:
    """Reads every sample once, in shuffled batches as a DataLoader would."""
    from examples.train_digits import fetched

    order = random.Random(what).sample(range(len(dataset)), len(dataset))
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    requests, received = fetched(pool)
    started, total = time.perf_counter(), 0
    for batch in tracked(batches, len(batches), what):
        total += sum(len(sample) for sample in dataset.__getitems__(batch))
    seconds = time.perf_counter() - started
    now_requests, now_received = fetched(pool)
    return Pass(seconds, total, now_requests - requests, now_received - received)


# ---- 3. training ----


@dataclass
class Run:
    """What one or more processes of a training run said."""

    epochs: list[dict[str, Any]] = field(default_factory=list)
    saves: list[dict[str, Any]] = field(default_factory=list)
    resumes: list[dict[str, Any]] = field(default_factory=list)
    last_step: int = 0
    weights: str | None = None


def train(data: str, run_uri: str, run: Run, *, what: str, total: int, kill_at: int | None = None) -> None:
    """Runs the training script as a process of its own; with `kill_at`, SIGKILLs it right after that step."""
    command = [sys.executable, "-m", "examples.train_digits", data, run_uri, "--events"]
    command += [f"--epochs={EPOCHS}", f"--width={WIDTH}", f"--save-every={SAVE_EVERY}"]
    with progress() as bar, ExitStack() as stack:
        task = bar.add_task(what, total=total, completed=run.last_step, note="")
        log = stack.enter_context((FOLDER / "train.log").open("a"))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            note(json.loads(line), run)
            bar.update(task, completed=run.last_step, note=f"{len(run.saves)} saves")
            if kill_at is not None and run.last_step >= kill_at:
                process.kill()
                break
        process.stdout.close()
        code = process.wait()
    if kill_at is None and code:
        raise DemoFailed(f"the training process ended with code {code}; see {FOLDER / 'train.log'}")


def note(event: dict[str, Any], run: Run) -> None:
    kind = event.pop("event")
    if kind == "step":
        run.last_step = event["step"]
    elif kind == "done":
        run.weights = event["weights"]
    else:
        {"epoch": run.epochs, "save": run.saves, "resume": run.resumes}[kind].append(event)


# ---- 4. what a save costs ----


@dataclass(frozen=True)
class SaveCost:
    """Seconds of one save: training stopped, straight to S3 by boto3, and until ours was durable in S3."""

    bytes: int
    stopped: float
    straight: float
    durable: float


def save_cost(s3: SeaweedFS, bucket: str, pool: tc.Pool) -> SaveCost:
    """Saves one state through torchcache, then puts the very same shards into S3 by boto3. Medians of three."""
    import torch
    import torch.distributed.checkpoint as dcp

    state = {f"layer{i}": torch.randn(2048, 2048) for i in range(8)}
    rounds = []
    for number in range(3):
        path = f"{bucket}/cost/step-{number}"
        started = time.perf_counter()
        dcp.save(state, storage_writer=tc.CacheStorageWriter(f"s3://{path}", pool=pool), no_dist=True)
        stopped = time.perf_counter() - started
        wait_durable(pool, f"s3://{path}")
        durable = time.perf_counter() - started
        listing = s3.client.list_objects_v2(Bucket=bucket, Prefix=f"cost/step-{number}/")["Contents"]
        shards = [f["Key"] for f in listing if f["Key"].endswith(".distcp")]
        files = [s3.client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in shards]
        started = time.perf_counter()
        for index, body in enumerate(files):
            s3.client.upload_fileobj(io.BytesIO(body), bucket, f"straight/{number}/{index}")
        straight = time.perf_counter() - started
        rounds.append(SaveCost(sum(map(len, files)), stopped, straight, durable))
    stopped, straight, durable = np.median(
        [(r.stopped, r.straight, r.durable) for r in rounds], axis=0
    ).tolist()
    return SaveCost(rounds[0].bytes, stopped, straight, durable)


def wait_durable(pool: tc.Pool, uri: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    store, path = pool.resolve(uri)
    while (info := pool.get_save(store, path)).state != "durable":
        if info.error or time.monotonic() > deadline:
            raise DemoFailed(f"{uri} did not become durable: {info.error or 'timed out'}")
        time.sleep(0.01)


# ---- the whole ----


def check(holds: bool, claim: str) -> None:
    console.print(f"  [green]✓[/] {claim}" if holds else f"  [red]✗ {claim}[/]")
    if not holds:
        raise DemoFailed(claim)


def demo(s3: SeaweedFS) -> None:
    bucket = "demo"
    s3.client.create_bucket(Bucket=bucket)
    console.rule("1. Two datasets in a bucket of a real S3 server")
    upload(s3, bucket, "digits", digits(), 1797)
    upload(s3, bucket, "records", records(), RECORDS)

    console.rule("2. Bandwidth: the same records, twice")
    pool = tc.connect()
    dataset = tc.CachedDataset.from_files(f"s3://{bucket}/records", pool=pool)
    first = read_all(pool, dataset, "epoch 1, from S3")
    second = read_all(pool, dataset, "epoch 2, from the cache")
    check(first.s3_bytes == RECORDS * RECORD_BYTES, "epoch 1 fetched every byte from S3 once")
    check(second.s3_requests == 0, "epoch 2 sent no request to S3")

    console.rule("3. Train, be killed, resume")
    data, steps = f"s3://{bucket}/digits", EPOCHS * -(-1797 // 32)
    whole, broken = Run(), Run()
    train(data, f"s3://{bucket}/whole", whole, what="train, never interrupted", total=steps)
    kill_at = random.randrange(steps // 4, 3 * steps // 4)
    train(
        data,
        f"s3://{bucket}/run",
        broken,
        what="train again, killed on the way",
        total=steps,
        kill_at=kill_at,
    )
    console.print(f"  SIGKILL after step {broken.last_step}")
    broken.last_step = 0
    train(data, f"s3://{bucket}/run", broken, what="start it once more", total=steps)
    resumed = broken.resumes[0]["step"] if broken.resumes else None
    check(resumed is not None, f"it resumed from the last committed checkpoint, step {resumed}")
    check(all(e["s3_requests"] == 0 for e in whole.epochs[1:]), "from epoch 2 on, no request went to S3")
    check(whole.weights == broken.weights is not None, "the final weights are equal, bit for bit")

    console.rule("4. What a save costs")
    cost = save_cost(s3, bucket, pool)
    report(first, second, whole, broken, cost)
    pool.close()


def report(first: Pass, second: Pass, whole: Run, broken: Run, cost: SaveCost) -> None:
    table = Table(title="torchcache on this machine", title_style="bold")
    for column in ("what", "time", "speed", "S3 requests", "S3 bytes"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, one in (("records, epoch 1, from S3", first), ("records, epoch 2, from cache", second)):
        table.add_row(name, f"{one.seconds:.2f} s", one.speed, f"{one.s3_requests:,}", f"{one.s3_bytes:,}")
    table.add_section()
    for epoch in whole.epochs:
        requests, received = f"{epoch['s3_requests']:,}", f"{epoch['s3_bytes']:,}"
        table.add_row(
            f"training, epoch {epoch['epoch']}", f"{epoch['seconds']:.2f} s", "", requests, received
        )
    table.add_section()
    stops = [s["seconds"] for s in whole.saves + broken.saves]
    table.add_row(
        f"a save in training (median of {len(stops)})", f"{np.median(stops) * 1e3:.0f} ms", "", "", ""
    )
    table.add_row("resume: load", f"{broken.resumes[0]['seconds'] * 1e3:.0f} ms", "", "", "")
    size = f"{cost.bytes / 1e6:.0f} MB"
    for name, seconds in (
        (f"save {size}: training stopped for", cost.stopped),
        ("  straight to S3, by boto3", cost.straight),
        ("  ours durable in S3 after", cost.durable),
    ):
        table.add_row(name, f"{seconds:.2f} s", f"{cost.bytes / seconds / 1e6:,.0f} MB/s", "", "")
    console.print(table)


def main() -> int:
    # Saving from one process is what this demo means to do.
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    shutil.rmtree(FOLDER, ignore_errors=True)
    with SeaweedFS(FOLDER.resolve() / "s3") as s3:
        home = {"TORCHCACHE_HOME": str(FOLDER.resolve() / "home")}
        hidden = {name: None for name in os.environ if name.startswith(("AWS_", "TORCHCACHE_"))}
        with environment({**hidden, **s3.environment(), **home}):
            try:
                demo(s3)
            except DemoFailed as failed:
                console.print(f"[red]The demo failed:[/] {failed}")
                return 1
    console.print("[green]All of it held.[/]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
