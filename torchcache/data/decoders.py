"""What bytes become by the extension of their name, as by webdataset's `.decode("pil")`: for `decode=`, `transform=`.

Only of types that a library reads, and none that runs code: no pickle. Libraries are imported at the first use. What
isn't of its type raises what the library raises, as json.JSONDecodeError or PIL.UnidentifiedImageError.
"""

from __future__ import annotations

import io
import json as json_library
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from torchcache.errors import ConfigurationError

if TYPE_CHECKING:
    from PIL.Image import Image


def pil(data: bytes | memoryview) -> Image:
    """An image of PIL's in RGB, whatever it is stored as. Raises ConfigurationError if Pillow isn't installed."""
    try:
        import PIL.Image
    except ImportError as error:
        raise ConfigurationError(
            "images are decoded by Pillow, which isn't installed: pip install pillow"
        ) from error
    with PIL.Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def npy(data: bytes | memoryview) -> npt.NDArray[Any]:
    """An array that numpy.save wrote; writable. Raises ValueError for one of Python objects, or cut short."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    reading = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in reading:
        raise ValueError(f"an array in version {version} of numpy's format: 1.0 and 2.0 are read here")
    shape, _, dtype = reading[version](file)
    has = len(data) - file.tell()
    needed = dtype.itemsize * int(np.prod(shape, dtype=object))
    if has < needed and not dtype.hasobject:  # before memory is taken for what a header claims
        raise ValueError(f"an array of {needed:,} bytes, of which {has:,} are there")
    file.seek(0)
    array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def json(data: bytes | memoryview) -> Any:
    """The value."""
    return json_library.loads(bytes(data))


def txt(data: bytes | memoryview) -> str:
    """UTF-8."""
    return str(data, "utf-8")


def cls(data: bytes | memoryview) -> int:
    """A decimal number, as of a class."""
    return int(bytes(data))


BY_EXTENSION: Final[Mapping[str, Callable[[bytes | memoryview], Any]]] = MappingProxyType(
    {
        **dict.fromkeys(("jpg", "jpeg", "png", "ppm", "pgm", "pbm", "pnm"), pil),
        "npy": npy,
        **dict.fromkeys(("json", "jsn"), json),
        **dict.fromkeys(("txt", "text", "transcript"), txt),
        **dict.fromkeys(("cls", "cls2", "index", "inx", "id"), cls),
    }
)
"""The extensions are webdataset's."""


def by_extension(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample of a tar, each member decoded by what its extension ends in: "seg.png" by "png". Others stay bytes."""
    decoded = dict(sample)
    for name, data in sample.items():
        decode = BY_EXTENSION.get(name.rpartition(".")[2])
        if decode is not None and isinstance(data, bytes | memoryview):
            try:
                decoded[name] = decode(data)
            except Exception as error:
                error.add_note(f"torchcache: of member {name!r}")
                raise
    return decoded
