"""The actor on this machine that gives bundles to the nodes of a joined cluster."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cvx_deploy.cluster.bundles import BundleSource, Known, Sender


@contextmanager
def source_of(bundles: Sequence[Known]) -> Iterator[Any]:
    """Give an actor that runs on this machine, takes no CPU, and has these bundles."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    source = ray.remote(BundleSource).options(num_cpus=0, scheduling_strategy=here).remote(list(bundles))
    try:
        yield source
    finally:
        ray.wait([source.close.remote()], timeout=5)
        ray.kill(source)


def sender_of(source: Any) -> Sender:
    """Return the calls that ask such an actor, from wherever it is asked."""
    return Sender(
        lambda wanted: int(ray.get(source.size.remote(wanted))),
        lambda wanted, start: bytes(ray.get(source.piece.remote(wanted, start))),
    )
