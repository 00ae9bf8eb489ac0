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

from typing import TYPE_CHECKING

from embedlab._lazy import lazy_names

if TYPE_CHECKING:
    from embedlab import data as data
    from embedlab import encoders as encoders
    from embedlab import losses as losses
    from embedlab import methods as methods
    from embedlab import metrics as metrics
    from embedlab import retrieval as retrieval
    from embedlab import serving as serving
    from embedlab import tasks as tasks
    from embedlab._types import Batch as Batch
    from embedlab._types import Embeddings as Embeddings
    from embedlab._types import Neighbours as Neighbours
    from embedlab.encoders import Encoder as Encoder
    from embedlab.retrieval import Gallery as Gallery

__version__ = "0.1.0"

__getattr__ = lazy_names(
    __name__,
    {
        "": ["data", "encoders", "losses", "methods", "metrics", "retrieval", "serving", "tasks"],
        "._types": ["Batch", "Embeddings", "Neighbours"],
        ".encoders": ["Encoder"],
        ".retrieval": ["Gallery"],
    },
)
