"""Methods: LightningModules, one file each, that read like their papers."""

from embedlab.methods.barlow_twins import BarlowTwins as BarlowTwins
from embedlab.methods.base import Method as Method
from embedlab.methods.base import NonFiniteLossError as NonFiniteLossError
from embedlab.methods.byol import BYOL as BYOL
from embedlab.methods.dino import DINO as DINO
from embedlab.methods.dino import DINOHead as DINOHead
from embedlab.methods.metric_learning import MetricLearning as MetricLearning
from embedlab.methods.moco import MoCoV2 as MoCoV2
from embedlab.methods.moco import MoCoV3 as MoCoV3
from embedlab.methods.nnclr import NNCLR as NNCLR
from embedlab.methods.optimizers import LARS as LARS
from embedlab.methods.simclr import SimCLR as SimCLR
from embedlab.methods.simsiam import SimSiam as SimSiam
from embedlab.methods.swav import SwAV as SwAV
from embedlab.methods.vicreg import VICReg as VICReg
