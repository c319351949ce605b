"""A Ray cluster of three nodes on this machine: a head without CPUs, and two nodes with one each that can be killed."""

import os
import secrets
import subprocess
import sys
from typing import Self

_PROGRAM = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster()
cluster.add_node(wait=False, num_cpus=0, include_dashboard=False)
nodes = [cluster.add_node(wait=False, num_cpus=1) for _ in range(2)]
cluster.wait_for_nodes(timeout=300)
print(cluster.address, flush=True)
for line in sys.stdin:
    if line == "kill\\n":
        cluster.remove_node(nodes.pop(0), allow_graceful=False)
    elif line == "add\\n":
        nodes.append(cluster.add_node(wait=False, num_cpus=1))
    print("done", flush=True)
cluster.shutdown()
"""


class Nodes:
    """A cluster for a ``with`` block, under a token of its own."""

    def __init__(self) -> None:
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_raylet_start_wait_time_s": "300",
        }

    def __enter__(self) -> Self:
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        command = [sys.executable, "-c", _PROGRAM]
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=nowhere, text=True, env=self.environment
        )
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self.address = self._process.stdout.readline().strip()
        assert self.address, "the cluster did not come up"
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=60)

    def kill(self) -> None:
        """Let the elder node with a CPU be gone, as a power cut would."""
        self._tell("kill")

    def add(self) -> None:
        """Let another one join."""
        self._tell("add")

    def _tell(self, word: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"
