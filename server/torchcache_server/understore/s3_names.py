"""How keys of an S3 under-store map to buckets and S3 keys. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torchcache.errors import ConfigurationError
from torchcache_server.understore.base import check_key, shown_uri

# What S3 and its kin allow. An ARN, which boto3 would take for a bucket and send to another host, is none.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}")


@dataclass(frozen=True, slots=True)
class S3Object:
    """One key of one bucket."""

    bucket: str
    key: str

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


@dataclass(frozen=True, slots=True)
class S3Root:
    """Root of an S3 under-store. Without a bucket, keys begin with one. `prefix` is empty or ends in a slash."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, uri: str) -> S3Root:
        """From "s3://", "s3://bucket" or "s3://bucket/prefix". Raises ConfigurationError."""
        bucket, _, prefix = uri.removeprefix("s3://").strip("/").partition("/")
        if (
            not uri.startswith("s3://")
            or uri.startswith("s3:///")
            or (bucket and not _BUCKET.fullmatch(bucket))
        ):
            raise ConfigurationError(
                f"{shown_uri(uri)!r} is not the URI of an S3 bucket: write s3://bucket/prefix"
            )
        if prefix:
            check_key(prefix, uri)
        return cls(bucket, f"{prefix}/" if prefix else "")

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/") if self.bucket else "s3://"

    def locate(self, key: str) -> S3Object:
        """Where the object `key` lies. Raises ConfigurationError for a key that can't be one."""
        located = self._split(key)
        check_key(key if self.bucket else located.key, located.uri)
        return located

    def locate_prefix(self, prefix: str) -> S3Object:
        """Where keys with `prefix` lie. Raises ConfigurationError if the bucket isn't named in full."""
        if not self.bucket and "/" not in prefix:
            raise ConfigurationError(
                f"{shown_uri(self.uri + prefix)} names no bucket to list: write s3://bucket/folder/"
            )
        return self._split(prefix)

    def relative(self, located: S3Object) -> str:
        """The under-store's key of an S3 object: the inverse of `locate`."""
        return located.key[len(self.prefix) :] if self.bucket else f"{located.bucket}/{located.key}"

    def _split(self, key: str) -> S3Object:
        if self.bucket:
            return S3Object(self.bucket, self.prefix + key)
        bucket, _, rest = key.partition("/")
        if not _BUCKET.fullmatch(bucket):
            shown = shown_uri(f"s3://{key}").removeprefix("s3://")
            raise ConfigurationError(
                f"{shown.partition('/')[0]!r} in s3://{shown} can't be the name of an S3 bucket", object=shown
            )
        return S3Object(bucket, rest)
