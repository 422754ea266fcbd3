"""What is said where S3 refuses signatures because a clock is wrong (F22)."""

from __future__ import annotations

import time
from email.utils import formatdate

import botocore.parsers
import botocore.session
import pytest
from botocore.exceptions import ClientError
from torchcache_server.understore.s3_errors import translate

from torchcache.errors import ConfigurationError, TorchCacheError

DAY_S = 86_400


def refused(code: str, date: str | None, status: int = 403) -> TorchCacheError:
    headers = {} if date is None else {"date": date}
    response = {
        "Error": {"Code": code, "Message": "no"},
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers},
    }
    error = ClientError(response, "HeadObject")  # type: ignore[arg-type]
    return translate(error, action="stat", uri="s3://b/k", endpoint="http://s3")


@pytest.mark.parametrize(
    ("off_s", "said"), [(DAY_S, "1440 minutes ahead of"), (-DAY_S, "1440 minutes behind")]
)
@pytest.mark.parametrize("code", ["403", "", "RequestTimeTooSkewed"])
def test_a_refusal_says_that_the_clock_is_off_and_by_how_much(code: str, off_s: int, said: str) -> None:
    error = refused(code, formatdate(time.time() - off_s, usegmt=True))
    assert isinstance(error, ConfigurationError)
    assert f"this machine's clock is {said} the server's; set the clock" in str(error)


@pytest.mark.parametrize("date", [None, "", "yesterday", "now"])
def test_a_refusal_with_a_right_clock_or_none_speaks_of_the_credentials(date: str | None) -> None:
    date = formatdate(usegmt=True) if date == "now" else date
    assert "clock" not in str(refused("403", date))
    assert "credentials" in str(refused("403", date))


@pytest.mark.parametrize(
    ("code", "said"),
    [("AccessDenied", "the credentials don't allow it"), ("SignatureDoesNotMatch", "the secret key")],
)
def test_a_refusal_that_gives_another_reason_is_not_blamed_on_the_clock(code: str, said: str) -> None:
    error = refused(code, formatdate(0, usegmt=True))  # of anonymous access, or where no clock is looked at
    assert "clock" not in str(error)
    assert said in str(error)


def test_botocore_gives_a_refusal_of_a_head_its_status_for_a_code() -> None:
    # What the condition on the code stands on.
    shape = botocore.session.get_session().get_service_model("s3").operation_model("HeadObject").output_shape
    answer = {"status_code": 403, "headers": {}, "body": b""}
    parsed = botocore.parsers.create_parser("rest-xml").parse(answer, shape)
    assert parsed["Error"]["Code"] == "403"


def test_what_is_no_refusal_of_a_signature_is_not_blamed_on_the_clock() -> None:
    assert "clock" not in str(refused("NoSuchKey", formatdate(0, usegmt=True), status=404))
