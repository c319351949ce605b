"""The T5 encoder: token ids in, prompt embeddings out."""

from typing import Any

import torch
from numpy.typing import NDArray
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention, T5DenseGatedActDense

from cvx_deploy.bundle.schema import TensorSpec
from cvx_deploy.exporters.tracing.contract import NetworkContract, as_numpy
from cvx_deploy.exporters.tracing.repeat import Blocks
from cvx_deploy.precision import Precision


class TextEncoder(torch.nn.Module):
    """T5 as the CogVideoX pipelines call it: no attention mask, so padding attends and is attended to.

    The buckets of the relative position bias are a table rather than a graph of logarithms, whose rounding could put a
    distance in the next bucket on another engine.
    """

    buckets: torch.Tensor

    def __init__(self, config: T5Config, text_length: int) -> None:
        super().__init__()
        self.encoder = T5EncoderModel(config)
        self.register_buffer("buckets", torch.zeros(text_length, text_length, dtype=torch.int64), persistent=False)
        attention: T5Attention = self.encoder.get_submodule("encoder.block.0.layer.0.SelfAttention")  # type: ignore[assignment]
        attention.compute_bias = lambda *_, **__: self._position_bias(attention)  # type: ignore[method-assign]

    def _position_bias(self, attention: T5Attention) -> torch.Tensor:
        bias: torch.Tensor = attention.relative_attention_bias(self.buckets)
        return bias.permute(2, 0, 1).unsqueeze(0)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Encode ``input_ids (B, S)`` to ``prompt_embeds (B, S, D)`` in float32."""
        output: torch.Tensor = self.encoder(input_ids)[0]
        return output.float()


class TextEncoderContract(NetworkContract):
    """Contract of the text encoder."""

    name = "text_encoder"
    component = "text_encoder"

    def __init__(self, config: dict[str, Any], precision: Precision, text_length: int) -> None:
        super().__init__(config, precision)
        self.text_length = text_length
        self.t5 = T5Config(**{key: value for key, value in config.items() if not key.startswith("_")})
        self.t5._attn_implementation = "eager"  # the SDPA path does not export
        self.max_int = self.t5.vocab_size

    @property
    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Token ids, padded to the text length."""
        return (TensorSpec("input_ids", "int64", ("batch", self.text_length), "BS"),)

    @property
    def output_specs(self) -> tuple[TensorSpec, ...]:
        """Prompt embeddings."""
        return (TensorSpec("prompt_embeds", "float32", ("batch", self.text_length, self.t5.d_model), "BSD"),)

    @property
    def blocks(self) -> Blocks:
        """T5's layers."""
        return Blocks("encoder.encoder.block", int(self.config["num_layers"]))

    def build(self) -> torch.nn.Module:
        """Return T5; in float16 its ``wo`` is float32, since T5's feed-forward overflows there."""
        self.t5.num_layers = self.blocks.traced
        module = TextEncoder(self.t5, self.text_length)
        if self.precision == "fp16":
            for layer in module.modules():
                if isinstance(layer, T5DenseGatedActDense):
                    layer.wo = torch.nn.Linear(self.t5.d_ff, self.t5.d_model, bias=False, dtype=torch.float32)
        return module

    def constants(self) -> dict[str, NDArray[Any]]:
        """Return the relative position buckets ``(S, S)``."""
        position = torch.arange(self.text_length)
        buckets = T5Attention._relative_position_bucket(  # type: ignore[no-untyped-call]
            position[None, :] - position[:, None],
            bidirectional=True,
            num_buckets=self.t5.relative_attention_num_buckets,
            max_distance=self.t5.relative_attention_max_distance,
        )
        return {"buckets": as_numpy(buckets)}

    def weight_names(self, parameter: str) -> tuple[str, ...]:
        """Return the checkpoint's names; the token embedding is stored once, under either of two."""
        name = parameter.removeprefix("encoder.")
        if name in ("shared.weight", "encoder.embed_tokens.weight"):
            return ("shared.weight", "encoder.embed_tokens.weight")
        return (name,)
