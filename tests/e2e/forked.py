"""Processes of the tests that need torch: forked off one that has done the imports, which are most of a start."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext


def fork_server() -> ForkServerContext:
    """Its processes are as `spawn`'s, but a hundred times sooner there. Opened descriptors are passed by `DupFd`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.e2e.dying_writer_child", "tests.e2e.kill_ranks_child", "tests.e2e.two_rank_child"]
    )
    return context
