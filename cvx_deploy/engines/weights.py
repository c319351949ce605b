"""Weights of a network, mapped from where they lie."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import EngineError
from cvx_deploy.progress import Progress

if TYPE_CHECKING:
    import onnx


def mapped_weights(
    bundle: Bundle, name: str, graph: "onnx.GraphProto", progress: Progress
) -> dict[str, NDArray[np.uint8]]:
    """Return the bytes of every weight of a network that lies in a weight file, mapped, by the initializer's name.

    Raises:
        EngineError: A weight lies outside the bundle's files.
        BundleError: A weight file is missing or altered.
    """
    files = bundle.manifest.networks[name].weights
    maps = {file: np.memmap(bundle.weight_path(file, progress), np.uint8, mode="r") for file in files}
    external = (tensor for tensor in graph.initializer if tensor.external_data)
    return {tensor.name: _content(tensor, maps, name) for tensor in external}


def _content(initializer: "onnx.TensorProto", maps: Mapping[str, NDArray[np.uint8]], name: str) -> NDArray[np.uint8]:
    """Return the bytes of an external initializer, where they are mapped."""
    entries = {entry.key: entry.value for entry in initializer.external_data}
    file, start, length = maps.get(entries["location"]), int(entries.get("offset", 0)), int(entries.get("length", 0))
    if file is None or start < 0 or start + length > file.nbytes:
        raise EngineError(
            f"{name}: {initializer.name} lies outside the bundle's weight files", fix="export the bundle again"
        )
    return file[start : start + length]
