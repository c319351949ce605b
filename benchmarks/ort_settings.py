"""Measure what ONNX Runtime's session settings do on a CPU: seconds and memory of networks of the 5B's width.

    python benchmarks/ort_settings.py --work DIR [--rounds N]

`DIR` is that of `cpu.py`, whose checkpoint and bundles are used. Each setting is measured in processes of its own, one
after the other in every round, so that what disturbs the machine disturbs all of them; ratios are taken within a round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cpu
import onnxruntime
from report import conditions, write

from cvx_deploy.engines.onnxruntime import backend as ort
from cvx_deploy.measure.memory import MemoryWatch

TOOLS = ("onnxruntime", "numpy")
CASES = ("transformer-2k", "vae-decoder")
PEER = cpu.Ours("onnxruntime", "fp32")
RUNS = 1  # of each process, after one that is not counted
Change = Callable[[Any], None]
"""Makes a change to a session's options."""


def entry(key: str, value: str) -> Change:
    """Return what makes an entry of a session's configuration."""
    return lambda options: options.add_session_config_entry(key, value)


def attribute(name: str, value: object) -> Change:
    """Return what sets an attribute of a session's options."""
    return lambda options: setattr(options, name, value)


SETTINGS: dict[str, Change] = {
    "as shipped": lambda _: None,
    "attention holds all scores": lambda _: None,
    "threads that sleep while they wait": entry("session.intra_op.allow_spinning", "0"),
    "no arena": attribute("enable_cpu_mem_arena", False),
    "no memory pattern": attribute("enable_mem_pattern", False),
    "no prepacked weights": entry("session.disable_prepacking", "1"),
    "basic optimizations only": attribute(
        "graph_optimization_level", onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ),
    "one thread": attribute("intra_op_num_threads", 1),
}


def one(work: Path, case: str, setting: str) -> dict[str, Any]:
    """Run one network with one setting in this process."""
    options_of = ort.OrtBackend._options

    def changed(self: ort.OrtBackend, *told: Any) -> Any:
        options = options_of(self, *told)
        SETTINGS[setting](options)
        return options

    ort.OrtBackend._options = changed  # type: ignore[assignment, method-assign]
    if setting == "attention holds all scores":
        ort.holds_large_scores = lambda *_: False  # type: ignore[attr-defined]
    cpu.make_bundle(work, cpu.CASES[case], PEER)
    with ExitStack() as stack:
        watch = stack.enter_context(MemoryWatch(interval=0.005))
        run = cpu.ours(stack, work, cpu.CASES[case], PEER)
        run()
        seconds = []
        for _ in range(RUNS):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "private_bytes": watch.private_bytes}


def settings(case: str) -> list[str]:
    """Return what changes anything in a case: only a transformer has attention in tiles."""
    return [name for name in SETTINGS if "attention" not in name or "transformer" in case]


def measure(work: Path, case: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Measure a case with every setting in turn, round by round."""
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "private_bytes": []} for name in settings(case)}
    for _ in range(rounds):
        for name in found:
            command = [sys.executable, __file__, "--work", str(work), "--one", case, name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            for key, value in json.loads(done.stdout.splitlines()[-1]).items():
                found[name][key].append(value)
            print(f"{case}, {name}: {found[name]}", file=sys.stderr)
    return found


def lines(results: dict[str, dict[str, dict[str, list[float]]]]) -> Iterator[str]:
    """Lay the results out as Markdown."""
    yield from ("# Session settings of ONNX Runtime on a CPU", "")
    yield "| network | setting | seconds | speed against as shipped | private memory, peak |"
    yield "| --- | --- | --- | --- | --- |"
    for case, found in results.items():
        shipped = found["as shipped"]["seconds"]
        for name, took in found.items():
            middle, least, most = cpu.speedup(shipped, took["seconds"])
            memory = statistics.median(took["private_bytes"]) / 1e9
            seconds = statistics.median(took["seconds"])
            yield f"| {case} | {name} | {seconds:.2f} | {middle:.2f} ({least:.2f} to {most:.2f}) | {memory:.2f} GB |"


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder with 4 GB of room")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="nothing else ran", help="what else used the machine, for the report")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "ort_settings")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.work, *arguments.one)))
        return
    told = conditions(TOOLS, arguments.note, seed=cpu.SEED, rounds=arguments.rounds, runs=RUNS)
    results = {case: measure(arguments.work, case, arguments.rounds) for case in CASES}
    write(arguments.output, told, {"cases": results}, lines(results))


if __name__ == "__main__":
    main()
