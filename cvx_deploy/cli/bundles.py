"""Commands that look at a bundle, check it, and carry it elsewhere; and the shell's completion."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cvx_deploy.cli.group import cli
from cvx_deploy.cli.options import (
    ENGINES_DIR,
    MOVED_CHECKPOINT,
    Result,
    need_export_extra,
    plain_name,
    reporting,
    verdict_values,
    which_bundle,
)
from cvx_deploy.progress import Progress

if TYPE_CHECKING:
    from cvx_deploy.bundle.opened import Bundle


@cli.command()
@which_bundle
@click.option("--plan", is_flag=True, help="Show what its engines were compiled to, block by block.")
@click.option("--gpu", metavar="NAME", help="With --plan: what the plan would take on a GPU such as rtx4090, at best.")
@reporting
def inspect(path: Path, plan: bool, gpu: str | None, progress: Progress) -> Result:
    """Say what a bundle holds, after checking its files.

    \b
    Examples:
      cvx-deploy inspect --model 5b --json
      cvx-deploy inspect --model 5b --plan --gpu rtx4090
    """
    from dataclasses import asdict

    from cvx_deploy.bundle.inspect import describe
    from cvx_deploy.bundle.opened import Bundle

    if gpu is not None and not plan:
        raise click.UsageError("--gpu needs --plan")
    bundle = Bundle.open(path)
    if plan:
        return _plans(bundle, gpu)
    for name in bundle.manifest.weights:
        bundle.weight_path(name, progress)
    return {"bundle": str(path), **asdict(bundle.manifest)}, describe(bundle)


def _plans(bundle: "Bundle", gpu: str | None) -> Result:
    """Return the compiled plans of a bundle's engines."""
    from cvx_deploy.bundle.command import build_command
    from cvx_deploy.engines.gpus import gpu_named
    from cvx_deploy.engines.tensorrt.plan_report import describe_plan, plan_values
    from cvx_deploy.engines.tensorrt.store import EngineStore
    from cvx_deploy.errors import EngineError

    named = None if gpu is None else gpu_named(gpu)
    store = EngineStore(bundle)
    plans = [(record, plan) for record in store.records() for plan in store.plans(record)]
    if not plans:
        raise EngineError(f"{bundle.path} has no compiled engines", fix=build_command(bundle.path, "--target sm89"))
    values = [
        {"network": record.network, "file": record.file.path, **plan_values(plan, named)} for record, plan in plans
    ]
    texts = [f"{record.network} ({record.file.path})\n{describe_plan(plan, named)}" for record, plan in plans]
    return {"bundle": str(bundle.path), "plans": values}, "\n\n".join(texts)


@cli.command()
@which_bundle
@MOVED_CHECKPOINT
@click.option("--load", is_flag=True, help="Load every network in ONNX Runtime as well: needs memory for the weights.")
@click.option("--quick", is_flag=True, help="Skip weight files whose size and time stamp have not changed.")
@reporting
def verify(path: Path, checkpoint: Path | None, load: bool, quick: bool, progress: Progress) -> Result:
    """Check every hash, every weight's place in its file, and every graph, and list all that is wrong.

    \b
    Examples:
      cvx-deploy verify --model 5b
      cvx-deploy verify --bundle engines/5b --load --json
    """
    need_export_extra("onnx")
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.parity.verify import verify as verify_bundle

    bundle = Bundle.read(path)
    moved = bundle.with_checkpoint(checkpoint) if checkpoint else bundle
    found = verify_bundle(moved, progress, load=load, quick=quick)
    return verdict_values(found, bundle), str(found)


@cli.command()
@which_bundle
@MOVED_CHECKPOINT
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="FILE.cvx", help="The file to write.")
@reporting
def pack(path: Path, checkpoint: Path | None, output: Path, progress: Progress) -> Result:
    """Write a bundle with all its weights, those in the checkpoint too, into one file.

    It is a plain tar, which unpack takes back.

    \b
    Example:
      cvx-deploy pack --model 5b --output 5b.cvx
    """
    from cvx_deploy.bundle.opened import Bundle
    from cvx_deploy.bundle.pack import pack as pack_bundle

    size = pack_bundle(Bundle.open(path), output, progress, checkpoint)
    return {"bundle": str(path), "file": str(output), "bytes": size}, str(output)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.cvx")
@click.option("--model", metavar="NAME", callback=plain_name, help="Unpack to NAME in the engines folder.")
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="Unpack to a folder anywhere.")
@ENGINES_DIR
@reporting
def unpack(file: Path, model: str | None, output: Path | None, engines_dir: Path, progress: Progress) -> Result:
    """Make a bundle of a packed one, and check every file while it is written.

    \b
    Example:
      cvx-deploy unpack 5b.cvx --model 5b
    """
    if (model is None) == (output is None):
        raise click.UsageError("say where to with --model NAME or --output DIR")
    from cvx_deploy.bundle.pack import unpack as unpack_bundle

    bundle = unpack_bundle(file, output or engines_dir / str(model), progress)
    return {"bundle": str(bundle.path), "file": str(file), "model": bundle.manifest.model}, str(bundle.path)


@cli.command()
@ENGINES_DIR
@reporting
def doctor(engines_dir: Path, progress: Progress) -> Result:
    """Say what this machine can do with the bundles that are here, and how to mend what is in the way.

    \b
    Example:
      cvx-deploy doctor
    """
    from cvx_deploy.doctor import diagnose

    with progress.task("look at the bundles"):
        found = diagnose(engines_dir)
    values = found.as_dict()
    if found.problems:
        subjects = ", ".join(dict.fromkeys(problem.subject for problem in found.problems))
        values["error"] = {"type": "CvxError", "what": f"not all is well: see {subjects}", "fix": "as said beside each"}
    return values, str(found)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Example:
      cvx-deploy completion bash >> ~/.bashrc
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "cvx-deploy", "_CVX_DEPLOY_COMPLETE").source())
