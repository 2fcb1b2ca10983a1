"""Defences: each takes a victim and what data it needs, and gives back a `Repair`."""

from backdoor_jax.defenses import anp as _anp
from backdoor_jax.defenses import clp as _clp
from backdoor_jax.defenses import d3 as _d3
from backdoor_jax.defenses import dbd as _dbd
from backdoor_jax.defenses import fine_pruning as _fine_pruning
from backdoor_jax.defenses import finetune as _finetune
from backdoor_jax.defenses import fst as _fst
from backdoor_jax.defenses import ft_sam as _ft_sam
from backdoor_jax.defenses import i_bau as _i_bau
from backdoor_jax.defenses import mm_bm as _mm_bm
from backdoor_jax.defenses import nad as _nad
from backdoor_jax.defenses import pad_ft as _pad_ft
from backdoor_jax.defenses import sau as _sau
from backdoor_jax.defenses import super_finetune as _super_finetune
from backdoor_jax.defenses import tac as _tac
from backdoor_jax.defenses.anp import AnpConfig, anp, learn_masks, oracle_threshold, prune_by_mask
from backdoor_jax.defenses.base import Defense, Repair, StepsConfig, TuneConfig
from backdoor_jax.defenses.bounds import BoundConfig, bound_activations
from backdoor_jax.defenses.clp import ClpConfig, clp
from backdoor_jax.defenses.d3 import D3Config, d3
from backdoor_jax.defenses.dbd import DbdConfig, dbd
from backdoor_jax.defenses.fine_pruning import FinePruningConfig, fine_pruning, prune_dormant
from backdoor_jax.defenses.finetune import FineTuneConfig, finetune
from backdoor_jax.defenses.fst import FstConfig, fst
from backdoor_jax.defenses.ft_sam import FtSamConfig, ft_sam
from backdoor_jax.defenses.i_bau import IBauConfig, i_bau
from backdoor_jax.defenses.mm_bm import MmBmConfig, mm_bm
from backdoor_jax.defenses.nad import NadConfig, nad
from backdoor_jax.defenses.pad_ft import PadConfig, PadFtConfig, pad, pad_ft, purify, tune_classifier
from backdoor_jax.defenses.sau import SauConfig, sau
from backdoor_jax.defenses.super_finetune import SuperFineTuneConfig, super_finetune
from backdoor_jax.defenses.tac import Outlier, Scan, TacConfig, scan, smallest_outlier, tac

DEFENSES: dict[str, Defense] = {
    "finetune": _finetune.DEFENSE,
    "super_finetune": _super_finetune.DEFENSE,
    "d3": _d3.DEFENSE,
    "fst": _fst.DEFENSE,
    "ft_sam": _ft_sam.DEFENSE,
    "nad": _nad.DEFENSE,
    "i_bau": _i_bau.DEFENSE,
    "sau": _sau.DEFENSE,
    "pad": _pad_ft.PAD,
    "pad_ft": _pad_ft.PAD_FT,
    "tac": _tac.DEFENSE,
    "clp": _clp.DEFENSE,
    "fine_pruning": _fine_pruning.DEFENSE,
    "anp": _anp.DEFENSE,
    "mm_bm": _mm_bm.DEFENSE,
    "dbd": _dbd.DEFENSE,
}
"""The defences by the names that configurations use."""

__all__ = [
    "DEFENSES",
    "AnpConfig",
    "BoundConfig",
    "ClpConfig",
    "D3Config",
    "DbdConfig",
    "Defense",
    "FinePruningConfig",
    "FineTuneConfig",
    "FstConfig",
    "FtSamConfig",
    "IBauConfig",
    "MmBmConfig",
    "NadConfig",
    "Outlier",
    "PadConfig",
    "PadFtConfig",
    "Repair",
    "SauConfig",
    "Scan",
    "StepsConfig",
    "SuperFineTuneConfig",
    "TacConfig",
    "TuneConfig",
    "anp",
    "bound_activations",
    "clp",
    "d3",
    "dbd",
    "fine_pruning",
    "finetune",
    "fst",
    "ft_sam",
    "i_bau",
    "learn_masks",
    "mm_bm",
    "nad",
    "oracle_threshold",
    "pad",
    "pad_ft",
    "prune_by_mask",
    "prune_dormant",
    "purify",
    "sau",
    "scan",
    "smallest_outlier",
    "super_finetune",
    "tac",
    "tune_classifier",
]
