"""Commands that compile engines and look at them."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from cvx_deploy.cli.group import cli
from cvx_deploy.cli.options import (
    LORAS,
    MOVED_CHECKPOINT,
    Result,
    bytes_of,
    need_export_extra,
    need_extra,
    open_bundle,
    plain_name,
    reporting,
    verdict_values,
    which_bundle,
)
from cvx_deploy.engines.tensorrt.libraries import ENGINE_KINDS, EngineKind
from cvx_deploy.progress import Progress

if TYPE_CHECKING:
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.engines.tensorrt.build import Outcome
    from cvx_deploy.engines.tensorrt.gate import Findings
    from cvx_deploy.engines.tensorrt.refit import Refitted
    from cvx_deploy.engines.tensorrt.store import EngineRecord


def _target(text: str) -> str:
    """Return the compute capability that sm89, or a GPU's name, means."""
    if found := re.fullmatch(r"(?:sm_?)?(\d{2,3})", text.lower()):
        return f"sm{found[1]}"
    from cvx_deploy.engines.gpus import gpu_named

    return gpu_named(text).compute_capability


def _batch(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([12])(?:-([12]))?", text)
    if not found or int(found[1]) > int(found[2] or found[1]):
        raise click.BadParameter(f"{text!r} is not 1, 2 or 1-2")
    return int(found[1]), int(found[2] or found[1])


@cli.command()
@which_bundle
@click.option(
    "--engine",
    type=click.Choice([*ENGINE_KINDS, "onnxruntime"]),
    help="Default: tensorrt-rtx when --target is given or only it is installed, else tensorrt. onnxruntime compiles "
    "nothing: every network is loaded once, and its quantized layers are counted.",
)
@click.option(
    "--target",
    "targets",
    type=_target,
    multiple=True,
    metavar="sm89|GPU",
    help="A compute capability, or a GPU (rtx4090), to compile for with tensorrt-rtx; again for more.",
)
@click.option("--network", "networks", multiple=True, metavar="NAME", help="Only this network; again for more.")
@click.option(
    "--batch",
    type=_batch,
    default="1-2",
    show_default=True,
    metavar="1|2|1-2",
    help="Of the transformer: guidance needs 2. One number gives a static engine.",
)
@click.option("--optimization-level", type=click.IntRange(0, 5), help="0 builds fastest, 5 runs fastest.")
@click.option("--workspace", type=bytes_of, metavar="SIZE", help="Scratch memory that a kernel may use, such as 2GB.")
@click.option(
    "--hardware-compatibility",
    type=click.Choice(["none", "ampere-plus", "same-capability"]),
    default="none",
    show_default=True,
    help="Which other GPUs engines of tensorrt run on.",
)
@click.option(
    "--weight-streaming", is_flag=True, help="Allow weights to be streamed from host memory when GPU memory is small."
)
@click.option("--refit", is_flag=True, help="Build engines whose weights cvx-deploy refit can exchange later.")
@click.option("--strip-weights", is_flag=True, help="Write engines without the weights that a refit puts back.")
@click.option("--vae-tiling", is_flag=True, help="Build the VAE for the tiles of cvx-deploy run --vae-tiling.")
@click.option("--force", is_flag=True, help="Build again what is there already.")
@click.option("--strict", is_flag=True, help="Fail when a network was not compiled as expected.")
@MOVED_CHECKPOINT
@reporting
def build(
    path: Path,
    engine: EngineKind | Literal["onnxruntime"] | None,
    targets: tuple[str, ...],
    networks: tuple[str, ...],
    batch: tuple[int, int],
    vae_tiling: bool,
    force: bool,
    strict: bool,
    checkpoint: Path | None,
    progress: Progress,
    **settings: Any,
) -> Result:
    """Compile a bundle's networks to TensorRT engines, and say what the compiler made of them.

    Engines lie in the bundle under a hash of all they depend on: what is there and fits is not built again.

    \b
    Examples:
      cvx-deploy build --model 5b
      cvx-deploy build --model 5b --engine tensorrt-rtx --target sm89 --target sm120
    """
    need_extra("tensorrt-rtx", "onnx", "psutil")
    from cvx_deploy.engines.tensorrt.build import BuildRequest, judged
    from cvx_deploy.engines.tensorrt.build import build as build_engines
    from cvx_deploy.engines.tensorrt.compile import BuildSettings
    from cvx_deploy.engines.tensorrt.libraries import choose_library
    from cvx_deploy.engines.tensorrt.platforms import platform_here

    bundle = open_bundle(path, checkpoint)
    if engine == "onnxruntime":
        return _loaded(bundle, progress)
    library = choose_library(engine, ahead_of_time=bool(targets))
    here = None if targets else platform_here()
    request = BuildRequest(targets, here, networks, batch, BuildSettings(**settings), vae_tiling, force)
    outcomes, verdicts = [], []
    for outcome in build_engines(library, bundle, request, progress):
        outcomes.append(outcome)
        verdicts.append(judged(bundle, outcome))
        for verdict in verdicts[-1]:
            progress.note(str(verdict))
    values: dict[str, Any] = {
        "bundle": str(path),
        "engine": library.kind,
        "library": library.version,
        "engines": [_values(*pair) for pair in zip(outcomes, verdicts, strict=True)],
    }
    failed = [outcome.record.network for outcome, found in zip(outcomes, verdicts, strict=True) if _fails(found)]
    if strict and failed:
        what = f"not compiled as expected: {', '.join(dict.fromkeys(failed))}"
        values["error"] = {"type": "EngineError", "what": what, "fix": "see the findings, or leave --strict out"}
    return values, "\n".join(_line(outcome, bundle) for outcome in outcomes)


def _loaded(bundle: "Bundle", progress: Progress) -> Result:
    """Load every network in ONNX Runtime, which runs the graphs as they are."""
    from cvx_deploy.engines.onnxruntime.backend import OrtBackend
    from cvx_deploy.parity.verify import verify

    OrtBackend(bundle)  # says of what it cannot run fast what to do instead
    found = verify(bundle, progress, load=True, quick=True)
    values = {**verdict_values(found, bundle), "engine": "onnxruntime", "engines": []}
    return values, f"{found}\nonnxruntime runs the graphs as they are: there is nothing to compile"


def _fails(findings: list["Findings"]) -> bool:
    return not all(found.ok for found in findings)


def _record_values(record: "EngineRecord") -> dict[str, Any]:
    return {
        "network": record.network,
        "file": record.file.path,
        "bytes": record.file.size,
        "sha256": record.file.sha256,
        "targets": list(record.key.targets),
    }


def _values(outcome: "Outcome", findings: list["Findings"]) -> dict[str, Any]:
    record = outcome.record
    return _record_values(record) | {
        "plan": record.plan.path,
        "profile": record.key.profile,
        "attention": record.attention,
        "reused": outcome.reused,
        "seconds": record.seconds,
        "peak_bytes": record.peak_bytes,
        "private_bytes": record.private_bytes,
        "findings": [found.as_dict() for found in findings],
    }


def _line(outcome: "Outcome", bundle: "Bundle") -> str:
    record = outcome.record
    how = "there already" if outcome.reused else f"built in {record.seconds:.0f} s, {record.peak_bytes / 2**30:.1f} GiB"
    return f"{bundle.path / record.file.path}: {record.file.size:,} bytes, {how}"


@cli.command()
@which_bundle
@LORAS
@click.option("--restore", is_flag=True, help="Take the adapters out of the bundle again, in its place.")
@click.option(
    "--name", metavar="NAME", callback=plain_name, help="Name of the new bundle, beside the one it is made from."
)
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="The new bundle's folder, anywhere.")
@click.option("--engine", type=click.Choice(ENGINE_KINDS), help="Default: the kind that the transformer has.")
@MOVED_CHECKPOINT
@reporting
def refit(
    path: Path,
    loras: tuple[tuple[Path, float], ...],
    restore: bool,
    name: str | None,
    output: Path | None,
    engine: EngineKind | None,
    checkpoint: Path | None,
    progress: Progress,
) -> Result:
    """Make a bundle with adapters from one that is built, exchanging weights in its engine instead of building one.

    The engine must have been built with --refit, and runs on the GPU that is here. The bundle it is made from stays as
    it is; with --restore, a bundle with adapters gets the weights back that they were added to.

    \b
    Examples:
      cvx-deploy refit --model 5b --lora style.safetensors:0.8 --name 5b-style
      cvx-deploy refit --model 5b-style --restore
    """
    place = _refit_output(path, restore=restore, adapted=bool(loras), name=name, output=output)
    need_export_extra()
    import functools
    from dataclasses import asdict

    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.engines.tensorrt import refit as refitting
    from cvx_deploy.engines.tensorrt.libraries import load_library
    from cvx_deploy.engines.tensorrt.platforms import platform_here
    from cvx_deploy.exporters.rewire import write_with_loras, write_without_loras

    bundle = open_bundle(path, checkpoint)
    if restore:
        rewrite = functools.partial(write_without_loras, bundle, progress=progress)
    else:
        refitting.check_output(bundle, place)
        rewrite = functools.partial(write_with_loras, bundle, loras, place, progress=progress)
    library = load_library(engine or refitting.engine_kind(bundle))
    refitted = refitting.refit(library, bundle, rewrite, place, platform_here(), progress)
    values: dict[str, Any] = {
        "bundle": str(place),
        "engine": library.kind,
        "library": library.version,
        "loras": [asdict(lora) for lora in Bundle.read(place).manifest.loras],
        "engines": [_refitted_values(outcome) for outcome in refitted],
    }
    return values, "\n".join(_refitted_line(place, outcome) for outcome in refitted)


def _refit_output(path: Path, *, restore: bool, adapted: bool, name: str | None, output: Path | None) -> Path:
    """Return where the bundle goes that `refit` writes."""
    if restore == adapted:
        raise click.UsageError("name adapters with --lora, or take those that are there out with --restore")
    if restore and (name or output):
        raise click.UsageError("--restore changes the bundle in its place: leave out --name and --output")
    if adapted and (name is None) == (output is None):
        raise click.UsageError("name the new bundle with --name NAME or --output DIR")
    return path if restore else output or path.absolute().parent / str(name)


def _refitted_values(outcome: "Refitted") -> dict[str, Any]:
    return _record_values(outcome.record) | {
        "changed_weights": outcome.changed,
        "seconds": outcome.record.seconds,
    }


def _refitted_line(place: Path, outcome: "Refitted") -> str:
    record = outcome.record
    return f"{place / record.file.path}: {outcome.changed} weights exchanged in {record.seconds:.0f} s"
