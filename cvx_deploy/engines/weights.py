"""Weights of a network, mapped from where they lie: each file once in a process, for every network and device."""

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import EngineError
from cvx_deploy.progress import Progress
from cvx_deploy.reading import reading

if TYPE_CHECKING:
    import onnx


_Stamp = tuple[str, int, int, int]  # path, inode, size and time stamp
_MAPPED: "WeakValueDictionary[_Stamp, NDArray[np.uint8]]" = WeakValueDictionary()
_LOCK = threading.Lock()


def mapped_file(bundle: Bundle, file: str, progress: Progress) -> NDArray[np.uint8]:
    """Return the bytes of a weight file, mapped; while somebody holds the map, it is the same for all.

    Raises:
        BundleError: The file is missing or altered.
    """
    with _LOCK:
        path = bundle.weight_path(file, progress)
        stat = path.stat()
        stamp = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        mapped = _MAPPED.get(stamp)
        if mapped is None:
            mapped = _MAPPED[stamp] = np.memmap(path, np.uint8, mode="r")
        return mapped


def mapped_weights(
    bundle: Bundle, name: str, graph: "onnx.GraphProto", progress: Progress
) -> dict[str, NDArray[np.uint8]]:
    """Return the bytes of every weight of a network that lies in a weight file, mapped, by the initializer's name.

    Raises:
        EngineError: A weight lies outside the bundle's files.
        BundleError: A weight file is missing or altered.
    """
    maps = {file: mapped_file(bundle, file, progress) for file in bundle.manifest.networks[name].weights}
    external = (tensor for tensor in graph.initializer if tensor.external_data)
    return {tensor.name: _content(tensor, maps, name) for tensor in external}


def _content(initializer: "onnx.TensorProto", maps: Mapping[str, NDArray[np.uint8]], name: str) -> NDArray[np.uint8]:
    """Return the bytes of an external initializer, where they are mapped."""
    entries = {entry.key: entry.value for entry in initializer.external_data}
    with reading(f"{name}: the place of {initializer.name}", EngineError, fix="export the bundle again"):
        file, start = maps.get(entries["location"]), int(entries.get("offset", 0))
        length = int(entries.get("length", 0))
    if file is None or start < 0 or start + length > file.nbytes:
        raise EngineError(
            f"{name}: {initializer.name} lies outside the bundle's weight files", fix="export the bundle again"
        )
    return file[start : start + length]
