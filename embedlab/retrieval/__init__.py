"""Embeddings -> answers: stored embeddings, the gallery, its calibration. Names load on first use."""

from typing import TYPE_CHECKING

from embedlab._lazy import lazy_names

if TYPE_CHECKING:
    from embedlab.retrieval.answers import CheckReport as CheckReport
    from embedlab.retrieval.answers import Identification as Identification
    from embedlab.retrieval.answers import Verification as Verification
    from embedlab.retrieval.calibration import Calibration as Calibration
    from embedlab.retrieval.calibration import CalibrationError as CalibrationError
    from embedlab.retrieval.calibration import calibrate_threshold as calibrate_threshold
    from embedlab.retrieval.embedders import CallableEmbedder as CallableEmbedder
    from embedlab.retrieval.embedders import Embedder as Embedder
    from embedlab.retrieval.embedders import OnnxEmbedder as OnnxEmbedder
    from embedlab.retrieval.embeddings import read_embeddings as read_embeddings
    from embedlab.retrieval.embeddings import read_protocol as read_protocol
    from embedlab.retrieval.embeddings import read_vectors as read_vectors
    from embedlab.retrieval.embeddings import write_embeddings as write_embeddings
    from embedlab.retrieval.gallery import Gallery as Gallery
    from embedlab.retrieval.migration import Migration as Migration
    from embedlab.retrieval.migration import Recalibration as Recalibration
    from embedlab.retrieval.migration import migrate as migrate
    from embedlab.retrieval.open_set import OpenSetReport as OpenSetReport
    from embedlab.retrieval.open_set import evaluate_gallery as evaluate_gallery
    from embedlab.retrieval.store import GalleryDamaged as GalleryDamaged
    from embedlab.retrieval.store import GalleryError as GalleryError
    from embedlab.retrieval.store import GalleryLocked as GalleryLocked

__getattr__ = lazy_names(
    __name__,
    {
        ".answers": ["CheckReport", "Identification", "Verification"],
        ".calibration": ["Calibration", "CalibrationError", "calibrate_threshold"],
        ".embedders": ["CallableEmbedder", "Embedder", "OnnxEmbedder"],
        ".embeddings": ["read_embeddings", "read_protocol", "read_vectors", "write_embeddings"],
        ".gallery": ["Gallery"],
        ".migration": ["Migration", "Recalibration", "migrate"],
        ".open_set": ["OpenSetReport", "evaluate_gallery"],
        ".store": ["GalleryDamaged", "GalleryError", "GalleryLocked"],
    },
)
