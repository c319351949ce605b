"""The least time of a step by the compiled plan of a built bundle."""

from pathlib import Path

from cvx_deploy.bundle.opened import MANIFEST, Bundle
from cvx_deploy.engines.gpus import GpuModel
from cvx_deploy.engines.tensorrt.roofline import roofline
from cvx_deploy.engines.tensorrt.store import EngineStore
from cvx_deploy.estimate.memory import PrecisionName
from cvx_deploy.shape import Shape


def step_seconds(folder: Path, shape: Shape, gpu: GpuModel, *, guided: bool) -> dict[PrecisionName, float]:
    """Return the seconds of a step in the bundle's precision; empty where there is no plan of that shape and batch.

    A plan whose batch is chosen at run time has kernels of unknown size: it says nothing here.
    """
    if not (folder / MANIFEST).exists():
        return {}
    bundle = Bundle.read(folder)
    if shape not in bundle.shapes:
        return {}
    bundle, batch, store = bundle.at(shape), 2 if guided else 1, EngineStore(bundle)
    network = bundle.network("transformer")
    precision: PrecisionName = network.quantization.scheme if network.quantization else network.precision
    for record in store.records():
        fits = record.key.profile.get("batch") == (batch, batch, batch)
        if record.network != bundle.network_name("transformer") or not fits:
            continue
        for compiled in store.plans(record):
            if gpu.compute_capability in compiled.targets and not compiled.is_partial:
                return {precision: roofline(compiled, gpu).seconds}
    return {}
