"""Turns a folder of packed image sets (with the `unpack.py` that reads them) into plain `.npz` files for experiments.

    python benchmarks/prepare_data.py --source FOLDER --out data/

Writes `gtsrb_half.npz`, `cifar10.npz` and `cifar100_subset.npz`, each with train_images, train_labels, test_images,
test_labels, class_names, normalization and flip. The images are other people's: keep them out of the repository.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np

from backdoor_jax.files import atomic_write

KEYS = ("train_images", "train_labels", "test_images", "test_labels", "class_names")
SETS = {
    "gtsrb_half": ("gtsrb", False),
    "cifar10": ("cifar10", True),
    "cifar100_subset": ("cifar100", False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with the packed files and unpack.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the plain files")
    parser.add_argument("--only", choices=sorted(SETS), nargs="*", default=sorted(SETS), help="which sets")
    arguments = parser.parse_args()

    reader = arguments.source / "unpack.py"
    if not reader.is_file():
        parser.error(f"{reader}: no such file; --source must name the folder of packed image sets")
    sys.dont_write_bytecode = True
    spec = importlib.util.spec_from_file_location("unpack", reader)
    assert spec is not None and spec.loader is not None
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)

    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        arrays = unpack.load_cifar10() if name == "cifar10" else unpack.load(arguments.source / f"{name}.npz")
        normalization, flip = SETS[name]
        target = arguments.out / f"{name}.npz"
        with atomic_write(target) as place:
            np.savez(
                place, **{key: arrays[key] for key in KEYS}, normalization=np.str_(normalization), flip=np.bool_(flip)
            )
        print(f"{target}: {len(arrays['train_labels'])} training and {len(arrays['test_labels'])} test images")


if __name__ == "__main__":
    main()
