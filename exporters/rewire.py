"""A bundle's own graphs with other weights: adapters merged in or taken out again, without tracing.

A graph says of each weight only where its bytes lie. Adapters change what some of the transformer's weights are, and
nothing of what is done with them, so that the graph of the merged transformer is the base's with those weights pointed
elsewhere. It is what an export with the same adapters writes.
"""

import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import onnx

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.safetensors import StoredTensor, read_header
from cvx_deploy.bundle.schema import Lora, Manifest, Network, StoredFile, WeightFile
from cvx_deploy.errors import BundleError
from cvx_deploy.exporters.sources.lora import MERGED, changed_by, read_adapters, write_merged
from cvx_deploy.exporters.sources.weights import TYPE_NAMES
from cvx_deploy.exporters.tracing.contract import TORCH_DTYPES
from cvx_deploy.files import place_file, sha256_of
from cvx_deploy.progress import Progress

_TRANSFORMER = "transformer."

Moves = dict[tuple[str, int], StoredTensor]
"""Plain name of a weight file and the offset of a tensor in it, to where that tensor is to be read instead."""


def write_with_loras(
    base: Bundle, loras: Iterable[tuple[Path, float]], output: Path, folder: Path, progress: Progress
) -> Manifest:
    """Write everything of a bundle with adapters merged into its transformer, but for its manifest and its engines.

    Args:
        base: A bundle without adapters; it is not changed.
        loras: Adapters, file or folder, and the scale of each, in the order in which they are added.
        output: Where the bundle will be, for what errors say.
        folder: An empty folder to write into.
        progress: Shows the merging.

    Returns:
        The manifest, which is that of an export with these adapters.

    Raises:
        BundleError: Adapters are merged already, or weights are stored in another type than the networks compute in.
        CheckpointError, WrongModelError: An adapter is damaged, or fits another model.
    """
    if _transformer(base).quantization is not None:
        wanted = tuple(Lora(str(path.absolute()), scale, "") for path, scale in loras)
        raise BundleError(
            f"the transformer of {base.path} is quantized, and adapters are merged before that",
            fix=_export(replace(base, path=output), wanted) + ", and build it",
        )
    if base.manifest.loras:
        raise BundleError(
            f"{base.path} has adapters merged into it already",
            fix=f"name every adapter, in order, for the bundle without any; run: {_restoring(base.path)}",
        )
    tensors = _stored_tensors(base, progress)
    adapters = read_adapters(loras, tensors, progress)
    entries = tuple(adapter.entry for adapter in adapters)
    _check_types(base, {name: tensors[name] for name in changed_by(adapters)}, entries, output)
    precision = _transformer(base).precision
    merged = write_merged(adapters, tensors, lambda file: base.weight_path(file, progress), precision, folder, progress)
    moves = {(tensors[name].file, tensors[name].offset): stored for name, stored in merged.tensors.items()}
    return _write(base, moves, base.manifest.weights | {MERGED: merged.entry}, entries, folder, progress)


def write_without_loras(bundle: Bundle, folder: Path, progress: Progress) -> Manifest:
    """Write everything of a bundle with its adapters taken out again, but for its manifest and its engines.

    The weights are those that the adapters were added to, in the files they were read from.

    Args:
        bundle: A bundle with adapters merged into its transformer; it is not changed.
        folder: An empty folder to write into.
        progress: Shows what is checked and placed.

    Raises:
        BundleError: It has no adapters, or does not know where the weights without them are.
    """
    if MERGED not in bundle.manifest.weights:
        raise BundleError(f"{bundle.path} has no adapters merged into it", fix="use it as it is")
    merged = read_header(bundle.weight_path(MERGED, progress), MERGED)
    tensors = _stored_tensors(bundle, progress)
    missing = merged.keys() - tensors.keys()
    if missing:
        raise BundleError(
            f"{bundle.path} does not say where {min(missing)} is without the adapters", fix=_export(bundle, ())
        )
    _check_types(bundle, {name: tensors[name] for name in merged}, (), bundle.path)
    moves = {(MERGED, stored.offset): tensors[name] for name, stored in merged.items()}
    weights = {name: entry for name, entry in bundle.manifest.weights.items() if name != MERGED}
    return _write(bundle, moves, weights, (), folder, progress)


def _stored_tensors(bundle: Bundle, progress: Progress) -> dict[str, StoredTensor]:
    """Return every tensor of the checkpoint's transformer, from the headers of the files it lies in."""
    tensors: dict[str, StoredTensor] = {}
    for name in bundle.manifest.weights:
        if name.startswith(_TRANSFORMER) and name != MERGED:
            tensors.update(read_header(bundle.weight_path(name, progress), name))
    return tensors


def _transformer(bundle: Bundle) -> Network:
    return bundle.network("transformer")


def _check_types(bundle: Bundle, tensors: dict[str, StoredTensor], loras: tuple[Lora, ...], output: Path) -> None:
    """Raise unless the checkpoint stores what the networks compute in: else a Cast stands in one graph alone."""
    precision = _transformer(bundle).precision
    for name, stored in tensors.items():
        if stored.dtype != TYPE_NAMES[TORCH_DTYPES[precision]]:
            raise BundleError(
                f"{name} is stored as {stored.dtype}, and {bundle.path} computes in {precision}: with adapters and "
                "without, its graphs are different ones",
                fix=_export(replace(bundle, path=output), loras) + ", and build it",
            )


def _export(bundle: Bundle, loras: tuple[Lora, ...]) -> str:
    """Return the remedy that makes a bundle with these adapters by an export."""
    return replace(bundle, manifest=replace(bundle.manifest, loras=loras)).remedy


def _restoring(bundle: Path) -> str:
    return f"cvx-deploy refit --bundle {shlex.quote(str(bundle))} --restore"


def _write(
    bundle: Bundle,
    moves: Moves,
    weights: dict[str, WeightFile],
    loras: tuple[Lora, ...],
    folder: Path,
    progress: Progress,
) -> Manifest:
    """Write graphs, tokenizer and weights of a bundle, its weights moved, and return its manifest."""
    manifest = bundle.manifest
    for name, entry in weights.items():
        if entry.in_bundle and name != MERGED:
            with progress.task(f"place {name}", entry.size) as advance:
                place_file(bundle.locate_weight(name), folder / entry.path, advance)
    place_file(bundle.inside(manifest.tokenizer.path), folder / manifest.tokenizer.path)
    moved = {file for file, _ in moves}
    networks = {}
    for name, network in manifest.networks.items():
        source, target = bundle.inside(network.file.path), folder / network.file.path
        if moved.isdisjoint(network.weights):
            place_file(source, target)
            networks[name] = network
        else:
            networks[name] = _rewired(network, source, target, moves)
    return replace(manifest, networks=networks, weights=dict(sorted(weights.items())), loras=loras)


def _rewired(network: Network, source: Path, target: Path, moves: Moves) -> Network:
    """Write a network's graph with some weights pointed elsewhere, and return what the manifest says of it."""
    model = onnx.ModelProto.FromString(source.read_bytes())
    files = set()
    for initializer in model.graph.initializer:
        if initializer.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry for entry in initializer.external_data}
        stored = moves.get((entries["location"].value, int(entries["offset"].value)))
        if stored is not None:
            entries["location"].value = stored.file
            entries["offset"].value, entries["length"].value = str(stored.offset), str(stored.nbytes)
        files.add(entries["location"].value)
    target.write_bytes(model.SerializeToString())
    file = StoredFile(network.file.path, target.stat().st_size, sha256_of(target))
    return replace(network, file=file, weights=tuple(sorted(files)))
