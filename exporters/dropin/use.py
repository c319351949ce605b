"""Puts engines in the place of a pipeline's networks, and the networks back."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.registry import engine_spec
from cvx_deploy.engines.spec import EngineName, EngineOptions
from cvx_deploy.errors import CvxError
from cvx_deploy.exporters.dropin.same import check_pipeline
from cvx_deploy.exporters.dropin.stand_ins import STAND_INS, StandIn
from cvx_deploy.exporters.dropin.views import Views
from cvx_deploy.progress import Progress, SilentProgress


class Engines:
    """Engines in a pipeline: until `close`, or the end of a ``with`` block, which puts its own networks back.

    Attributes:
        plain: The pipeline's own networks, by name.
    """

    def __init__(self, pipe: Any, views: Views, plain: dict[str, Any]) -> None:
        self.plain = plain
        self._pipe, self._views = pipe, views
        made = {name: STAND_INS[name](module, views) for name, module in plain.items()}
        for name, module in made.items():
            setattr(pipe, name, module)

    def close(self) -> None:
        """Put the networks back, and free the engines."""
        for name, module in self.plain.items():
            setattr(self._pipe, name, module)
        self.plain = {}
        self._views.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def engines_in(
    pipe: Any, bundle: Path, engine: EngineName, options: EngineOptions, progress: Progress | None = None
) -> Engines:
    """Put the engines of a bundle in the place of a pipeline's networks; see `cvx_deploy.diffusers.use_engines`."""
    opened = Bundle.open(bundle)
    spec = engine_spec(engine)
    spec.check(options)
    names = [name for name in STAND_INS if getattr(pipe, name, None) is not None]
    if not names:
        raise CvxError("this pipeline has no network of CogVideoX", fix="give use_engines a CogVideoX pipeline")
    plain = {name: getattr(pipe, name) for name in names}
    if any(isinstance(module, StandIn) for module in plain.values()):
        raise CvxError("this pipeline runs on engines already", fix="close those first")
    check_pipeline(pipe, opened, names)
    views = Views(opened, engine, options, progress or SilentProgress())
    with ExitStack() as stack:
        stack.callback(views.close)
        views.first()  # an engine that is not there is said now
        engines = Engines(pipe, views, plain)
        stack.pop_all()
    return engines
