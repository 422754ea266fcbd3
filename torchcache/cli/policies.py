"""`torchcache pin`, `unpin`, `evict` and `limit`: what a dataset or checkpoint may take of the pool."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import click

from torchcache.cli.command import EXIT_CODES, Session, command
from torchcache.cli.durations import parse_duration
from torchcache.cli.objects import folder_uri, is_there
from torchcache.cli.output import policy_text, size_text
from torchcache.errors import ConfigurationError, ObjectNotFound, ServerUnavailable
from torchcache.model import SAMPLES, SAVE_PREFIX
from torchcache.save_names import KEPT_PREFIXES
from torchcache.sizes import parse_size

if TYPE_CHECKING:
    from torchcache.pool import NamespaceStatus, Pool

_NONE: Final = "none"


def _epilog(*examples: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  torchcache {line}" for line in examples) + f"\n\n{EXIT_CODES}"


@click.command(
    epilog=_epilog("pin s3://bucket/images", "pin s3://bucket/run/step-100"),
    short_help="Keep a dataset or checkpoint in the pool.",
)
@click.argument("uri")
@command
def pin(session: Session, uri: str) -> None:
    """Keep what the pool holds of URI, and what comes of it: it is never evicted for others.

    URI is a dataset's folder, like s3://bucket/images, a checkpoint's, or a name that `torchcache status` shows, like
    samples:NAME@VERSION.

    A dataset that isn't in the pool yet can be pinned too; `torchcache stage` fetches it. A checkpoint's copy in the
    pool stays after the upload, until another save takes its place.
    """
    done = _apply(session, uri, pinned=True)
    session.output.text(f"pinned {uri}: {_held(done, 'stays')}")


@click.command(
    epilog=_epilog("unpin s3://bucket/images"),
    short_help="Let it be evicted again.",
)
@click.argument("uri")
@command
def unpin(session: Session, uri: str) -> None:
    """Let what the pool holds of URI be evicted again when others need the room.

    URI is a dataset's folder, like s3://bucket/images, a checkpoint's, or a name that `torchcache status` shows, like
    samples:NAME@VERSION.
    """
    done = _apply(session, uri, pinned=False)
    session.output.text(f"unpinned {uri}: {_held(done, 'may be evicted')}")


@click.command(
    epilog=_epilog("evict s3://bucket/images", "evict samples:Imagenet-1281167@0"),
    short_help="Free what the pool holds of a dataset.",
)
@click.argument("uri")
@command
def evict(session: Session, uri: str) -> None:
    """Free what the pool holds of URI, now.

    Storage keeps it: read again, it is fetched again; computed samples are computed again. Its limits stay.

    URI is a dataset's folder, like s3://bucket/images, a checkpoint's, or a name that `torchcache status` shows, like
    samples:NAME@VERSION.

    Refused for what is pinned, and for a checkpoint that isn't in storage yet. Where nothing of it is held there is
    nothing to do, and the exit code is 0; it is 1 for a folder that storage doesn't have either.
    """
    # The copy of a checkpoint that isn't in storage yet refuses, and should before anything is gone.
    names = sorted(_namespaces(session.pool, uri), key=lambda name: not name.startswith(KEPT_PREFIXES))
    freed = {name: session.pool.evict(name) for name in names}
    total = sum(freed.values())
    session.output.document(
        {
            "uri": uri,
            "freed_bytes": total,
            "namespaces": [{"name": name, "freed_bytes": size} for name, size in freed.items()],
        }
    )
    session.output.text(
        f"evicted {uri}: {size_text(total)} freed" if total else f"the pool held nothing of {uri}"
    )


@click.command(
    epilog=_epilog(
        "limit s3://bucket/images --quota 100GB --ttl 7d", "limit s3://bucket/images --quota none"
    ),
    short_help="Set a dataset's quota, time to live and priority.",
)
@click.argument("uri")
@click.option(
    "--quota",
    metavar="SIZE|none",
    help="It takes no more of the pool than this, like 100GB; the rest is read without being kept.",
)
@click.option("--ttl", metavar="TIME|none", help="Drop it once nobody used it for so long, like 12h or 7d.")
@click.option(
    "--priority",
    metavar="N",
    type=click.IntRange(-1000, 1000),
    help="Lower ones yield first, and take no room from higher ones; 0 unless set.",
)
@command
def limit(session: Session, uri: str, *, quota: str | None, ttl: str | None, priority: int | None) -> None:
    """Set how much of the pool a dataset may take, for how long, and who yields first.

    URI is the dataset's folder, like s3://bucket/images, or a name that `torchcache status` shows, like
    samples:NAME@VERSION. What isn't given stays as it is.
    """
    if quota is None and ttl is None and priority is None:
        raise ConfigurationError("nothing to set: give --quota, --ttl or --priority")
    done = _apply(
        session,
        uri,
        priority=priority,
        quota_bytes=None if quota is None else 0 if quota == _NONE else parse_size(quota),
        ttl_s=None if ttl is None else 0.0 if ttl == _NONE else parse_duration(ttl),
    )
    found = [namespace for _, namespace in done]
    first, quota_bytes = found[0], sum(namespace.quota_bytes or 0 for namespace in found)
    policy = policy_text(
        pinned=first.pinned, priority=first.priority, quota_bytes=quota_bytes, ttl_s=first.ttl_s
    )
    session.output.text(
        f"{uri}: {policy or 'no limits'}; {size_text(sum(n.bytes for n in found))} in the pool"
    )


def _apply(
    session: Session,
    uri: str,
    *,
    pinned: bool | None = None,
    priority: int | None = None,
    quota_bytes: int | None = None,
    ttl_s: float | None = None,
) -> list[tuple[str, NamespaceStatus]]:
    """Sets the policy of all that `uri` means and prints the document; returns (server, what it has now)."""
    names = _namespaces(session.pool, uri)
    if pinned is None and len(names) > 1:
        raise ConfigurationError(
            f"{uri} is a checkpoint: it can be pinned or evicted, and has no quota, time to live or priority",
            object=uri,
        )
    done = [
        (server, namespace)
        for name in names
        for server, namespace in session.pool.set_policy(
            name, pinned=pinned, priority=priority, quota_bytes=quota_bytes, ttl_s=ttl_s
        ).items()
    ]
    if uri.startswith(KEPT_PREFIXES) and not any(namespace.bytes for _, namespace in done):
        raise ObjectNotFound(f"the pool holds nothing named {uri}", object=uri)
    session.output.document(
        {"uri": uri, "namespaces": [{"server": server} | asdict(namespace) for server, namespace in done]}
    )
    return done


def _namespaces(pool: Pool, uri: str) -> list[str]:
    """What the servers call `uri`: the folder, and behind it the copies in the pool of the checkpoint saved there.

    Raises ObjectNotFound for a folder of which neither the pool nor storage has anything: it is misspelt. And
    ServerUnavailable while a server doesn't say what it holds: it may be a copy that no other has.
    """
    held = {namespace.name for server in pool.status() for namespace in server.namespaces}
    if away := ", ".join(pool.unreachable()):
        raise ServerUnavailable(
            f"{away} can't be reached, so it can't be told what lies there of {uri}. Nothing was changed; do it again "
            "once it answers",
            server=away,
        )
    if uri.startswith((f"{SAMPLES}:", *KEPT_PREFIXES)) or ("://" not in uri and uri in held):
        return [uri]
    folder = folder_uri(pool, uri)
    store, path = pool.resolve(folder)
    saved = f"{SAVE_PREFIX}{store}/{path.rstrip('/')}"
    names = [folder.rstrip("/"), *sorted(n for n in held if n.rpartition("@")[0] == saved)]
    if held.isdisjoint(names) and not is_there(pool, uri):
        raise ObjectNotFound(
            f"neither the pool nor storage has anything at {uri}; check the name", object=uri
        )
    return names


def _held(done: list[tuple[str, NamespaceStatus]], fate: str) -> str:
    size = sum(namespace.bytes for _, namespace in done)
    return f"{size_text(size)} in the pool {fate}" if size else "nothing of it is in the pool now"
