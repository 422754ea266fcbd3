"""`torchcache keygen`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torchcache.cli.command import EXIT_CODES, exit_code
from torchcache.cli.output import Output
from torchcache.errors import ConfigurationError, TorchCacheError
from torchcache.tokens import Scope, ScopedToken, format_tokens, parse_tokens

if TYPE_CHECKING:
    from torchcache.cli.certificates import Pair

_MOST_DAYS = 3650


@click.command(
    epilog=EXIT_CODES, short_help="Make the certificates and the token of a pool of several machines."
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--host",
    "hosts",
    metavar="HOST",
    multiple=True,
    required=True,
    help="A name or address by which clients reach a server, like cache-1.example or 10.0.0.1; repeatable. The name of "
    "a dns:// pool, too.",
)
@click.option(
    "--days",
    type=click.IntRange(1, _MOST_DAYS),
    default=365,
    show_default=True,
    help="How long the certificates of servers and clients hold.",
)
@click.option(
    "--scope",
    "scopes",
    type=click.Choice([str(scope) for scope in Scope]),
    multiple=True,
    help="A token that allows no more than this, in a file token-SCOPE of its own; repeatable. The servers' file "
    "gets it, too.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def keygen(folder: Path, hosts: tuple[str, ...], *, days: int, scopes: tuple[str, ...], as_json: bool) -> int:
    """Make in DIR what servers and clients of a pool prove themselves with.

    An authority (ca.pem, ca-key.pem) signs one certificate for all servers and one for all clients, and a token is
    made. Run again, the authority and the tokens stay, and the certificates are new: to add hosts or scopes, or before
    they run out. ca-key.pem is needed only for that: keep it off the servers.
    """
    output = Output(as_json=as_json)
    try:
        renewed = _make(folder.absolute(), hosts, days)
        _make_tokens(folder.absolute(), [Scope[scope.upper()] for scope in dict.fromkeys(scopes)])
    except TorchCacheError as error:
        output.error(error)
        return exit_code(error)
    output.document({"folder": str(folder.absolute()), "hosts": list(hosts), "authority_kept": renewed})
    output.text(_advice(folder, renewed=renewed, scopes=tuple(dict.fromkeys(scopes))))
    return 0


def _make(folder: Path, hosts: tuple[str, ...], days: int) -> bool:
    """Whether the authority was there already. Raises ConfigurationError."""
    try:
        from torchcache.cli.certificates import Pair, make_authority, make_certificate
    except ImportError as error:
        raise ConfigurationError("keygen needs cryptography: pip install 'torchcache[tls]'") from error
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        files = (folder / "ca.pem", folder / "ca-key.pem")
        there = [file.exists() for file in files]
        if any(there) and not all(there):
            raise ConfigurationError(
                f"{folder} has only one of ca.pem and ca-key.pem: bring the other back, or take an empty folder"
            )
        authority = Pair(*(file.read_bytes() for file in files)) if all(there) else make_authority()
        server = make_certificate(authority, "server", hosts, days=days)
        client = make_certificate(authority, "client", (), days=days)
        if not all(there):
            _write_pair(folder, "ca", authority)
        _write_pair(folder, "server", server)
        _write_pair(folder, "client", client)
    except OSError as error:
        raise ConfigurationError(f"{error.filename or folder} can't be used: {error.strerror}") from error
    return all(there)


def _make_tokens(folder: Path, scopes: Sequence[Scope]) -> None:
    """The servers' file `token`, its first line for everything, and one more for each of `scopes`. Those there stay."""
    file = folder / "token"
    try:
        tokens = list(parse_tokens(file.read_text())) if file.exists() else [_new(Scope.ADMIN)]
        known = len(tokens) if file.exists() else 0
        for scope in scopes:
            own = folder / f"token-{scope}"
            token = parse_tokens(own.read_text())[0] if own.exists() else _new(scope)
            if token not in tokens:
                tokens.append(token)
            if not own.exists():
                _write(own, format_tokens([token]).encode())
        if len(tokens) > known:
            _write(file, format_tokens(tokens).encode())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the tokens in {folder} can't be used: {error}") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"the tokens in {folder} can't be used: {error.message}") from None


def _new(scope: Scope) -> ScopedToken:
    return ScopedToken(scope, secrets.token_urlsafe(32))


def _write_pair(folder: Path, name: str, pair: Pair) -> None:
    _write(folder / f"{name}-key.pem", pair.key)
    _write(folder / f"{name}.pem", pair.certificate, mode=0o644)


def _write(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Whole or not at all; never readable by others in between."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    temporary.replace(path)


def _advice(folder: Path, *, renewed: bool, scopes: Sequence[str]) -> str:
    made = (
        "new certificates by the authority that was there"
        if renewed
        else "an authority, certificates, a token"
    )
    less = "".join(
        f"\nfor clients that need no more than {scope}: token-{scope} in its place" for scope in scopes
    )
    return f"""{folder}: {made}

on every server (all but ca-key.pem; copies of token need chmod 600):
  export TORCHCACHE_TLS_CA=ca.pem TORCHCACHE_TLS_CERT=client.pem TORCHCACHE_TLS_KEY=client-key.pem
  torchcache serve --listen HOST:7440 --token-file token --tls-cert server.pem --tls-key server-key.pem \\
    --tls-client-ca ca.pem --pool HOST:7440,... --store ... --capacity ... --under-store s3=s3://
for every client (ca.pem, client.pem, client-key.pem, token):
  export TORCHCACHE_POOL=HOST:7440 TORCHCACHE_TOKEN_FILE=token TORCHCACHE_TLS_CA=ca.pem \\
    TORCHCACHE_TLS_CERT=client.pem TORCHCACHE_TLS_KEY=client-key.pem{less}
nowhere else: ca-key.pem, which signs more of them"""
