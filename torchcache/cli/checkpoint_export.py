"""`torchcache checkpoint export`."""

from __future__ import annotations

import time
from typing import Literal

import click

from torchcache.cli.command import EXIT_CODES, Session, command
from torchcache.cli.output import duration_text, size_text
from torchcache.sizes import parse_size


@click.command("export", epilog=EXIT_CODES, short_help="Write a checkpoint to a folder, in another format.")
@click.argument("uri")
@click.argument("folder")
@click.option(
    "--to",
    "kind",
    type=click.Choice(["safetensors", "dcp"]),
    required=True,
    help="safetensors: one file, or several and an index. dcp: what torch.distributed.checkpoint reads.",
)
@click.option(
    "--prefix", default="", help='Of safetensors: only tensors whose name starts so, without it ("model.").'
)
@click.option(
    "--max-file-size", default="5GB", show_default=True, help="Of safetensors: begin another file then."
)
@command
def checkpoint_export(
    session: Session,
    uri: str,
    *,
    folder: str,
    kind: Literal["safetensors", "dcp"],
    prefix: str,
    max_file_size: str,
) -> int:
    """Write the checkpoint at URI into FOLDER, which must be empty or not there yet.

    Every byte is checked against the manifest on the way. Sharded tensors become whole. What is no tensor, like the
    settings of an optimizer, has no place in safetensors and is left out, with a warning.
    """
    from torchcache.checkpoint.export import DcpExport, SafetensorsExport

    start_s = time.monotonic()
    export: DcpExport | SafetensorsExport
    if kind == "dcp":
        export = DcpExport(session.pool, uri, folder)
    else:
        export = SafetensorsExport(
            session.pool, uri, folder, prefix=prefix, max_file_bytes=parse_size(max_file_size)
        )
    with session.output.progress("exporting", items=export.tensors, total_bytes=export.bytes) as advance:
        done = export.run(advance)
    took_s = time.monotonic() - start_s
    if done.left_out:
        session.output.warning(f"{done.left_out} values that are no tensors are left out")
    session.output.document(
        {
            "uri": uri,
            "folder": folder,
            "format": kind,
            "files": done.files,
            "tensors": done.tensors,
            "bytes": done.bytes,
            "left_out": done.left_out,
            "seconds": round(took_s, 3),
        }
    )
    session.output.text(
        f"{uri}: {done.tensors:,} tensors, {size_text(done.bytes)} in {len(done.files)} files in {folder}, "
        f"{duration_text(took_s)}"
    )
    return 0
