"""A bundle in words."""

from collections.abc import Iterator

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import Network, TensorSpec
from cvx_deploy.terminal import LONGEST_PATH, safe


def describe(bundle: Bundle) -> str:
    """Return what a bundle holds, for a person to read."""
    return "\n".join(safe(line, LONGEST_PATH) for line in _lines(bundle))


def _lines(bundle: Bundle) -> Iterator[str]:
    manifest = bundle.manifest
    traits = manifest.traits
    shapes = ", ".join(map(str, bundle.shapes))
    yield f"{manifest.model}: {traits.task}, {traits.positions} positions, {shapes} at {manifest.fps} fps"
    scheduler = manifest.scheduler["kind"]
    yield f"precision {manifest.precision}; scheduler {scheduler}; {manifest.text_length} text tokens"
    yield from (f"forecast steps: {table}" for table in manifest.step_tables)
    for name, network in manifest.networks.items():
        yield ""
        yield f"{name}  {network.file.path}  {_size(network.file.size)}  {_precision(network)}"
        yield from (f"  in   {_tensor(spec)}" for spec in network.inputs if spec.name not in network.state)
        yield from (f"  out  {_tensor(spec)}" for spec in network.outputs if spec.name not in network.state.values())
        if network.riflex is not None:
            riflex = network.riflex
            yield f"  positions for {riflex.tokens} tokens along time: frequency {riflex.component} lowered"
        if network.state:
            count = len(network.state)
            yield f"  and {count} causal cache{'s' * (count != 1)}, handed from one chunk to the next"
    yield ""
    yield "weights"
    for name, entry in manifest.weights.items():
        place = "in the bundle" if entry.in_bundle else f"in {bundle.weight_home(entry)[0]}"
        yield f"  {name}  {_size(entry.size)}  {place}  sha256 {entry.sha256[:12]}"
    for lora in manifest.loras:
        yield f"  merged with {lora.path}  scale {lora.scale:g}  sha256 {lora.sha256[:12]}"
    origin = {key: manifest.provenance[key] for key in ("source", "revision", "variant") if key in manifest.provenance}
    yield ""
    if origin:
        yield "from " + ", ".join(value if key == "source" else f"{key} {value}" for key, value in origin.items())
    tools = (f"{tool} {version}" for tool, version in manifest.provenance.items() if tool not in origin)
    yield f"made with {', '.join(tools)}"


def _tensor(spec: TensorSpec) -> str:
    return f"{spec.name}  {spec.dtype}  {spec.layout} ({', '.join(map(str, spec.shape))})"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 999.5:  # three digits are shown
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _precision(network: Network) -> str:
    quantization = network.quantization
    if quantization is None:
        return network.precision
    left = f", but for {', '.join(quantization.excluded)}" if quantization.excluded else ""
    attention = " and attention in fp8" if quantization.attention else ""
    return f"{quantization.scheme}/{network.precision}: {quantization.layers} layers{left}{attention}"
