"""Actors on this machine for the nodes of a joined cluster, such as the one that gives them bundles."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cvx_deploy.cluster.bundles import BundleSource, Known, Sender


def actor_here(kind: type, *arguments: object) -> Any:
    """Return an actor that runs on this machine, and takes no CPU."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(kind).options(num_cpus=0, scheduling_strategy=here).remote(*arguments)


@contextmanager
def source_of(bundles: Sequence[Known]) -> Iterator[Any]:
    """Give an actor on this machine that has these bundles."""
    source = actor_here(BundleSource, list(bundles))
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
