"""The operators of ONNX Runtime that ONNX does not have."""

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from onnx import ModelProto

DOMAIN: Final = "com.microsoft"


def allow_contrib(model: "ModelProto") -> None:
    """Let a graph use them."""
    from onnx import helper

    if all(opset.domain != DOMAIN for opset in model.opset_import):
        model.opset_import.append(helper.make_operatorsetid(DOMAIN, 1))
