"""The decoders: the values are webdataset's, what is none is an error, and nothing is run or believed."""

from __future__ import annotations

import io
import json
import pickle
import sys
from typing import Any

import numpy as np
import PIL.Image
import pytest
from webdataset.autodecode import Decoder, imagehandler

from torchcache.data import decoders
from torchcache.errors import ConfigurationError


def saved(array: Any) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def image(mode: str, kind: str) -> bytes:
    sink = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 255, (5, 7, 4), dtype=np.uint8)
    PIL.Image.fromarray(pixels[..., :3] if mode == "P" else pixels).convert(mode).save(sink, kind)
    return sink.getvalue()


SAMPLE: dict[str, Any] = {
    "__key__": "a/7",
    "__url__": "file:///x.tar",
    "jpg": image("RGB", "jpeg"),
    "png": image("RGBA", "png"),
    "seg.png": image("P", "png"),
    "pgm": image("L", "ppm"),
    "npy": saved(np.arange(6, dtype=np.float32).reshape(2, 3).T),
    "json": b'{"x": [1, null]}',
    "caption.txt": "é".encode(),
    "cls": b"17\n",
    "other": b"\x00",
}


def plain(sample: dict[str, Any]) -> dict[str, Any]:
    """Images and arrays as what can be compared."""
    return {
        name: (value.mode, value.size, value.tobytes())
        if isinstance(value, PIL.Image.Image)
        else (value.dtype, value.shape, value.tolist())
        if isinstance(value, np.ndarray)
        else value
        for name, value in sample.items()
    }


def test_samples_are_webdatasets() -> None:
    theirs = Decoder([imagehandler("pil")])(dict(SAMPLE))
    ours = decoders.by_extension(pickle.loads(pickle.dumps(SAMPLE)))
    assert plain(ours) == plain(theirs)
    assert ours["cls"] == 17 and ours["other"] == b"\x00"
    assert ours["npy"].flags.writeable
    assert pickle.loads(pickle.dumps(decoders.by_extension)) is decoders.by_extension


@pytest.mark.parametrize("name", ["jpg", "npy", "json", "caption.txt", "cls"])
def test_one_alone_takes_a_view(name: str) -> None:
    """As `from_files(decode=)` gives it."""
    decode = decoders.BY_EXTENSION[name.rpartition(".")[2]]
    view = memoryview(SAMPLE[name]).toreadonly()
    assert plain({"": decode(view)}) == plain({"": decoders.by_extension(SAMPLE)[name]})


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("jpg", b"none", PIL.UnidentifiedImageError, "cannot identify"),
        ("json", b"{", json.JSONDecodeError, "Expecting"),
        ("txt", b"\xff", UnicodeDecodeError, "invalid start"),
        ("cls", b"a", ValueError, "invalid literal"),
        ("npy", b"none", ValueError, "magic"),
        ("npy", saved(np.arange(100))[:-1], ValueError, "array of 800 bytes, of which 799 are there"),
        ("npy", saved(np.array([{}], dtype=object)), ValueError, "allow_pickle=False"),
        ("npy", saved([1]).replace(b"NUMPY\x01", b"NUMPY\x03"), ValueError, r"version \(3, 0\)"),
    ],
)
def test_what_is_none_is_an_error(name: str, data: bytes, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        decoders.by_extension({"__key__": "a", name: data})
    assert f"of member {name!r}" in caught.value.__notes__[0]


def test_a_header_is_not_believed() -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": (1 << 60,)})
    with pytest.raises(ValueError, match="of which 8 are there"):
        decoders.npy(head.getvalue() + bytes(8))


def test_without_pillow_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ConfigurationError, match="pip install pillow"):
        decoders.pil(SAMPLE["jpg"])
