"""Serve the miniature to many clients, undisturbed and while workers and servers are killed, and count what came of it.

    python benchmarks/serve.py [--clients N] [--steady N] [--jobs N] [--kills N] [--output benchmarks/results/serve]

Undisturbed, jobs a minute are held against as many processes that use the Python API and nothing else, and processor
seconds a job against theirs: clients, server and workers share the cores. A client looks at its job when the server's
answers say that it makes sense, as OpenAI's own client does. Under kills every accepted job must end once, with the
bytes that the Python API writes; the program fails where one does not. With
--ray the workers are on the nodes of a Ray cluster on this machine, nodes are killed, and others join.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from report import conditions, write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.cluster.nodes import Nodes

TOOLS = ("onnxruntime", "numpy", "av", "fastapi", "uvicorn", "starlette", "httpx", "ray")
PROMPT = "a red circle moves to the right"
SEEDS = 8  # so many different videos are asked for, over and over
ENDED = ("completed", "failed", "cancelled")
_APART = 0.1  # seconds between two clients' first requests


@dataclass
class Seen:
    """What clients saw: seconds of each answer, and by idempotency key the id and the hash of a video."""

    submits: list[float] = field(default_factory=list)
    polls: list[float] = field(default_factory=list)
    ids: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    unreachable: int = 0
    memory: list[dict[str, int]] = field(default_factory=list)


class Server:
    """A server process that can be killed and started again at the same port."""

    def __init__(self, data: Path, workers: int, *, ray: str | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        words = ("serve", "--port", self.port, "--data", data, "--workers", workers, "--threads", 1)
        more = ("--engine", "onnxruntime", "--queue", 100_000, "--jobs-per-key", 100_000)
        through = () if ray is None else ("--ray", ray)
        self._command = [sys.executable, "-m", "cvx_deploy", *map(str, words + more + through)]
        self.data = data
        self.start()

    def start(self) -> None:
        """Start it."""
        self.process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def wait_ready(self) -> float:
        """Wait until all workers are ready, and return the seconds that took."""
        start = time.monotonic()
        while True:
            with contextlib.suppress(httpx.HTTPError):
                states = httpx.get(f"{self.url}/readyz").json()["workers"]
                if all(state in ("ready", "busy") for state in states):
                    return time.monotonic() - start
            if self.process.poll() is not None:
                raise SystemExit("the server has ended")
            time.sleep(0.1)

    def workers(self) -> list[psutil.Process]:
        """Return the processes of its workers that are there now."""
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.process.pid).children()
        return []

    def memory(self) -> dict[str, int]:
        """Return the bytes that the server, and its workers together, have for themselves."""
        own = psutil.Process(self.process.pid).memory_full_info().uss
        return {"server": own, "workers": sum(worker.memory_full_info().uss for worker in self.workers())}

    def processor(self) -> dict[str, float]:
        """Return the processor seconds of the server, and of those workers together that are there."""
        return {"server": seconds_of(psutil.Process(self.process.pid)), "workers": sum(map(seconds_of, self.workers()))}

    def stop(self) -> None:
        """End it as a service manager does."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


def seconds_of(process: psutil.Process) -> float:
    """Return the processor seconds that a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def wanted(number: int, steps: int) -> dict[str, Any]:
    """Return what the job of a number asks for."""
    return {"prompt": PROMPT, "seed": number % SEEDS, "num_inference_steps": steps}


def bare(videos: int, steps: int, folder: Path) -> None:
    """Make so many videos with the Python API, and print the seconds and the hash of each seed's file."""
    from cvx_deploy import Pipeline

    hashes: dict[int, str] = {}
    with Pipeline.from_pretrained("mini", engine="onnxruntime", threads=1) as pipe:
        pipe(PROMPT, num_inference_steps=2)
        print("ready", flush=True)
        sys.stdin.readline()
        start, used = time.monotonic(), time.process_time()
        for number in range(videos):
            [path] = pipe(PROMPT, seed=number % SEEDS, num_inference_steps=steps).save(folder / f"{number}.mp4")
            hashes[number % SEEDS] = hashlib.sha256(path.read_bytes()).hexdigest()
        took = {"seconds": time.monotonic() - start, "processor": (time.process_time() - used) / videos}
        print(json.dumps({**took, "hashes": hashes}))


@dataclass(frozen=True)
class Bare:
    """What processes with the Python API alone did: videos a minute, processor seconds of one, a hash for each seed."""

    rate: float
    processor: float
    hashes: dict[int, str]


