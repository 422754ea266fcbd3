"""Real processes and real disks: SIGKILL in the middle of writing, and a file system that is full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from torchcache_server.store import Store

from tests.unit.store_parts import CAPACITY, chunk, payload

ROOT = Path(__file__).parents[2]
SIZE = 300_000

WRITER = """
import sys, threading
from pathlib import Path
from tests.unit.store_parts import CAPACITY, chunk, payload
from torchcache_server.store import Store

store = Store(Path(sys.argv[1]), capacity_bytes=CAPACITY)
first = int(sys.argv[2])

def write(thread):
    for n in range(first + thread, first + 48, 4):
        store.put("kept" if n % 2 else "other", chunk(n), {size}, payload(n, {size}))
        sys.stdout.write(f"{{n}}\\n")
        sys.stdout.flush()

store.keep("kept", True)
threads = [threading.Thread(target=write, args=(t,)) for t in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
threading.Event().wait()
"""

FULL = """
import sys
from pathlib import Path
from tests.unit.store_parts import MIB, fill, held
from torchcache.errors import OutOfSpace
from torchcache_server.store import Store

path = Path(sys.argv[1]) / "store"
store = Store(path, capacity_bytes=256 * MIB)
stored = 0
store.keep("a", True)
try:
    for n in range(100):
        fill(store, "a", range(n, n + 1), MIB)
        stored += 1
except OutOfSpace as error:
    print(error)
assert 5 <= stored < 16, stored
assert all(held(store, n, MIB) for n in range(stored))
store.keep("a", False)
fill(store, "b", range(200, 204), MIB)
assert all(held(store, n, MIB) for n in range(200, 204))
store.close()
store = Store(path, capacity_bytes=256 * MIB)
assert all(held(store, n, MIB) for n in range(200, 204))
store.close()
print("done")
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-W", "error", "-c", code]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "server")])}


def test_what_was_put_before_a_kill_is_there_after_it(tmp_path: Path) -> None:
    """F1, F2: killed at ever later points; each time the next server finds all that was acknowledged, and goes on."""
    path = tmp_path / "store"
    acknowledged: set[int] = set()
    for turn, kill_after in enumerate((1, 7, 20, 35)):
        command = [*python(WRITER.format(size=SIZE)), str(path), str(turn * 48)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as writer:
            assert writer.stdout is not None
            acknowledged |= {int(writer.stdout.readline()) for _ in range(kill_after)}
            writer.send_signal(signal.SIGKILL)
            # What was printed before the kill counts too; the last line may be cut.
            acknowledged |= {int(line) for line in writer.stdout.read().split("\n")[:-1]}
        store = Store(path, capacity_bytes=CAPACITY)
        for n in range(48 * (turn + 1)):
            found = store.lookup(chunk(n))
            assert found is not None or n not in acknowledged
            if found is not None:
                assert bytes(found.payload) == payload(n, SIZE)
        assert store.usage().corrupt == 0
        assert {n.name: n.kept for n in store.namespaces()}["kept"]
        store.close()
    assert len(acknowledged) >= 63


def test_a_full_file_system(tmp_path: Path) -> None:
    """F10: a tmpfs of 16 MiB in a mount namespace of its own."""
    script = 'mount -t tmpfs -o size=16m none "$0" && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(tmp_path)]
    done = subprocess.run(
        [*command, *python(FULL), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "is full but for" in done.stdout
    assert done.stdout.endswith("done\n")
