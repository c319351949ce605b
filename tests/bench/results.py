"""Results of a benchmark that was never run, for tests of what is made of them."""

from cvx_deploy.bench.results import SCHEMA_VERSION, BenchResults, Peer, Run


def run(seconds: float, scale: float = 1.0) -> Run:
    return Run(
        seconds=seconds,
        stages={"text encoder": 0.1 * scale, "transformer": seconds - 0.3, "vae decode": 0.2, "load": 0.0},
        steps=[0.1 * scale, 0.2 * scale, 0.3 * scale],
        first_frame=seconds - 0.05,
        resident={"text encoder": 200 << 20, "transformer": 300 << 20},
        private={"text encoder": 100 << 20, "transformer": 150 << 20},
        gpu={},
        joules=None,
    )


def peer(name: str, seconds: tuple[float, ...], psnr: float | None = None) -> Peer:
    return Peer(
        name=name,
        what=f"{name}, made up",
        open_seconds=1.5,
        runs=[run(taken) for taken in seconds],
        memory=[(moment / 10, 200 << 20, 100 << 20, 0) for moment in range(10)],
        stage_ends={"text encoder": 0.1, "transformer": 0.8, "vae decode": 1.0},
        psnr=psnr,
        build_seconds={},
        sizes={"weights": 5_000_000},
        first_seconds=2.5,
    )


def results(ours: tuple[float, ...] = (1.0, 1.1, 1.2), **conditions: object) -> BenchResults:
    told = {
        "date": "2026-01-01",
        "cpu": "a CPU <of some kind>",
        "cores": 2,
        "gpu": "none measured",
        "runs": len(ours),
        "video": {"steps": 4},
        **conditions,
    }
    return BenchResults(
        schema_version=SCHEMA_VERSION,
        model="mini",
        precision="fp32",
        shape="9x48x48",
        conditions=told,
        methods={"seconds": "a clock"},
        reference="eager",
        peers=[peer("eager", tuple(2 * taken for taken in ours)), peer("onnxruntime", ours, psnr=80.0)],
        not_measured={"fp8": "measured beside engines for GPUs only"},
    )
