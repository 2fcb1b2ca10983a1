"""Data on the device: `Dataset`, its sources, augmentation and poisoning."""

from backdoor_jax.data.augment import Augment, random_crop, random_flip
from backdoor_jax.data.dataset import Dataset, Task, clean_indices, make_dataset
from backdoor_jax.data.labelled import Labelled, load_labelled
from backdoor_jax.data.poisoning import LabelMap, Poisoned, Trigger, draw_poisoned, poison, poison_count
from backdoor_jax.data.sources import SOURCES, digits, load_task, npz_task
from backdoor_jax.data.tfds_sets import TFDS_SETS, tfds_task
from backdoor_jax.data.warp import bilinear_sample, pixel_grid, rotate

__all__ = [
    "SOURCES",
    "TFDS_SETS",
    "Augment",
    "Dataset",
    "LabelMap",
    "Labelled",
    "Poisoned",
    "Task",
    "Trigger",
    "bilinear_sample",
    "clean_indices",
    "digits",
    "draw_poisoned",
    "load_labelled",
    "load_task",
    "make_dataset",
    "npz_task",
    "pixel_grid",
    "poison",
    "poison_count",
    "random_crop",
    "random_flip",
    "rotate",
    "tfds_task",
]
