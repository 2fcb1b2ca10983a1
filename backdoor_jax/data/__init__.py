"""Data on the device: `Dataset`, the records of the data sets and `load`, augmentation and poisoning."""

from backdoor_jax.data.augment import Augment, random_crop, random_flip
from backdoor_jax.data.dataset import (
    Dataset,
    DatasetSpec,
    Normalization,
    Splits,
    Task,
    clean_indices,
    make_dataset,
)
from backdoor_jax.data.labeled import Labeled, image_size, in_order, load_labeled, names_classes
from backdoor_jax.data.loading import digits, load, npz_task, signs
from backdoor_jax.data.poisoning import (
    LabelMap,
    Poisoned,
    Trigger,
    apply_trigger,
    draw_poisoned,
    is_plain,
    poison,
    poison_count,
    triggered,
)
from backdoor_jax.data.specs import DATASETS, SOURCES
from backdoor_jax.data.tfds_sets import TFDSSet
from backdoor_jax.data.warp import bilinear_sample, pixel_grid, rotate

__all__ = [
    "DATASETS",
    "SOURCES",
    "Augment",
    "Dataset",
    "DatasetSpec",
    "LabelMap",
    "Labeled",
    "Normalization",
    "Poisoned",
    "Splits",
    "TFDSSet",
    "Task",
    "Trigger",
    "apply_trigger",
    "bilinear_sample",
    "clean_indices",
    "digits",
    "draw_poisoned",
    "image_size",
    "in_order",
    "is_plain",
    "load",
    "load_labeled",
    "make_dataset",
    "names_classes",
    "npz_task",
    "pixel_grid",
    "poison",
    "poison_count",
    "random_crop",
    "random_flip",
    "rotate",
    "signs",
    "triggered",
]
