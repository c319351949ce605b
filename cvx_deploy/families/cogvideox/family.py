"""CogVideoX as the rest of the program sees it."""

from typing import Final

from cvx_deploy.families.cogvideox.architecture import Architecture
from cvx_deploy.families.cogvideox.layers import quantizable, sensitive_places
from cvx_deploy.families.cogvideox.models import MODELS
from cvx_deploy.families.cogvideox.vae import DECODER, Grid, check_tiles, encoder, planes
from cvx_deploy.families.expectation import Expectation
from cvx_deploy.families.family import Family, Layers, VaeCut

COGVIDEOX: Final = Family(
    name="cogvideox",
    models=MODELS,
    pipelines={
        "CogVideoXPipeline": "text-to-video",
        "CogVideoXImageToVideoPipeline": "image-to-video",
        "CogVideoXVideoToVideoPipeline": "text-to-video",
    },
    architecture=Architecture.of_model,
    expectations={
        "transformer": Expectation("fused"),
        "modulation": Expectation("none"),
        # T5 adds a bias by relative position and a mask to the scores, which TensorRT does not fuse; at 226 tokens,
        # once a video, they are small. Its feed-forward output overflows float16: transformers keeps it in float32.
        "text": Expectation("in pieces", float32=("DenseReluDense.wo/",)),
        # The VAE has convolutions and group norms only.
        "vae": Expectation("none"),
    },
    vae=VaeCut(encoder, DECODER, Grid.of, planes, check_tiles),
    layers=Layers(quantizable, sensitive_places),
)
