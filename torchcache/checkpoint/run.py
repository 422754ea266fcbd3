"""The checkpoints of one run: folders `step-<n>` under one root, and whether each is whole. Free of torch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from torchcache.checkpoint.catalog import Checkpoint, list_checkpoints
from torchcache.checkpoint.manifest import Manifest
from torchcache.checkpoint.retention import Step, StepState
from torchcache.errors import IntegrityError, NotCommitted, ObjectNotFound
from torchcache.model import ObjectInfo
from torchcache.save_names import METADATA_NAME

if TYPE_CHECKING:
    from torchcache.pool import Pool, SaveInfo

_STEP: Final = re.compile(r"step-(0|[1-9][0-9]{0,17})")

_STATES: Final[dict[str, StepState]] = {
    "saving": "saving",
    "cached": "cached",
    "replicated": "replicated",
    "durable": "durable",
    "failed": "failed",
    "stock": "durable",
    "unfinished": "broken",
}


def step_uri(root: str, step: int) -> str:
    """Where the checkpoint of a step lies."""
    return f"{root}/step-{step}"


def list_steps(pool: Pool, root: str) -> list[Step]:
    """The checkpoints of the run at `root`, by step; none if there is nothing there yet."""
    try:
        found = list_checkpoints(pool, root)
    except ObjectNotFound:
        return []
    folder = pool.resolve(root)
    steps = [_step(root, one, pool.resolve(one.uri), folder) for one in found if not one.part]
    return sorted((step for step in steps if step is not None), key=lambda s: s.step)


def _step(root: str, one: Checkpoint, where: tuple[str, str], folder: tuple[str, str]) -> Step | None:
    parent, _, name = where[1].rpartition("/")
    match = _STEP.fullmatch(name)
    if match is None or (where[0], parent) != folder:
        return None
    problem = one.error
    if one.state == "unfinished":
        problem = "it was begun and never finished, or is half deleted"
    step = int(match[1])
    return Step(
        step=step, uri=step_uri(root, step), state=_STATES[one.state], bytes=one.bytes, problem=problem
    )


def require_whole(pool: Pool, uri: str) -> None:
    """Raises NotCommitted or IntegrityError, saying why, if the checkpoint at `uri` can't be restored.

    Looks at its manifest, and for each file at its size in storage or in the pool; reads none of them.
    """
    store, path = pool.resolve(uri)
    try:
        save = pool.get_save(store, path)
    except NotCommitted:
        if _is_stock(pool, uri):
            return
        raise
    if save.state == "reserved":
        raise NotCommitted(f"the checkpoint at {uri} is being written", object=uri)
    files = Manifest.decode(save.manifest, where=uri).files
    lacking = _lacking_in_pool(pool, save, files)
    if lacking and save.state == "durable":
        prefix = f"{path}/"
        stored = {object.id.key.removeprefix(prefix): object.size for object in pool.list(uri + "/")}
        lacking = [name for name in lacking if stored.get(name) != files[name]]
    if lacking:
        more = f" and {len(lacking) - 1} more files" if len(lacking) > 1 else ""
        where = "storage or the pool" if save.state == "durable" else "the pool"
        raise IntegrityError(
            f"{uri} is broken: {lacking[0]}{more} can't be found whole in {where}", object=uri
        )


def _lacking_in_pool(pool: Pool, save: SaveInfo, files: dict[str, int]) -> list[str]:
    names = list(files)
    objects = [ObjectInfo(save.file(name), files[name]) for name in names]
    held = pool.resident_bytes(objects) if objects else []
    return [name for name, bytes in zip(names, held, strict=True) if bytes < files[name]]


def _is_stock(pool: Pool, uri: str) -> bool:
    try:
        return pool.stat(f"{uri}/{METADATA_NAME}").size > 0
    except ObjectNotFound:
        return False
