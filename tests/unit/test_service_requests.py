"""What clients ask for, checked: every way to ask for nonsense is refused before anything is done."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchcache_server.cache.policies import PolicyChange
from torchcache_server.service import requests
from torchcache_server.service.requests import (
    MAX_NAMESPACE_BYTES,
    MAX_OBJECT_BYTES,
    namespace_name,
    policy_change,
    read_plan,
    reported_use,
    save_id,
    timeout,
    told_piece,
    wanted_ahead,
    write_plan,
)

from torchcache.errors import ConfigurationError
from torchcache.model import SAMPLES
from torchcache.wire.v1 import cache_pb2 as pb

OBJECT = pb.ObjectRef(store="s3", key="bucket/key", version="v1", size=100)
SAMPLE = pb.ObjectRef(store=SAMPLES, key="set/7", version="1", size=-1)
SAVED = pb.ObjectRef(store="s3", key="bucket/run/step-1/__0_0.distcp", version="save:abc", size=10)


def ticket(**fields: Any) -> bytes:
    defaults: dict[str, Any] = {
        "namespace": "n",
        "objects": [OBJECT],
        "object": [0],
        "offset": [0],
        "length": [-1],
    }
    return pb.ReadRequest(**(defaults | fields)).SerializeToString()


def test_a_read_is_resolved_to_ends() -> None:
    plan = read_plan(
        ticket(objects=[OBJECT, SAMPLE], object=[0, 0, 1], offset=[0, 90, 5], length=[-1, 10, -1])
    )
    assert list(zip(plan.object, plan.start, plan.end, strict=True)) == [
        (0, 0, 100),
        (0, 90, 100),
        (1, 5, -1),
    ]
    assert plan.timeout_s == requests.DEFAULT_CALL_S


def test_a_read_tells_whom_its_client_passes_over() -> None:
    told = [
        pb.PassedOver(server_id="a-1", reason="slow"),
        pb.PassedOver(server_id="b", reason="of later versions"),
    ]
    plan = read_plan(ticket(passed_over=told, hedge=True))
    assert (plan.passed_over, plan.hedge) == ([("a-1", "slow")], True)
    assert (read_plan(ticket()).passed_over, read_plan(ticket()).hedge) == ([], False)
    for wrong in (
        [pb.PassedOver(server_id="../a", reason="slow")],
        told * (requests.MAX_PASSED_OVER // 2 + 1),
    ):
        with pytest.raises(ConfigurationError, match=r"a server.s id is|a read tells of 66 servers"):
            read_plan(ticket(passed_over=wrong))


def test_a_read_of_nothing_is_fine() -> None:
    assert read_plan(ticket(objects=[], object=[], offset=[], length=[])).object == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"object": [1]}, "doesn't list"),
        ({"objects": []}, "doesn't list"),
        ({"offset": [-1]}, "do not lie within the 100 bytes"),
        ({"offset": [101]}, "do not lie within"),
        ({"length": [-2]}, "do not lie within"),
        ({"length": [101]}, "do not lie within"),
        ({"offset": [50], "length": [2**63 - 1]}, "do not lie within"),
        ({"objects": [SAMPLE], "offset": [2**62], "length": [2**63 - 1]}, "do not lie within"),
        ({"offset": []}, "differ in length"),
        ({"length": [1, 2]}, "differ in length"),
        ({"timeout_s": -1.0}, "timeout"),
        ({"timeout_s": float("nan")}, "timeout"),
        ({"objects": [pb.ObjectRef(store="s3", key="", version="v", size=1)]}, "the key is missing"),
        ({"objects": [pb.ObjectRef(store="", key="k", version="v", size=1)]}, "the under-store is missing"),
        ({"objects": [pb.ObjectRef(store="s3", key="k", version="", size=1)]}, "the version is missing"),
        ({"objects": [pb.ObjectRef(store="s3", key="k", version="v", size=-1)]}, "only the size of a sample"),
        ({"objects": [pb.ObjectRef(store="s3", key="k", version="v", size=-5)]}, "can't have -5 bytes"),
        ({"objects": [pb.ObjectRef(store="s3", key="ü" * 3000, version="v", size=1)]}, "a key of 6000 bytes"),
        ({"namespace": "n" * 10_000}, "a namespace of 10000 bytes"),
        ({"object": [0] * 65_537, "offset": [0] * 65_537, "length": [1] * 65_537}, "split it"),
    ],
)
def test_reads_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_plan(ticket(**fields))


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"hello", b"\x0a\xff\xff\xff\xff\x0f"])
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigurationError):
        read_plan(data)
    with pytest.raises(ConfigurationError):
        write_plan(data)


@given(st.binary(max_size=300))
def test_no_bytes_make_the_parsers_fail_otherwise(data: bytes) -> None:
    for parse in (read_plan, write_plan):
        try:
            parse(data)
        except ConfigurationError:
            pass


@given(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**63 - 1),
)
def test_extents_that_pass_lie_within_their_object(offset: int, length: int, size: int) -> None:
    objects = [pb.ObjectRef(store="s3", key="k", version="v", size=size)]
    inside = size <= MAX_OBJECT_BYTES and 0 <= offset <= size and -1 <= length <= size - offset
    try:
        plan = read_plan(ticket(objects=objects, offset=[offset], length=[length]))
    except ConfigurationError:
        assert not inside
    else:
        assert inside
        assert plan.start == [offset]
        assert plan.end == [size if length == -1 else offset + length]


@pytest.mark.parametrize("namespace", ["", "save:s3/bucket/run@abc", "put:s3/bucket/key@abc"])
def test_fills_never_go_where_bytes_are_kept(namespace: str) -> None:
    assert read_plan(ticket(namespace=namespace)).namespace == "s3"


def put(namespace: str, *objects: pb.ObjectRef) -> bytes:
    return pb.WriteRequest(namespace=namespace, objects=objects, durable=True).SerializeToString()


def test_writes_that_are_allowed() -> None:
    sized = pb.ObjectRef(store=SAMPLES, key="set/7", version="1", size=5)
    assert not write_plan(put("samples:set@1", sized)).is_save
    posing = pb.ObjectRef(store=SAMPLES, key="set/7", version="save:abc", size=5)
    assert not write_plan(put("s3://bucket/data", posing)).is_save, "it would keep the dataset from eviction"
    assert write_plan(put("save:s3/bucket/run/step-1@abc", SAVED)).is_save
    assert write_plan(put(f"put:s3/{SAVED.key}@abc", SAVED)).is_save


@pytest.mark.parametrize(
    ("namespace", "object_", "message"),
    [
        ("n", OBJECT, "clients write samples, and files of a save"),
        ("save:s3/bucket/run/step-1@abc", OBJECT, "clients write samples"),
        ("save:s3/bucket/run/step-1@other", SAVED, "into its own namespace"),
        ("save:s3/bucket/run/step-2@abc", SAVED, "into its own namespace"),
        ("save:posix/bucket/run/step-1@abc", SAVED, "into its own namespace"),
        ("put:s3/bucket/other@abc", SAVED, "into its own namespace"),
        ("n", SAVED, "into its own namespace"),
        ("save:s3/x@y", pb.ObjectRef(store=SAMPLES, key="k", version="1", size=1), "clients write samples"),
        ("samples:set@1", SAMPLE, "must give the object's size"),
        ("", SAVED, "the namespace is missing"),
    ],
)
def test_writes_that_are_refused(namespace: str, object_: pb.ObjectRef, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        write_plan(put(namespace, object_))


def test_files_of_saves_are_not_remembered() -> None:
    """I5: those of the next save are others."""
    remembered = [requests.object_info(one) is requests.object_info(one) for one in (OBJECT, SAMPLE, SAVED)]
    assert remembered == [True, True, False]
    assert requests.object_info(SAVED) == requests.object_info(SAVED)


def test_timeouts_are_bounded() -> None:
    assert timeout(0) == requests.DEFAULT_CALL_S
    assert timeout(5) == 5
    assert timeout(float("inf")) == timeout(1e9) == requests.MAX_CALL_S


@pytest.mark.parametrize("value", ["", "a@b", "a/b", "x" * 65, "ü"])
def test_ids_are_plain(value: str) -> None:
    with pytest.raises(ConfigurationError, match="a save's id"):
        save_id(value)


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({}, PolicyChange()),
        ({"pinned": False, "priority": 0}, PolicyChange(pinned=False, priority=0)),
        ({"quota_bytes": 0, "ttl_s": 0.0}, PolicyChange(quota_bytes=0, ttl_s=0.0)),
        (
            {"pinned": True, "quota_bytes": -5, "ttl_s": 1.5},
            PolicyChange(pinned=True, quota_bytes=-5, ttl_s=1.5),
        ),
    ],
)
def test_what_a_policy_leaves_out_stays(fields: dict[str, Any], change: PolicyChange) -> None:
    assert policy_change(pb.SetPolicyRequest(namespace="n", **fields)) == change


@pytest.mark.parametrize("ttl_s", [float("nan"), float("inf"), -float("inf")])
def test_times_to_live_are_numbers(ttl_s: float) -> None:
    with pytest.raises(ConfigurationError, match="give a number of seconds"):
        policy_change(pb.SetPolicyRequest(namespace="n", ttl_s=ttl_s))


@pytest.mark.parametrize(
    ("name", "message"), [("", "missing"), ("n" * (MAX_NAMESPACE_BYTES + 1), "are allowed")]
)
def test_names_of_namespaces_are_bounded(name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        namespace_name(name)
    assert namespace_name("n" * MAX_NAMESPACE_BYTES)


def test_a_report_of_use_is_taken_as_it_is() -> None:
    use = reported_use(pb.ReportUseRequest(namespaces=["a", "b"], chunks=3, bytes=4))
    assert (use.namespaces, use.chunks, use.bytes) == (("a", "b"), 3, 4)


@pytest.mark.parametrize(
    "fields",
    [
        {"chunks": -1},
        {"bytes": -1},
        {"bytes": requests.MAX_REPORTED + 1},
        {"chunks": requests.MAX_REPORTED + 1},
        {"namespaces": ["n"] * (requests.MAX_NAMESPACES + 1)},
        {"namespaces": ["n" * (MAX_NAMESPACE_BYTES + 1)]},
    ],
)
def test_nonsense_in_a_report_of_use_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        reported_use(pb.ReportUseRequest(**fields))


def order_request(**fields: Any) -> pb.TellOrderRequest:
    told = {
        "namespace": "n",
        "order": "rank0",
        "epoch": 1,
        "length": 10,
        "total": 2,
        "first": 0,
        "marks": bytes(16),
        "positions": (3).to_bytes(4, "little") + (9).to_bytes(4, "little"),
    }
    return pb.TellOrderRequest(**{**told, **fields})


def test_a_piece_of_an_order_is_taken_as_it_is() -> None:
    piece = told_piece(order_request())
    assert (piece.marks.tolist(), piece.positions.tolist()) == ([0, 0], [3, 9])
    assert piece[:6] == ("n", "rank0", 1, 10, 2, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"namespace": ""},
        {"namespace": "save:s3/a@1"},
        {"order": "no/such id"},
        {"epoch": -1},
        {"epoch": requests.MAX_EPOCH + 1},
        {"length": 0},
        {"length": requests.MAX_ORDER_SAMPLES + 1},
        {"length": 9},
        {"total": 0},
        {"total": 1},
        {"total": requests.MAX_CHUNKS + 1},
        {"first": -1},
        {"first": 1},
        {"first": 2},
        {"marks": b""},
        {"marks": bytes(8)},
        {"marks": bytes(15)},
        {"positions": bytes(7)},
        {"positions": bytes(12)},
    ],
)
def test_nonsense_in_an_order_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        told_piece(order_request(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"object": [0]},
        {"object": [1], "chunk": [0], "position": [0]},
        {"object": [0], "chunk": [1], "position": [0]},
        {"object": [0] * 4097, "chunk": [0] * 4097, "position": [0] * 4097},
    ],
)
def test_nonsense_in_what_is_to_be_fetched_ahead_is_refused(fields: dict[str, Any]) -> None:
    ref = pb.ObjectRef(store="s3", key="k", version="v", size=10)
    with pytest.raises(ConfigurationError):
        wanted_ahead(pb.StageAheadRequest(objects=[ref], **fields))


def test_marks_in_a_report_are_whole() -> None:
    assert reported_use(pb.ReportUseRequest(marks=bytes(8))).marks.tolist() == [0]
    with pytest.raises(ConfigurationError, match="no whole numbers"):
        reported_use(pb.ReportUseRequest(marks=bytes(9)))
