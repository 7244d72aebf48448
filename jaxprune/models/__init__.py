"""Networks in Flax NNX whose widths are data: residual ones, networks for phones, transformers.

`pretrained` has networks with weights; it needs the extra of that name.
"""

from jaxprune.models._blocks import LayerWidths
from jaxprune.models.decoder import (
    Decoder,
    DecoderWidths,
    decoder_124m,
    decoder_mini,
)
from jaxprune.models.encoder import Encoder
from jaxprune.models.mbconv import MBBlock, MBConv, mbconv
from jaxprune.models.mobilenet import MobileNet, efficientnet_lite0, mobilenet_v1, mobilenet_v2
from jaxprune.models.resnet import (
    ResNet,
    Widths,
    default_widths,
    resnet8,
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet50,
    resnet56,
    resnet101,
    resnet110,
)
from jaxprune.models.vit import ViT, vit_b16, vit_s16, vit_ti16
from jaxprune.models.widths import layers_of, widths_of

__all__ = [
    "Decoder",
    "DecoderWidths",
    "Encoder",
    "LayerWidths",
    "MBBlock",
    "MBConv",
    "MobileNet",
    "ResNet",
    "ViT",
    "Widths",
    "decoder_124m",
    "decoder_mini",
    "default_widths",
    "efficientnet_lite0",
    "layers_of",
    "mbconv",
    "mobilenet_v1",
    "mobilenet_v2",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "vit_b16",
    "vit_s16",
    "vit_ti16",
    "widths_of",
]
