"""`torchcache drain`: has one server of a pool end in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from torchcache.cli.command import EXIT_CODES, EXIT_FAILED, Session, command
from torchcache.cli.output import size_text
from torchcache.errors import ConfigurationError

if TYPE_CHECKING:
    from torchcache.pool.draining import Drain


@click.command(
    epilog=(
        "\b\nExamples:\n  torchcache drain node7:7440 --pool etcd://etcd:2379/train --wait\n\n"
        f"{EXIT_CODES} With --wait, 1 is that something is left that isn't in storage."
    ),
    short_help="End one server in order.",
)
@click.argument("server")
@click.option("--wait", is_flag=True, help="Come back when it has drained, and say what is left.")
@command
def drain(session: Session, server: str, *, wait: bool) -> int:
    """Have SERVER, HOST:PORT or a server's id as `torchcache status` shows them, end as by SIGTERM.

    It withdraws from the pool, finishes the streams that run, uploads what isn't in storage yet, and its process ends.
    Clients read from the next server meanwhile. A token of scope admin is needed.
    """
    if session.uses_embedded_pool:
        raise ConfigurationError("name the pool by --pool: an embedded one ends when nobody uses it any more")
    states = session.pool.drain(server)
    state = next(states)
    if wait:
        state = _watched(session, state, states)
    session.output.document(asdict(state))
    if not state.done:
        session.output.text(f"{state.address} drains: {_progress(state)}, for at most {state.drain_s:g} s")
        return 0
    for uri in state.left:
        session.output.text(f"not in storage yet: {uri}")
    if state.left:
        session.output.text(
            f"{state.address} has drained, but for these; a server on the same store goes on with them"
        )
        return EXIT_FAILED
    session.output.text(f"{state.address} has drained: all is in storage")
    return 0


def _watched(session: Session, state: Drain, states: Iterator[Drain]) -> Drain:
    """Its last state. What changes meanwhile is told on stderr."""
    told = ""
    while not state.done:
        if (line := f"{state.address}: {_progress(state)}") != told:
            told = line
            session.output.warning(line)
        state = next(states)
    return state


def _progress(state: Drain) -> str:
    return f"{state.streams} streams run, {size_text(state.pending_bytes)} to be uploaded"
