"""What forecasting steps does to a video, against the same engine's full run: a judgement of its own, no parity."""

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np

from cvx_deploy.engines.backend import Backend
from cvx_deploy.errors import CvxError
from cvx_deploy.measure.difference import video_difference
from cvx_deploy.measure.thresholds import FORECAST
from cvx_deploy.parity.ladder import ForecastResult
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.run import run
from cvx_deploy.progress import Progress


def forecast_result(
    opened: AbstractContextManager[Backend], request: RunRequest, folder: Path, progress: Progress
) -> ForecastResult:
    """Make a video with all steps and with ``--fast``, and compare the two.

    Args:
        opened: What runs both.
        request: The video, without a policy.
        folder: Where both are kept.
        progress: Told what goes on.
    """
    files = [folder / "full.npy", folder / "forecast.npy"]
    with opened as backend:
        shape, manifest = str(backend.bundle.shape), backend.bundle.manifest
        try:
            run(backend, replace(request, output=files[0]), progress)
            report = run(backend, replace(request, output=files[1], fast=True), progress)
        except CvxError as error:
            return ForecastResult(shape, None, None, (error.what,))
    full, forecast = map(np.load, files)
    apart = video_difference(forecast, full)
    limits = FORECAST[request.scheduler or manifest.scheduler["kind"]]
    return ForecastResult(shape, apart, str(report.steps[0]), apart.beyond(limits))