def bare_rate(workers: int, videos: int, steps: int) -> Bare:
    """Return what so many processes did that made so many videos each."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--bare", str(videos), "--steps", str(steps), "--folder"]
        processes = []
        for number in range(workers):
            place = Path(folder) / str(number)
            place.mkdir()
            pipe = subprocess.PIPE
            processes.append(subprocess.Popen([*command, str(place)], stdin=pipe, stdout=pipe, text=True))
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [json.loads(process.communicate()[0]) for process in processes]
    rate = sum(60 * videos / one["seconds"] for one in told)
    hashes = {int(seed): digest for seed, digest in told[0]["hashes"].items()}
    return Bare(rate, statistics.mean(one["processor"] for one in told), hashes)


def asked(client: httpx.Client, seen: Seen, method: str, path: str, **more: Any) -> tuple[httpx.Response, float]:
    """Ask until a server answers, and return the answer and the seconds that this one took."""
    while True:
        start = time.monotonic()
        try:
            answer = client.request(method, path, **more)
            if answer.status_code < 500:
                return answer, time.monotonic() - start
        except httpx.HTTPError:
            pass
        seen.unreachable += 1
        time.sleep(0.2)


def one_job(client: httpx.Client, number: int, steps: int, seen: Seen) -> None:
    """Ask for a video under an idempotency key, look at it when that makes sense until it has ended, and fetch it."""
    key = f"job-{number}"
    body, headers = wanted(number, steps), {"Idempotency-Key": key}
    answer, seconds = asked(client, seen, "POST", "/v1/videos", json=body, headers=headers)
    answer.raise_for_status()
    seen.submits.append(seconds)
    identifier = answer.json()["id"]
    if seen.ids.setdefault(key, identifier) != identifier:
        raise SystemExit(f"{key} has two ids")
    while True:
        time.sleep(int(answer.headers["openai-poll-after-ms"]) / 1000)
        answer, seconds = asked(client, seen, "GET", f"/v1/videos/{identifier}")
        answer.raise_for_status()
        seen.polls.append(seconds)
        if answer.json()["status"] in ENDED:
            break
    if answer.json()["status"] != "completed":
        error = answer.json()["error"]
        if error is None or error["code"] != "worker_died":
            raise SystemExit(f"{identifier} has {answer.json()}")
        seen.failed.append(identifier)
        return
    answer, _ = asked(client, seen, "GET", f"/v1/videos/{identifier}/content")
    seen.hashes[key] = hashlib.sha256(answer.content).hexdigest()


def served(server: Server, clients: int, jobs: int, steps: int) -> tuple[Seen, float]:
    """Let clients, who come in one by one, share out the jobs; return what they saw, and the seconds it took."""
    seen, numbers = Seen(), iter(range(jobs))
    lock = threading.Lock()

    def client_of(place: int) -> None:
        time.sleep(_APART * place)
        with httpx.Client(base_url=server.url, timeout=30) as client:
            while True:
                with lock:
                    number = next(numbers, None)
                    if number is not None and number % max(jobs // 10, 1) == 0:
                        with contextlib.suppress(psutil.Error):
                            seen.memory.append(server.memory())
                if number is None:
                    return
                one_job(client, number, steps, seen)

    start = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(client_of, place) for place in range(clients)]:
            future.result()
    return seen, time.monotonic() - start


@contextlib.contextmanager
def killing(server: Server, kills: int, pause: float) -> Iterator[list[str]]:
    """Kill workers, and every third time the server, while the block lasts."""
    done, killed = threading.Event(), list[str]()
    choice = random.Random(0)

    def kill() -> None:
        while len(killed) < kills and not done.wait(pause * choice.uniform(0.5, 1.5)):
            workers = server.workers()
            if len(killed) % 3 == 2:
                server.process.kill()
                server.process.wait()
                server.start()
                killed.append("server")
            elif workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    choice.choice(workers).kill()
                    killed.append("worker")

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    yield killed
    done.set()
    thread.join()


@contextlib.contextmanager
def nodes_dying(nodes: Nodes, kills: int, pause: float) -> Iterator[list[str]]:
    """Kill a node of a cluster, and let another one join, while the block lasts."""
    done, killed = threading.Event(), list[str]()

    def kill() -> None:
        while len(killed) < kills and not done.wait(pause):
            nodes.kill()
            killed.append("node")
            nodes.add()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    yield killed
    done.set()
    thread.join()


def check(server: Server, seen: Seen, expected: dict[int, str], jobs: int) -> None:
    """Fail unless every job is there once, completed, with the right bytes, and nothing else lies there."""
    listed: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while True:
        page = httpx.get(f"{server.url}/v1/videos", params={"limit": "100", **after}).json()
        listed += page["data"]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    wrong = [key for key, digest in seen.hashes.items() if digest != expected[int(key.split("-")[1]) % SEEDS]]
    folders = {path.name for path in (server.data / "videos").iterdir()}
    failed = {server.data / "videos" / identifier for identifier in seen.failed}
    leftovers = [
        path
        for path in server.data.rglob("*")
        if path.name.startswith(("point-", ".upload-", ".video")) and path.parent not in failed
    ]
    ended = len(seen.hashes) + len(seen.failed)
    if len(listed) != jobs or {one["id"] for one in listed} != set(seen.ids.values()) or ended != jobs:
        raise SystemExit(f"{len(listed)} jobs are listed, and {ended} were seen to end, of {jobs}")
    unlike = [one["id"] for one in listed if (one["status"] == "completed") == (one["id"] in seen.failed)]
    if wrong or unlike:
        raise SystemExit(f"with other bytes: {wrong}; in another state than was told: {unlike}")
    if folders != {one["id"] for one in listed} or leftovers:
        raise SystemExit(f"files are left: {leftovers[:5]}")


def percentile(values: list[float], share: float) -> float:
    """Return a percentile in milliseconds."""
    return round(1000 * sorted(values)[min(int(share * len(values)), len(values) - 1)], 2)


def latencies(seen: Seen) -> dict[str, float]:
    """Return how long answers took, in milliseconds."""
    return {
        f"{name} p{share}": percentile(values, share / 100)
        for name, values in (("submit", seen.submits), ("poll", seen.polls))
        for share in (50, 99)
    }


def undisturbed(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a server that nothing is done to, and the Python API before and after it."""
    each = max(arguments.steady // arguments.workers // 4, SEEDS)
    before = bare_rate(arguments.workers, each, arguments.steps)
    server = Server(folder / "steady", arguments.workers)
    ready = server.wait_ready()
    used = {**server.processor(), "clients": time.process_time()}
    seen, seconds = served(server, arguments.clients, arguments.steady, arguments.steps)
    now = {**server.processor(), "clients": time.process_time()}
    seen.memory.append(server.memory())
    check(server, seen, before.hashes, arguments.steady)
    server.stop()
    after = bare_rate(arguments.workers, each, arguments.steps)
    rate = 60 * arguments.steady / seconds
    return {
        "jobs": arguments.steady,
        "seconds": round(seconds, 1),
        "jobs_per_minute": round(rate, 1),
        "bare_per_minute": [round(before.rate, 1), round(after.rate, 1)],
        "of_bare": round(rate / statistics.mean((before.rate, after.rate)), 3),
        "processor_seconds_a_job": {
            **{who: round((now[who] - used[who]) / arguments.steady, 4) for who in used},
            "bare": round(statistics.mean((before.processor, after.processor)), 4),
        },
        "polls_a_job": round(len(seen.polls) / arguments.steady, 2),
        "seconds_to_ready": round(ready, 1),
        "milliseconds": latencies(seen),
        "memory_bytes": seen.memory,
    }


def under_kills(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Kill workers and servers while clients ask, and check what came of every job."""
    server = Server(folder / "chaos", arguments.workers)
    server.wait_ready()
    with killing(server, arguments.kills, arguments.pause) as killed:
        seen, seconds = served(server, arguments.clients, arguments.jobs, arguments.chaos_steps)
    server.wait_ready()
    check(server, seen, bare_rate(1, SEEDS, arguments.chaos_steps).hashes, arguments.jobs)
    server.stop()
    return {
        "jobs": arguments.jobs,
        "seconds": round(seconds, 1),
        "killed": {kind: killed.count(kind) for kind in ("worker", "server")},
        "unreachable": seen.unreachable,
        "completed_with_the_same_bytes": len(seen.hashes),
        "failed_after_two_kills": len(seen.failed),
    }


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    with tempfile.TemporaryDirectory() as name:
        return {"steady": undisturbed(Path(name), arguments), "chaos": under_kills(Path(name), arguments)}


def measured_with_ray(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure what comes of jobs whose nodes die."""
    expected = bare_rate(1, SEEDS, arguments.chaos_steps).hashes
    with tempfile.TemporaryDirectory() as folder, Nodes() as nodes:
        os.environ.update(nodes.environment)
        server = Server(Path(folder) / "ray", 2, ray=nodes.address)
        ready = server.wait_ready()
        with nodes_dying(nodes, arguments.kills, arguments.pause) as killed:
            seen, seconds = served(server, arguments.clients, arguments.jobs, arguments.chaos_steps)
        check(server, seen, expected, arguments.jobs)
        server.stop()
    return {
        "jobs": arguments.jobs,
        "seconds": round(seconds, 1),
        "seconds_to_ready": round(ready, 1),
        "nodes_killed": len(killed),
        "milliseconds": latencies(seen),
        "completed_with_the_same_bytes": len(seen.hashes),
        "failed_after_two_kills": len(seen.failed),
    }


def lines_with_ray(results: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    """Return what `measured_with_ray` returned as Markdown."""
    head = f"{arguments.clients} clients, a Ray cluster of a head and two nodes with one CPU each on one machine"
    killed = f"kill -9 of {results['nodes_killed']} nodes, each followed by a new one that joins"
    return [
        "# Serving through Ray",
        "",
        f"{head}, the miniature, {killed}: of {results['jobs']} accepted jobs of {arguments.chaos_steps} steps every "
        f"one ended once, {results['completed_with_the_same_bytes']} with the bytes that the Python API writes and "
        f"{results['failed_after_two_kills']} as failed, hit twice at the same place; nothing else was left. "
        f"It took {results['seconds']} s.",
    ]


def lines_of(results: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    """Return the results as Markdown."""
    steady, chaos = results["steady"], results["chaos"]
    mib = {who: ", ".join(f"{one[who] / 2**20:.0f}" for one in steady["memory_bytes"]) for who in ("server", "workers")}
    used = steady["processor_seconds_a_job"]
    share = used["bare"] / sum(used[who] for who in ("server", "workers", "clients"))
    rows = [
        ("jobs, steps each", f"{steady['jobs']}, {arguments.steps}"),
        ("jobs a minute", steady["jobs_per_minute"]),
        ("the Python API alone, before and after", " and ".join(map(str, steady["bare_per_minute"]))),
        ("share of it", steady["of_bare"]),
        *((f"{name}, ms", value) for name, value in steady["milliseconds"].items()),
        ("looks at a job", steady["polls_a_job"]),
        *((f"processor, ms a job: {who}", round(1000 * value, 1)) for who, value in used.items()),
        ("the Python API's share of what server, workers and clients use", f"{share:.3f}"),
        ("private memory of the server, MiB, after each tenth of the jobs", mib["server"]),
        ("the same of its workers together", mib["workers"]),
    ]
    head = f"{arguments.clients} clients, {arguments.workers} workers with one thread each, the miniature"
    return [
        "# Serving",
        "",
        f"{head}, undisturbed:",
        "",
        "| what | figure |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        f"With kill -9 of {chaos['killed']['worker']} workers and {chaos['killed']['server']} servers: of "
        f"{chaos['jobs']} accepted jobs of {arguments.chaos_steps} steps every one ended once, "
        f"{chaos['completed_with_the_same_bytes']} with the bytes that the Python API writes and "
        f"{chaos['failed_after_two_kills']} as failed, hit twice at the same place; nothing else was left.",
    ]


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steady", type=int, default=1000, help="jobs of the undisturbed run")
    parser.add_argument("--steps", type=int, default=10, help="steps of each of them")
    parser.add_argument("--jobs", type=int, default=300, help="jobs of the run with kills")
    parser.add_argument("--chaos-steps", type=int, default=50, help="steps of each of them")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pause", type=float, default=10.0, help="mean seconds between two kills")
    parser.add_argument("--ray", action="store_true", help="kill nodes of a Ray cluster, and do no more")
    parser.add_argument("--note", default="nothing else ran", help="what else used the machine, for the report")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "serve")
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare is not None:
        bare(arguments.bare, arguments.steps, arguments.folder)
        return
    names = ("clients", "workers", "steady", "steps", "jobs", "chaos_steps", "kills", "pause")
    told = conditions(
        TOOLS,
        arguments.note,
        video="the packaged miniature mini: 9x48x48, guidance 2, fp32, mp4, onnxruntime, one thread a worker",
        **{name: getattr(arguments, name) for name in names},
    )
    if arguments.ray:
        results = measured_with_ray(arguments)
        write(arguments.output.with_name("serve_ray"), told, results, lines_with_ray(results, arguments))
        return
    results = measured(arguments)
    write(arguments.output, told, results, lines_of(results, arguments))


if __name__ == "__main__":
    main()
