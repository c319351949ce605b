"""Whether a run fits into this machine's memory, found out before anything is loaded."""

from contextlib import suppress
from dataclasses import replace

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.registry import SPECS
from cvx_deploy.engines.residency import Policy
from cvx_deploy.engines.spec import EngineName, EngineOptions, Needed
from cvx_deploy.errors import EngineError, OutOfMemoryError, ShapeError
from cvx_deploy.estimate.host import host_needs, too_much, what_fits
from cvx_deploy.measure.limit import memory_limit
from cvx_deploy.pipeline.request import RunRequest, networks_needed
from cvx_deploy.progress import Progress


def obstacle(bundle: Bundle, engine: EngineName, options: EngineOptions, needed: Needed) -> str:
    """Return why an engine takes more memory than it may for these networks; nothing where it does not."""
    needs = host_needs(bundle, engine, needed)
    return "" if needs is None else too_much(needs, *_limit(options))


def policy_within(
    bundle: Bundle,
    engine: EngineName,
    options: EngineOptions,
    request: RunRequest,
    needed: Needed,
    progress: Progress,
) -> Policy:
    """Return which networks may stay loaded between runs, so that all of them fit.

    Args:
        bundle: What is to be run.
        engine: What runs it.
        options: How; its `ram` is the limit, else what this process may have.
        request: What is to be made.
        needed: Role and sizes of every network for it.
        progress: Told where they cannot all stay.

    Raises:
        OutOfMemoryError: One phase of the run alone takes more; the cure names what would fit.
    """
    needs, (limit, why) = host_needs(bundle, engine, needed), _limit(options)
    if needs is None:
        return options.residency
    if problem := too_much(needs, limit, why):
        tiled = needed
        with suppress(ShapeError):  # tiles of this size do not join
            tiled = networks_needed(bundle, replace(request, vae_tiling=True))
        raise OutOfMemoryError(problem, fix=what_fits(bundle, _able(bundle, engine), needed, tiled, limit))
    if options.residency == "resident" and needs.at_once > limit:
        progress.note("note: the networks of one phase are held at a time; all of them would take more memory")
        return "phase"
    return options.residency


def _limit(options: EngineOptions) -> tuple[int, str]:
    return memory_limit() if options.ram is None else (options.ram, "that --ram allows")


def _able(bundle: Bundle, first: EngineName) -> list[EngineName]:
    """Return the engines on CPUs that can run a bundle here, the one that was asked for first."""
    able = [first]
    for name, spec in SPECS.items():
        with suppress(EngineError):
            if name != first and not spec.on_gpu and spec.version() and not spec.obstacle(bundle.manifest):
                able.append(name)
    return able
