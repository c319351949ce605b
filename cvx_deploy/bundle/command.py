"""The command that makes a bundle anew, for messages that say how to mend one."""

import shlex
from collections.abc import Iterable
from pathlib import Path

from cvx_deploy.bundle.schema import Manifest, Network
from cvx_deploy.miniatures import is_packaged
from cvx_deploy.shape import Shape


def export_command(path: Path, manifest: Manifest, shapes: Iterable[Shape]) -> str:
    """Return the command that makes the bundle at `path` as its manifest says it is, but at these shapes."""
    # A packaged bundle's checkpoint is known by its name, and nothing may be written to its folder.
    own = not is_packaged(path)
    options = [
        ("model", manifest.model),
        *([("checkpoint", manifest.provenance.get("source", manifest.checkpoint))] if own else []),
        *((name, manifest.provenance[name]) for name in ("revision", "variant") if name in manifest.provenance),
        *(("shape", shape) for shape in shapes),
        ("precision", manifest.precision),
        *([("output", path)] if own else []),
    ]
    if manifest.transformer is not None:
        options.append(("transformer", manifest.transformer))
    options += _quantizing(manifest.networks.values())
    options += [("lora", f"{lora.path}:{lora.scale!r}") for lora in manifest.loras]
    words = [word for name, value in options for word in (f"--{name}", str(value))]
    quantizations = (network.quantization for network in manifest.networks.values())
    flags = {
        "--copy-weights": all(entry.in_bundle for entry in manifest.weights.values()),
        "--riflex": any(network.riflex for network in manifest.networks.values()),
        "--quantize-attention": any(found and found.attention for found in quantizations),
    }
    return shlex.join(["cvx-deploy", "export", *words, *(flag for flag, is_set in flags.items() if is_set)])


def build_command(path: Path, options: str) -> str:
    """Return how to build engines for the bundle at `path`: a packaged one is exported first, to a place of its own."""
    if is_packaged(path):
        return f"run: cvx-deploy export --model {path.name}, then: cvx-deploy build --model {path.name} {options}"
    return f"run: cvx-deploy build --bundle {shlex.quote(str(path))} {options}"


def _quantizing(networks: Iterable[Network]) -> list[tuple[str, object]]:
    """Return the options of an export that say how networks were quantized, besides the precision."""
    found = [network.quantization for network in networks if network.quantization is not None]
    tables = {quantization.calibration[0] for quantization in found if quantization.calibration is not None}
    excluded = dict.fromkeys(place for quantization in found for place in quantization.excluded)
    places = [*excluded] or (["none"] if found else [])  # said, since the default depends on the model
    return [*(("calibration", table) for table in tables), *(("exclude", place) for place in places)]
