"""`make demo-cluster`: a pool of four servers in etcd, two ranks that train through it, and a server that is killed.

Trains once undisturbed and once with `kill -9` to one of the servers on the way, and checks that nobody could tell: no
rank failed or started again, and the weights are equal, bit for bit. In between it shows what `torchcache status
--watch` shows.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torchcache as tc
from examples.demo import DemoFailed, Run, check, console, digits, note, progress, upload
from examples.etcd import Etcd
from examples.seaweedfs import SeaweedFS, environment

FOLDER: Final = Path(".demo-cluster")
SERVERS: Final = 4
RANKS: Final = 2
EPOCHS: Final = 4
SAVE_EVERY: Final = 10
STEPS: Final = EPOCHS * -(-1797 // (32 * RANKS))


class CacheServer:
    """One `torchcache serve`, which joins the pool in etcd."""

    def __init__(self, folder: Path, pool: str, token: Path) -> None:
        folder.mkdir(parents=True)
        self.log_path = folder / "server.log"
        options = {
            "--listen": "127.0.0.1:0",
            "--store": str(folder / "store"),
            "--capacity": "1GB",
            "--under-store": "s3=s3://",
            "--token-file": str(token),
            "--join": pool,
        }
        command = [sys.executable, "-m", "torchcache.cli", "serve"]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *(word for option in options.items() for word in option)], stdout=log, stderr=log
            )

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()


def wait_for(servers: int, timeout_s: float = 60.0) -> None:
    """Until so many servers answer in the pool."""
    deadline = time.monotonic() + timeout_s
    found = -1
    while found != servers:
        if time.monotonic() > deadline:
            raise DemoFailed(f"{found} servers answer, not {servers}; see the logs in {FOLDER}")
        try:
            with closing(tc.connect()) as pool:
                found = len(pool.status())
        except tc.TransientError:
            time.sleep(0.2)


def show_status(title: str) -> None:
    """What `torchcache status` says now; with --watch it would do so again and again."""
    console.print(f"  [bold]torchcache status[/], {title}:")
    said = subprocess.run(
        [sys.executable, "-m", "torchcache.cli", "status"], check=True, capture_output=True, text=True
    )
    servers = re.split(r"\n\s*\n", said.stdout.strip())[0]  # tables of lanes, disks and data follow
    console.print(servers, markup=False, highlight=False, soft_wrap=True)


def train(data: str, run_uri: str, *, what: str, victim: CacheServer | None = None) -> Run:
    """Two ranks under torchrun, whose events rank 0 prints; kills `victim` somewhere in the middle."""
    run = Run()
    kill_at = random.randrange(STEPS // 3, 2 * STEPS // 3)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += ["-m", "examples.train_ranks", data, run_uri, "--events"]
    command += [f"--epochs={EPOCHS}", f"--save-every={SAVE_EVERY}"]
    with progress() as bar, (FOLDER / "train.log").open("a") as log:
        task = bar.add_task(what, total=STEPS, note="")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        for line in process.stdout or ():
            note(json.loads(line), run)
            bar.update(task, completed=run.last_step, note=f"{len(run.saves)} saves")
            if victim is not None and run.last_step >= kill_at:
                victim.kill()
                console.print(f"  kill -9 to one of the servers at step {run.last_step}")
                show_status("a moment later")
                victim = None
        code = process.wait()
    if code:
        raise DemoFailed(f"torchrun ended with code {code}; see {FOLDER / 'train.log'}")
    return run


def demo(s3: SeaweedFS, servers: list[CacheServer]) -> None:
    bucket = "cluster"
    s3.client.create_bucket(Bucket=bucket)
    console.rule(f"1. {SERVERS} servers have joined a pool in etcd")
    wait_for(SERVERS)
    show_status("before anything is read")
    upload(s3, bucket, "digits", digits(), 1797)

    console.rule(f"2. Train on {RANKS} ranks, undisturbed")
    data = f"s3://{bucket}/digits"
    whole = train(data, f"s3://{bucket}/whole", what="train")
    show_status("with everything cached")

    console.rule("3. Train again, while a server dies")
    broken = train(data, f"s3://{bucket}/run", what="train", victim=random.choice(servers))
    check(not broken.resumes and broken.last_step == STEPS, "no rank failed or had to start again")
    check(whole.weights == broken.weights is not None, "the final weights are equal, bit for bit")
    saved = [save["step"] for save in broken.saves]
    check(saved == list(range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)), f"all {len(saved)} checkpoints were taken")
    with closing(tc.connect()) as pool:
        last = pool.list_saves(f"s3://{bucket}/run")
        check({save.state for save in last} == {"durable"}, "those that are kept are durable in S3")
    wait_for(SERVERS - 1)
    show_status("at the end: etcd's lease of the dead server has run out")


def main() -> int:
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    if not Etcd.installed():
        console.print("[red]This demo needs etcd:[/] apt-get install etcd-server, or put etcd in the path.")
        return 1
    shutil.rmtree(FOLDER, ignore_errors=True)
    folder = FOLDER.resolve()
    with ExitStack() as stack:
        s3 = stack.enter_context(SeaweedFS(folder / "s3"))
        etcd = stack.enter_context(Etcd(folder / "etcd"))
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_urlsafe(32))
        hidden = {name: None for name in os.environ if name.startswith(("AWS_", "TORCHCACHE_"))}
        ours = {"TORCHCACHE_POOL": etcd.address("demo"), "TORCHCACHE_TOKEN_FILE": str(token)}
        stack.enter_context(environment({**hidden, **s3.environment(), **ours}))
        servers = [
            stack.enter_context(CacheServer(folder / f"server-{n}", etcd.address("demo"), token))
            for n in range(SERVERS)
        ]
        try:
            demo(s3, servers)
        except DemoFailed as failed:
            console.print(f"[red]The demo failed:[/] {failed}")
            return 1
    console.print("[green]All of it held.[/]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
