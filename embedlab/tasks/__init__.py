"""Downstream tasks: a backbone becomes a fine-tuned model."""

from embedlab.tasks.classification import Classification as Classification
from embedlab.tasks.finetune import finetune as finetune
from embedlab.tasks.protocols import evaluate_backbone as evaluate_backbone
