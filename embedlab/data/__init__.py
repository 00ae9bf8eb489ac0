"""Images and manifests on disk to batches: read, split, sample, augment. Names load on first use."""

from embedlab._lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "ImageError": ".images",
        "fit_image": ".images",
        "read_image": ".images",
        "read_images": ".images",
        "Source": ".sources",
        "class_numbers": ".sources",
        "open_source": ".sources",
        "read_split": ".splits",
        "write_split": ".splits",
        "split_by_class": ".splits",
        "split_by_group": ".splits",
        "split_by_sample": ".splits",
        "ImageData": ".module",
        "BalancedBatches": ".samplers",
        "ShuffledBatches": ".samplers",
        "Views": ".views",
    },
)
