"""A batch through Ray, with one of the cluster's nodes killed in its middle."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.batch.test_batch import batch, line, manifest, written
from tests.cluster.nodes import Nodes

pytest.importorskip("ray")


def through(nodes: Nodes, file: Path, output: Path) -> "subprocess.Popen[str]":
    words = ("batch", file, "--output", output, "--threads", 1, "--json", "--ray", nodes.address)
    command = [sys.executable, "-m", "cvx_deploy", *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=nodes.environment)


@pytest.mark.nightly
def test_a_batch_through_ray_is_that_of_one_process_though_a_node_dies(tmp_path: Path) -> None:
    lines = [line(id=f"v{number}", seed=number, num_inference_steps=20) for number in range(16)]
    file = written(tmp_path, *lines)
    spread = tmp_path / "spread"
    with Nodes() as nodes:
        process = through(nodes, file, spread)
        noted = spread / "manifest.jsonl"
        while not noted.exists() or len(noted.read_text().splitlines()) < 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        nodes.kill()
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
        assert "Traceback" not in err
        told = json.loads(out)
        assert (told["made"], told["failed"]) == (16, {})
        again, _ = through(nodes, file, spread).communicate(timeout=400)
        assert json.loads(again)["there_before"] == 16
    ids = [json.loads(one)["id"] for one in noted.read_text().splitlines()]
    assert sorted(ids) == sorted(one["id"] for one in lines), "each is noted once"
    batch(written(tmp_path, *lines))
    alone = {record["id"]: record["sha256"] for record in manifest(tmp_path)}
    assert {one["id"]: one["sha256"] for one in map(json.loads, noted.read_text().splitlines())} == alone
    assert len(set(alone.values())) == 16, "the twin: videos of other seeds are others"


def at_work(nodes: Nodes) -> list[psutil.Process]:
    """Return the processes on a cluster's nodes that make a video now, as Ray names them."""
    found = []
    for process in psutil.Process(nodes.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ray::Maker.make" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.nightly
def test_a_video_whose_workers_die_three_times_fails_and_the_batch_goes_on(tmp_path: Path) -> None:
    file = written(tmp_path, line(id="long", seed=1, num_inference_steps=500))
    with Nodes() as nodes:
        process = through(nodes, file, tmp_path / "spread")
        killed = 0
        while process.poll() is None and killed < 3:
            for worker in at_work(nodes):
                time.sleep(1)
                worker.kill()
                worker.wait(10)
                killed += 1
            time.sleep(0.1)
        out, err = process.communicate(timeout=400)
    assert process.returncode == 1, err
    assert json.loads(out)["failed"] == {"long": "its worker died 3 times"}
