"""Commands that the documents give for the terminal are commands that there are, options and arguments included."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from torchcache_server.process.main import main as server

from torchcache.cli.app import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", *(f"docs/{name}.md" for name in ("operations", "checkpoints", "datasets"))]
COMMAND = re.compile(r"(?:^|`)(torchcache [^`\n]+)", re.MULTILINE)


def commands(document: str) -> list[str]:
    """What follows `torchcache`, in blocks and amid text, without the shell's part of it."""
    text = (ROOT / document).read_text().replace("\\\n", " ")
    return [re.split(r"\s[#|>&]|;", found)[0].removeprefix("torchcache ") for found in COMMAND.findall(text)]


def check(line: str) -> None:
    """Raises click.UsageError for a command that can't be. One that is only named has no arguments."""
    command: click.Command = cli
    context, words = cli.make_context("torchcache", ["ls"]), shlex.split(line)
    while isinstance(command, click.Group) and words:
        name = words.pop(0)
        found = command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"no command {name!r}")
        command = found
    if command.name == "serve":
        server.make_context("serve", words)
    elif words:
        command.make_context(command.name, words)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_are_as_documented(document: str) -> None:
    found = commands(document)
    assert found
    for line in found:
        try:
            check(line)
        except click.UsageError as error:
            pytest.fail(f"{document}: torchcache {line}: {error.format_message()}")


@pytest.mark.parametrize("line", ["checkpoint lss", "status --wach", "serve --pol a:1", "nothing"])
def test_one_that_is_wrong_is_found(line: str) -> None:
    with pytest.raises(click.UsageError):
        check(line)
