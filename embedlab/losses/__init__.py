"""Losses: nn.Modules that see tensors only, never a model or a batch record."""

from embedlab.losses.focal import BinaryFocalLoss as BinaryFocalLoss
from embedlab.losses.focal import FocalLoss as FocalLoss
from embedlab.losses.pairs import ContrastiveLoss as ContrastiveLoss
from embedlab.losses.pairs import NTXentLoss as NTXentLoss
from embedlab.losses.pairs import SupConLoss as SupConLoss
from embedlab.losses.pairs import TripletLoss as TripletLoss
