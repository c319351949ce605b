"""Checkpoint in, ONNX out: the only code that imports torch, diffusers, transformers or optimum."""

import logging

# What they say when they are imported is about parts that are not used here: kernels for GPUs, pickled checkpoints.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)
