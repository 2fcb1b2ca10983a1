"""Scan or repair a model in a file, given some labeled images: the work of ``backdoor-jax scan`` and ``defend``.

Example::

    suspect = load_suspect(ModelFile(Path("model.pt"), "resnet18"), "clean.npz")
    print(scan_model(suspect, Path("scan.png")).verdict)
    repair_model(suspect, D3(), Path("repaired.pt")).accuracy
"""

from backdoor_jax.app.loading import (
    Images,
    ModelFile,
    Suspect,
    load_suspect,
    load_unseen,
    require_better_than_chance,
)
from backdoor_jax.app.outputs import marked, repaired_path
from backdoor_jax.app.repairing import (
    MAX_DROP,
    RepairResult,
    change_line,
    loading_line,
    repair_model,
    require_repairable,
)
from backdoor_jax.app.scanning import Listing, ScanResult, list_suspicious, scan_model

__all__ = [
    "MAX_DROP",
    "Images",
    "Listing",
    "ModelFile",
    "RepairResult",
    "ScanResult",
    "Suspect",
    "change_line",
    "list_suspicious",
    "load_suspect",
    "load_unseen",
    "loading_line",
    "marked",
    "repair_model",
    "repaired_path",
    "require_better_than_chance",
    "require_repairable",
    "scan_model",
]
