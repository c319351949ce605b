"""Which rewrites there are, and the order in which they are applied."""

from collections.abc import Callable, Collection

import onnx_ir as ir

from cvx_deploy.graph.frames import frames_in_place
from cvx_deploy.graph.joint import join_text_and_video
from cvx_deploy.graph.layer_norm import lean_layer_norms
from cvx_deploy.graph.rope import rope_on_all_tokens
from cvx_deploy.graph.upsample import convolve_before_upsampling

Rewrite = Callable[[ir.Model], int]
"""Changes a graph in place, and returns in how many places."""

REWRITES: dict[str, Rewrite] = {
    "rope": rope_on_all_tokens,
    "joint": join_text_and_video,
    "layer_norm": lean_layer_norms,
    "frames": frames_in_place,
    "upsample": convolve_before_upsampling,
}
"""By name, in the order in which they are applied."""


def rewrite(model: ir.Model, names: Collection[str] | None = None) -> dict[str, int]:
    """Apply rewrites to a graph, in place: those of `names`, or all; return in how many places each applied."""
    unknown = set(names or ()) - set(REWRITES)
    if unknown:
        raise ValueError(f"there is no rewrite {', '.join(sorted(unknown))}; there are {', '.join(REWRITES)}")
    return {name: apply(model) for name, apply in REWRITES.items() if names is None or name in names}
