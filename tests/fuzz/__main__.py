"""`python -m tests.fuzz TARGET [--executions N] [--seconds S] [--seed N]`: one target, by Atheris or by our mutator.

By Atheris it is led by the branches that inputs reach, in a process of its own, which ends with its figures on stderr;
the input that it failed with is in a file crash-*. Without TARGET it says which there are.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.proofs import proof


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("target", nargs="?")
    parser.add_argument("--executions", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=int, default=0, help="stop after so long; 0: not")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="by our mutator, also where Atheris is")
    parser.add_argument("--within", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    try:
        import atheris
    except ImportError:
        atheris = None
    if given.target and atheris is not None and not given.plain and not given.within:
        sys.exit(_by_atheris(given.target, given.seed))
    if given.within:
        with atheris.instrument_imports(include=["torchcache", "torchcache_server"]):
            from tests.fuzz.targets import TARGETS
    else:
        from tests.fuzz.targets import TARGETS
    if given.target not in TARGETS:
        print("\n".join(TARGETS))
        return
    target = TARGETS[given.target]
    if not given.within:
        _by_our_mutator(given.target, given.executions, given.seconds, given.seed)
        return
    corpus = Path(tempfile.mkdtemp(prefix=f"fuzz-{given.target}-"))
    for number, seed in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(seed)
    arguments = [
        sys.argv[0],
        f"-runs={given.executions}",
        f"-seed={given.seed}",
        "-max_len=65536",
        str(corpus),
    ]
    if given.seconds:
        arguments.insert(1, f"-max_total_time={given.seconds}")
    atheris.Setup(arguments, target.run)
    atheris.Fuzz()  # doesn't return


def _by_atheris(name: str, seed: int) -> int:
    """Runs it in a process of its own, which Atheris ends, and notes what that says it did. Returns the exit code."""
    command = [sys.executable, "-m", "tests.fuzz", "--within", *sys.argv[1:]]
    done = None
    with (
        proof(f"fuzz-{name}") as figures,
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process,
    ):
        for line in process.stderr or ():
            sys.stderr.write(line)
            done = re.match(r"Done (\d+) runs", line) or done
        if process.wait() or done is None:
            sys.exit(process.returncode or 1)
        figures |= {"executions": int(done[1]), "seed": seed, "by": "Atheris"}
    return 0


def _by_our_mutator(name: str, executions: int, seconds: int, seed: int) -> None:
    from tests.fuzz.mutating import mutated
    from tests.fuzz.targets import TARGETS

    target, until = TARGETS[name], time.monotonic() + (seconds or float("inf"))
    done = 0
    with proof(f"fuzz-{name}") as figures:
        for data in mutated(target.seeds, executions, random.Random(seed)):
            try:
                target.run(data)
            except Exception:
                print(f"seed {seed}, execution {done}: {data!r}", file=sys.stderr)
                raise
            done += 1
            if not done % 1000 and time.monotonic() > until:
                break
        figures |= {"executions": done, "seed": seed, "by": "our mutator"}
    print(f"{name}: {done:,} executions, seed {seed}, no failure")


if __name__ == "__main__":
    main()
