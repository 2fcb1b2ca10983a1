"""Defenses: configurations whose ``repair`` takes a victim and the data it needs, and returns a `Repair`."""

from backdoor_jax.defenses.anp import ANP, fit_masks, oracle_threshold, prune_by_mask
from backdoor_jax.defenses.base import Defense, GradientDefense, Repair, SGDDefense
from backdoor_jax.defenses.bounds import BoundConfig, bound_activations
from backdoor_jax.defenses.clp import CLP
from backdoor_jax.defenses.d3 import D3
from backdoor_jax.defenses.dbd import DBD
from backdoor_jax.defenses.fine_pruning import FinePruning, prune_dormant
from backdoor_jax.defenses.finetune import FineTune
from backdoor_jax.defenses.fst import FST
from backdoor_jax.defenses.ft_sam import FTSAM
from backdoor_jax.defenses.i_bau import IBAU
from backdoor_jax.defenses.midway import Midway
from backdoor_jax.defenses.mm_bm import MMBM
from backdoor_jax.defenses.nad import NAD
from backdoor_jax.defenses.pad_ft import PAD, PADFT, purify, tune_classifier
from backdoor_jax.defenses.sau import SAU
from backdoor_jax.defenses.super_finetune import SuperFineTune
from backdoor_jax.defenses.tac import TAC
from backdoor_jax.defenses.tac_scan import Outlier, Scan, scan, smallest_outlier
from backdoor_jax.errors import UserError

DEFENSES: dict[str, type[Defense]] = {
    defense.name: defense
    for defense in (
        Midway,
        FineTune,
        SuperFineTune,
        D3,
        FST,
        FTSAM,
        NAD,
        IBAU,
        SAU,
        PAD,
        PADFT,
        TAC,
        CLP,
        FinePruning,
        ANP,
        MMBM,
        DBD,
    )
}
"""The defenses by the names that configurations use."""

AUTO = "auto"
"""Another name for the default repair, whichever that is."""
DEFAULT: type[Defense] = Midway
"""The default repair."""


def find_defense(name: str) -> type[Defense]:
    """The defense of a name; ``auto`` is the default repair.

    Raises:
        UserError: for an unknown name.

    Example:
        >>> find_defense("auto").name
        'midway'
    """
    if name == AUTO:
        return DEFAULT
    if name not in DEFENSES:
        raise UserError(f"unknown defense {name!r}; known are {AUTO}, {', '.join(DEFENSES)}")
    return DEFENSES[name]


__all__ = [
    "ANP",
    "AUTO",
    "CLP",
    "D3",
    "DBD",
    "DEFAULT",
    "DEFENSES",
    "FST",
    "FTSAM",
    "IBAU",
    "MMBM",
    "NAD",
    "PAD",
    "PADFT",
    "SAU",
    "TAC",
    "BoundConfig",
    "Defense",
    "FinePruning",
    "FineTune",
    "GradientDefense",
    "Midway",
    "Outlier",
    "Repair",
    "SGDDefense",
    "Scan",
    "SuperFineTune",
    "bound_activations",
    "find_defense",
    "fit_masks",
    "oracle_threshold",
    "prune_by_mask",
    "prune_dormant",
    "purify",
    "scan",
    "smallest_outlier",
    "tune_classifier",
]
