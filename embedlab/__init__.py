"""embedlab: train an embedding, build a gallery, name what you see, and move the backbone on to your own task.

The rooms, in the order in which data flows; a room imports only rooms above it:

    data        disk -> Batch: images, manifests, splits, samplers, views
    encoders    image -> feature -> embedding: backbones, heads, Encoder (save, load, embed)
    losses      tensors -> scalar
    methods     LightningModules: metric learning, SimCLR
    metrics     arrays -> floats, pure functions
    retrieval   embeddings -> answers: stored embeddings, gallery, calibration
    serving     answers -> people: pictures
    tasks       backbone -> fine-tuned model
"""

from embedlab._lazy import lazy_names

__version__ = "0.1.0"

__getattr__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(["data", "encoders", "losses", "methods", "metrics", "retrieval", "serving", "tasks"], ""),
        "Batch": "._types",
        "Embeddings": "._types",
        "Neighbours": "._types",
        "Encoder": ".encoders",
        "Gallery": ".retrieval",
    },
)
