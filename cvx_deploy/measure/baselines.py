"""What engines are measured against."""

from typing import Literal, get_args

Baseline = Literal["eager", "compile", "int8", "fp8"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)

IN_WORDS: dict[str, str] = {
    "eager": "diffusers, all networks kept in memory",
    "compile": "diffusers, the transformer through torch.compile",
    "int8": "as compile, linear layers and their inputs in int8 by torchao",
    "fp8": "as compile, linear layers and their inputs in fp8 by torchao",
}
