"""What runs a bundle on the last rungs of a parity check: its ONNX graphs, be it as a reference, and an engine."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import Manifest
from cvx_deploy.engines.backend import Backend
from cvx_deploy.engines.registry import engine_spec, open_backend
from cvx_deploy.engines.spec import EngineName
from cvx_deploy.progress import Progress


@dataclass(frozen=True)
class GraphRunner:
    """What runs ONNX graphs here.

    Attributes:
        engine: Its name.
        wide: The types that it computes in float32 for want of kernels, as a reference: right, and slow.
    """

    engine: EngineName
    wide: tuple[str, ...] = ()

    @contextmanager
    def open(self, bundle: Bundle, progress: Progress) -> Iterator[Backend]:
        """Open a bundle for as long as the block lasts; see `cvx_deploy.engines.registry.open_backend`."""
        if not self.wide:
            with open_backend(self.engine, bundle, progress=progress) as backend:
                yield backend
            return
        from cvx_deploy.engines.onnxruntime.backend import OrtBackend
        from cvx_deploy.graph.widened import Widened

        with tempfile.TemporaryDirectory(prefix="cvx-wide-") as folder:
            seen = Widened.of(bundle, Path(folder)) if "bf16" in self.wide else bundle
            yield OrtBackend(seen, None, progress, reference=True)

    def __str__(self) -> str:
        version = f"{self.engine} {engine_spec(self.engine).version()}"
        return f"{version}, as a reference: {' and '.join(self.wide)} computed in float32" if self.wide else version


def graph_runner(engine: EngineName | None, manifest: Manifest) -> GraphRunner:
    """Return what runs ONNX graphs in a bundle's types here; the chosen engine where it is ONNX Runtime on a GPU."""
    if engine == "onnxruntime-cuda":
        return GraphRunner(engine)
    bf16, fp8 = "bf16" in manifest.computes_in, "fp8" in manifest.multiplies_in
    if bf16 and not fp8 and not engine_spec("openvino").obstacle(manifest):
        return GraphRunner("openvino")
    return GraphRunner("onnxruntime", (*(("fp8",) if fp8 else ()), *(("bf16",) if bf16 else ())))


def last_engine(asked: EngineName | None, manifest: Manifest) -> tuple[EngineName | None, str]:
    """Return what the last rung runs on, or None and why nothing on a CPU does; what was asked for is always tried."""
    if asked is not None:
        return asked, ""
    if "fp8" in manifest.multiplies_in:
        return None, "no engine for a CPU runs fp8 fast (name one for a GPU with --engine)"
    if "bf16" not in manifest.computes_in:
        return "onnxruntime", ""
    if not engine_spec("openvino").obstacle(manifest):
        return "openvino", ""
    return None, "no engine here computes in bf16 on this CPU (name one for a GPU with --engine)"
