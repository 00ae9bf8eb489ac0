"""Metrics: arrays in (NumPy or torch), Python floats or arrays out; pure functions without torch.

retrieval       recall_at_k, precision_at_k, r_precision, map_at_r, mean_average_precision, knn_accuracy,
                and several in one pass: retrieval_report
verification    roc_auc, eer, tar_at_far, average_precision
open set        fpir_fnir, detection_identification_rate
classification  classification_report, confusion_matrix
intervals       bootstrap_interval over identities, wilson_interval
"""

from embedlab.metrics.classification import classification_report, confusion_matrix
from embedlab.metrics.intervals import bootstrap_interval, wilson_interval
from embedlab.metrics.open_set import detection_identification_rate, fpir_fnir
from embedlab.metrics.retrieval import (
    RetrievalReport,
    knn_accuracy,
    map_at_r,
    mean_average_precision,
    precision_at_k,
    r_precision,
    recall_at_k,
    retrieval_report,
)
from embedlab.metrics.verification import average_precision, eer, roc_auc, tar_at_far

__all__ = [
    "RetrievalReport",
    "average_precision",
    "bootstrap_interval",
    "classification_report",
    "confusion_matrix",
    "detection_identification_rate",
    "eer",
    "fpir_fnir",
    "knn_accuracy",
    "map_at_r",
    "mean_average_precision",
    "precision_at_k",
    "r_precision",
    "recall_at_k",
    "retrieval_report",
    "roc_auc",
    "tar_at_far",
    "wilson_interval",
]
