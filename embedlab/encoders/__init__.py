"""Backbones, heads, and the Encoder that joins, saves and applies them."""

from embedlab.encoders.backbones import Pixels as Pixels
from embedlab.encoders.backbones import ResNet as ResNet
from embedlab.encoders.backbones import TimmBackbone as TimmBackbone
from embedlab.encoders.capacity import Capacity as Capacity
from embedlab.encoders.capacity import measure_capacity as measure_capacity
from embedlab.encoders.encoder import Encoder as Encoder
from embedlab.encoders.encoder import EncoderError as EncoderError
from embedlab.encoders.heads import CosineHead as CosineHead
from embedlab.encoders.heads import LinearHead as LinearHead
from embedlab.encoders.heads import MLPHead as MLPHead
from embedlab.encoders.heads import connect as connect
from embedlab.encoders.whitening import Whitening as Whitening
