"""An eager network whose blocks have their weights only while they run, so that any size fits into a few GB.

The blocks of the 5B's transformer take 0.27 GB each in bfloat16, those of T5-XXL 0.4 GB. A block's weights are read
when it begins, in the type asked for, and let go of when it ends; what stands outside the blocks stays.
"""

from typing import Any

import torch

from cvx_deploy.exporters.reference.eager import bare_network, eager_weights
from cvx_deploy.exporters.sources.checkpoint import Checkpoint

_BLOCKS = {"transformer": "transformer_blocks", "text_encoder": "encoder.block"}


def streamed_network(checkpoint: Checkpoint, component: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Return diffusers' or transformers' network of a component, its blocks' weights still in the checkpoint.

    Args:
        checkpoint: Whose weights it has.
        component: transformer or text_encoder.
        dtype: What it computes in.
        device: Where.
    """
    network = bare_network(checkpoint, component)
    names = set(network.state_dict())

    def load(module: torch.nn.Module, prefix: str, wanted: set[str]) -> None:
        weights = eager_weights(checkpoint, component, dtype, wanted)
        state = {name.removeprefix(prefix): weight.to(device) for name, weight in weights}
        module.load_state_dict(state, strict=False, assign=True)
        module.requires_grad_(False)

    path = _BLOCKS[component]
    load(network, "", {name for name in names if not name.startswith(f"{path}.")})
    for index, block in enumerate(network.get_submodule(path)):
        prefix = f"{path}.{index}."
        own = {name for name in names if name.startswith(prefix)}
        block.register_forward_pre_hook(lambda module, *_, prefix=prefix, own=own: load(module, prefix, own))
        block.register_forward_hook(lambda module, *_: (module.to("meta"), None)[1])
    return network.eval()
