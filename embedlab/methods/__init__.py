"""Methods: LightningModules, one file each, that read like their papers."""

from embedlab.methods.base import Method as Method
from embedlab.methods.base import NonFiniteLossError as NonFiniteLossError
from embedlab.methods.metric_learning import MetricLearning as MetricLearning
from embedlab.methods.simclr import SimCLR as SimCLR
