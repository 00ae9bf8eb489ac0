"""Images and manifests on disk to batches: read, split, sample, augment. Names load on first use."""

from typing import TYPE_CHECKING

from embedlab._lazy import lazy_names

if TYPE_CHECKING:
    from embedlab.data.degradations import DEGRADATIONS as DEGRADATIONS
    from embedlab.data.degradations import Degrade as Degrade
    from embedlab.data.degradations import degrade as degrade
    from embedlab.data.glyphs import Glyphs as Glyphs
    from embedlab.data.glyphs import GlyphSplit as GlyphSplit
    from embedlab.data.glyphs import render_glyphs as render_glyphs
    from embedlab.data.glyphs import split_glyphs as split_glyphs
    from embedlab.data.images import ImageError as ImageError
    from embedlab.data.images import fit_image as fit_image
    from embedlab.data.images import read_image as read_image
    from embedlab.data.images import read_images as read_images
    from embedlab.data.module import ImageData as ImageData
    from embedlab.data.samplers import BalancedBatches as BalancedBatches
    from embedlab.data.samplers import ShuffledBatches as ShuffledBatches
    from embedlab.data.sources import Source as Source
    from embedlab.data.sources import class_numbers as class_numbers
    from embedlab.data.sources import open_source as open_source
    from embedlab.data.splits import folds_by_class as folds_by_class
    from embedlab.data.splits import read_split as read_split
    from embedlab.data.splits import split_by_class as split_by_class
    from embedlab.data.splits import split_by_group as split_by_group
    from embedlab.data.splits import split_by_sample as split_by_sample
    from embedlab.data.splits import write_split as write_split
    from embedlab.data.views import FixedViews as FixedViews
    from embedlab.data.views import Mix as Mix
    from embedlab.data.views import Views as Views

__getattr__ = lazy_names(
    __name__,
    {
        ".degradations": ["DEGRADATIONS", "Degrade", "degrade"],
        ".glyphs": ["GlyphSplit", "Glyphs", "render_glyphs", "split_glyphs"],
        ".images": ["ImageError", "fit_image", "read_image", "read_images"],
        ".module": ["ImageData"],
        ".samplers": ["BalancedBatches", "ShuffledBatches"],
        ".sources": ["Source", "class_numbers", "open_source"],
        ".splits": [
            "folds_by_class",
            "read_split",
            "split_by_class",
            "split_by_group",
            "split_by_sample",
            "write_split",
        ],
        ".views": ["FixedViews", "Mix", "Views"],
    },
)
