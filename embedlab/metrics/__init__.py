"""Metrics: arrays in (NumPy or torch), Python floats or arrays out; pure functions without torch.

retrieval       recall_at_k, precision_at_k, r_precision, map_at_r, mean_average_precision, mean_reciprocal_rank,
                ndcg_at_k, cmc, knn_accuracy, knn_hits, and several in one pass: retrieval_report; the neighbours
                themselves: nearest_neighbours
verification    roc_auc, eer, tar_at_far, average_precision, roc_curve, det_curve, best_accuracy;
                over all pairs of a set: verification_report
open set        fpir_fnir, open_set_curve, detection_identification_rate, unknown_auroc, oscr, leave_identity_out
classification  classification_report, multilabel_report, confusion_matrix, multilabel_confusion_matrix,
                calibration_error, best_threshold;
                in a hierarchy of classes: hierarchical_report, hierarchical_distance
segmentation    pixel_accuracy, mean_pixel_accuracy, mean_iou, dice, ods, ois
clustering      clustering_report by k-means, normalized_mutual_information, adjusted_rand_index
linear probe    linear_probe_accuracy, fit_linear_probe
health          feature_std, effective_rank, alignment, uniformity, hubness (no labels needed)
intervals       bootstrap_interval over identities, bootstrap_statistic of any figure, paired_interval of two encoders,
                wilson_interval, told_interval which claims no certainty; of verification: draw_pairs,
                verification_resamples
several ranks   each_sample_once
"""

from embedlab.metrics.classification import (
    best_threshold,
    calibration_error,
    classification_report,
    confusion_matrix,
    multilabel_confusion_matrix,
    multilabel_report,
)
from embedlab.metrics.clustering import adjusted_rand_index, clustering_report, normalized_mutual_information
from embedlab.metrics.health import alignment, effective_rank, feature_std, hubness, uniformity
from embedlab.metrics.hierarchy import hierarchical_distance, hierarchical_report
from embedlab.metrics.intervals import (
    bootstrap_interval,
    bootstrap_intervals,
    bootstrap_statistic,
    paired_interval,
    told_interval,
    wilson_interval,
)
from embedlab.metrics.open_set import (
    detection_identification_rate,
    fpir_fnir,
    leave_identity_out,
    open_set_curve,
    oscr,
    unknown_auroc,
)
from embedlab.metrics.pair_sample import PairSample, draw_pairs, verification_resamples
from embedlab.metrics.probes import LinearProbe, fit_linear_probe, linear_probe_accuracy
from embedlab.metrics.ranks import each_sample_once
from embedlab.metrics.retrieval import (
    RetrievalReport,
    cmc,
    knn_accuracy,
    knn_hits,
    map_at_r,
    mean_average_precision,
    mean_reciprocal_rank,
    ndcg_at_k,
    nearest_neighbours,
    precision_at_k,
    r_precision,
    recall_at_k,
    retrieval_report,
)
from embedlab.metrics.segmentation import dice, mean_iou, mean_pixel_accuracy, ods, ois, pixel_accuracy
from embedlab.metrics.verification import (
    VerificationCurve,
    VerificationReport,
    average_precision,
    best_accuracy,
    det_curve,
    eer,
    roc_auc,
    roc_curve,
    tar_at_far,
    verification_report,
)

__all__ = [
    "LinearProbe",
    "PairSample",
    "RetrievalReport",
    "VerificationCurve",
    "VerificationReport",
    "adjusted_rand_index",
    "alignment",
    "average_precision",
    "best_accuracy",
    "best_threshold",
    "bootstrap_interval",
    "bootstrap_intervals",
    "bootstrap_statistic",
    "calibration_error",
    "classification_report",
    "clustering_report",
    "cmc",
    "confusion_matrix",
    "det_curve",
    "detection_identification_rate",
    "dice",
    "draw_pairs",
    "each_sample_once",
    "eer",
    "effective_rank",
    "feature_std",
    "fit_linear_probe",
    "fpir_fnir",
    "hierarchical_distance",
    "hierarchical_report",
    "hubness",
    "knn_accuracy",
    "knn_hits",
    "leave_identity_out",
    "linear_probe_accuracy",
    "map_at_r",
    "mean_average_precision",
    "mean_iou",
    "mean_pixel_accuracy",
    "mean_reciprocal_rank",
    "multilabel_confusion_matrix",
    "multilabel_report",
    "ndcg_at_k",
    "nearest_neighbours",
    "normalized_mutual_information",
    "ods",
    "ois",
    "open_set_curve",
    "oscr",
    "paired_interval",
    "pixel_accuracy",
    "precision_at_k",
    "r_precision",
    "recall_at_k",
    "retrieval_report",
    "roc_auc",
    "roc_curve",
    "tar_at_far",
    "told_interval",
    "uniformity",
    "unknown_auroc",
    "verification_report",
    "verification_resamples",
    "wilson_interval",
]
