"""Embeddings -> answers: stored embeddings, the gallery, calibration of the unknown threshold."""

from embedlab._lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(["Gallery", "Identification", "Verification", "CheckReport"], ".gallery"),
        **dict.fromkeys(["Calibration", "CalibrationError", "calibrate_threshold"], ".calibration"),
        **dict.fromkeys(["CallableEmbedder", "Embedder", "as_embedder"], ".embedders"),
        **dict.fromkeys(["GalleryDamaged", "GalleryError", "GalleryLocked"], ".store"),
        **dict.fromkeys(["read_embeddings", "read_protocol", "read_vectors", "write_embeddings"], ".embeddings"),
    },
)
