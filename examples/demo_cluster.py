"""`make demo-cluster`: a pool of four servers in etcd, two ranks that train through it, and a server that is killed.

Trains once undisturbed and once with `kill -9` to one of the servers on the way, and checks that nobody could tell: no
rank failed or started again, and the weights are equal, bit for bit. `torchcache status --watch` runs beside all that;
what it shows before, while and after the server dies is printed.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
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
    """Until so many servers answer in the pool, and etcd knows of no others."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with closing(tc.connect()) as pool:
                found, away = len(pool.status()), pool.unreachable()
            if found == servers and not away:
                return
            why = f", and {', '.join(away)} can't be reached" if away else ""
        except tc.TransientError as error:
            found, why = 0, f" ({error})"
        if time.monotonic() > deadline:
            raise DemoFailed(
                f"after {timeout_s:.0f} s {found} servers answer, not {servers}{why}; see {FOLDER}/server-*/server.log"
            )
        time.sleep(0.2)


class StatusWatch:
    """`torchcache status --watch`, which runs beside everything else, and what it says, look by look."""

    def __init__(self) -> None:
        self._looks: list[str] = []
        self._said = ""
        self._changed = threading.Condition()
        command = [sys.executable, "-m", "torchcache.cli", "status", "--watch", "1"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            with self._changed:
                if re.match(r"[\d:]{8}: \d+ servers? answers?$", line):
                    self._looks.append("")
                if self._looks:
                    self._looks[-1] += line
                self._said = (self._said + line)[-4000:]
                self._changed.notify_all()

    def show(self, title: str, servers: int, timeout_s: float = 60.0) -> None:
        """Prints the next whole look at which so many servers answer."""
        with self._changed:
            seen = len(self._looks)
            deadline = time.monotonic() + timeout_s
            while not (whole := [look for look in self._looks[seen:-1] if f": {servers} server" in look]):
                if (code := self.process.poll()) is not None:
                    raise DemoFailed(f"torchcache status --watch ended with code {code}:\n{self._said}")
                if time.monotonic() > deadline:
                    last = _head(self._looks[-1]) if self._looks else self._said
                    raise DemoFailed(
                        f"for {timeout_s:.0f} s torchcache status --watch didn't show {servers} servers:\n{last}"
                    )
                self._changed.wait(1.0)
        console.print(f"  [bold]torchcache status --watch[/], {title}:")
        console.print(_head(whole[0]), markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGINT)  # Ctrl-C
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()


def _head(look: str) -> str:
    """What matters most of a look: lanes, disks and storage follow."""
    return re.split(r"\n[^\n]*lane from here", look)[0].rstrip()


def train(data: str, run_uri: str, watch: StatusWatch, victim: CacheServer | None = None) -> Run:
    """Two ranks under torchrun, whose events rank 0 prints; kills `victim` somewhere in the middle."""
    run = Run()
    kill_at = random.randrange(STEPS // 3, 2 * STEPS // 3)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += ["-m", "examples.train_ranks", data, run_uri, "--events"]
    command += [f"--epochs={EPOCHS}", f"--save-every={SAVE_EVERY}"]
    with progress() as bar, (FOLDER / "train.log").open("a") as log:
        task = bar.add_task("train", total=STEPS, note="")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            for line in process.stdout or ():
                note(json.loads(line), run)
                bar.update(task, completed=run.last_step, note=f"{len(run.saves)} saves")
                if victim is not None and run.last_step >= kill_at:
                    watch.show(f"at step {run.last_step}", SERVERS)
                    victim.kill()
                    console.print("  [bold]kill -9[/] to one of the servers")
                    watch.show("a moment later", SERVERS - 1)
                    victim = None
        except BaseException:
            process.terminate()  # it ends its ranks
            process.wait()
            raise
        code = process.wait()
    if code:
        raise DemoFailed(f"torchrun ended with code {code}; see {FOLDER / 'train.log'}")
    return run


def demo(s3: SeaweedFS, servers: list[CacheServer], watch: StatusWatch) -> None:
    bucket = "cluster"
    s3.client.create_bucket(Bucket=bucket)
    console.rule(f"1. {SERVERS} servers have joined a pool in etcd")
    watch.show("before anything is read", SERVERS)
    upload(s3, bucket, "digits", digits(), 1797)

    console.rule(f"2. Train on {RANKS} ranks, undisturbed")
    data = f"s3://{bucket}/digits"
    whole = train(data, f"s3://{bucket}/whole", watch)
    watch.show("with everything cached", SERVERS)

    console.rule("3. Train again, while a server dies")
    broken = train(data, f"s3://{bucket}/run", watch, victim=random.choice(servers))
    check(not broken.resumes and broken.last_step == STEPS, "no rank failed or had to start again")
    check(whole.weights == broken.weights is not None, "the final weights are equal, bit for bit")
    saved = [save["step"] for save in broken.saves]
    check(saved == list(range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)), f"all {len(saved)} checkpoints were taken")
    with closing(tc.connect()) as pool:
        last = pool.list_saves(f"s3://{bucket}/run")
        check({save.state for save in last} == {"durable"}, "those that are kept are durable in S3")
    wait_for(SERVERS - 1)  # of whom etcd knows: the lease of the dead one has run out
    watch.show("at the end: etcd's lease of the dead server has run out", SERVERS - 1)


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
            wait_for(SERVERS)
            with StatusWatch() as watch:
                demo(s3, servers, watch)
        except DemoFailed as failed:
            console.print("[red]The demo failed:[/]", end=" ")
            console.print(str(failed), markup=False, highlight=False, soft_wrap=True)
            return 1
    console.print("[green]All of it held.[/]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
