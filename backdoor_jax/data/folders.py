"""Folders of class folders with images, as torchvision's ``ImageFolder`` reads them."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from backdoor_jax.errors import UserError
from backdoor_jax.memory import require_memory
from backdoor_jax.reading import file_size, image_pixels, parsing, require_budget

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif")
"""The files of a class folder that are images; others are counted and passed over."""

MOST_FOREIGN = 100_000
"""How many files without an image among them end the walk through a class folder."""

GRAY = ("1", "L", "LA", "La")
"""Pillow's modes of gray images of at most 8 bits."""

STRETCHED = "--resize of scan and defend keeps their proportions"
"""What to do about images that were stretched."""

WORK, EVALUATION = ("train", "training"), ("test", "testing", "val", "valid", "validation")
"""The folders in which a folder of images has its splits, where it has any; the first of each is taken."""
WRAPPERS = 3
"""How many levels of a folder that holds a single folder are passed."""


class FolderImages(NamedTuple):
    """The images of a folder.

    Attributes:
        images: uint8 ``(N, H, W, channels)``.
        labels: ``(N,)``.
        classes: the names of classes 0, 1, ...
        files: of the images, relative to the folder.
        notes: what was passed over or converted, for the user.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...]


def class_folders(path: Path) -> list[str]:
    """The sorted names of a folder's class folders."""
    with parsing(path, "cannot be read", "give a folder with one folder for each class"):
        found = sorted(inner.name for inner in path.iterdir() if inner.is_dir() and not inner.name.startswith("."))
    return [name for name in found if name != "__MACOSX"]  # What archives of macOS hold beside the files.


def splits_of(path: Path) -> tuple[str, str] | None:
    """The folders of a folder in which class folders to work with and to evaluate on lie; None where it has none."""
    found = {name.lower(): name for name in reversed(class_folders(path))}
    splits = [next((found[name] for name in names if name in found), None) for names in (WORK, EVALUATION)]
    return (splits[0], splits[1]) if splits[0] and splits[1] else None


def inner_folder(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder in which class folders or splits lie, and a note where it is not the given one.

    A folder that holds a single folder, and that one others, is what an archive often unpacks to.
    """
    inner = path
    for _ in range(WRAPPERS):
        if len(found := class_folders(inner)) != 1:
            break
        inner /= found[0]
    if inner == path or len(class_folders(inner)) < 2:
        return path, ()
    return inner, (f"{path}: holds a single folder, so {inner.relative_to(path)} is read",)


def _below(folder: Path) -> list[Path]:
    """What is below a class folder, sorted; refused where it begins with very many files that are no images."""
    found, images = [], False
    for file in folder.rglob("*"):
        found.append(file)
        images = images or file.suffix.lower() in SUFFIXES
        if not images and len(found) > MOST_FOREIGN:
            raise UserError(f"{folder}: none of {MOST_FOREIGN} files is an image; give a folder of images by class")
    return sorted(found)


def read_folder(
    path: Path,
    channels: int = 3,
    *,
    num_classes: int | None = None,
    size: tuple[int, int] | None = None,
    resize: int | None = None,
    class_names: tuple[str, ...] | None = None,
) -> FolderImages:
    """Reads a folder with one folder for each class; images may lie deeper.

    Args:
        path: the folder.
        channels: 1 or 3, what images are converted to.
        num_classes: how many classes there must be; any number by default.
        size: height and width to which images are resized; by default they need one size.
        resize: see `fitted`; by default images of other proportions are stretched.
        class_names: the folders of classes 0, 1, ...; by default the sorted names, as in torchvision.

    Raises:
        UserError: where the classes are others, there are no images, one cannot be read, or their sizes differ.
    """
    found = class_folders(path)
    known = set(found)
    classes = tuple(found) if class_names is None else class_names
    missing = [name for name in classes if name not in known]
    loose = missing or (num_classes is not None and len(classes) != num_classes) or not classes
    if loose and not found and any(file.suffix.lower() in SUFFIXES for file in path.iterdir()):
        raise UserError(
            f"{path}: its images lie in the folder itself, so their classes are not known; put them into one folder "
            "for each class"
        )
    if missing:
        raise UserError(f"{path}: has no class folder {missing[0]!r}; there are {_few(found)}: fix --class-names")
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice:
        raise UserError(f"{path}: {twice[0]!r} is named for several classes; give each folder once in --class-names")
    if num_classes is not None and len(classes) != num_classes:
        shown = f" ({_few(list(classes))})" if classes else ""
        raise UserError(
            f"{path}: has {len(classes)} class folders{shown}, the model {num_classes} classes; give one folder "
            "for each class, empty where there are no images, or their names in order (--class-names)"
        )
    files: list[tuple[int, Path]] = []
    passed: Counter[str] = Counter()
    with parsing(path, "cannot be read", "check the permissions of its folders"):
        for label, name in enumerate(classes):
            for file in _below(path / name):
                linked = file.is_symlink() and file.is_dir()
                if any(part.startswith(".") for part in file.relative_to(path).parts) or (file.is_dir() and not linked):
                    continue
                if linked:
                    passed["a link to a folder"] += 1
                elif file.suffix.lower() in SUFFIXES:
                    files.append((label, file))
                else:
                    passed[file.suffix or "no suffix"] += 1
    notes = []
    if passed:
        notes.append(f"{sum(passed.values())} files passed over, which are no images: {_few(sorted(passed))}")
    if not files:
        raise UserError(
            f"{path}: its class folders hold no images ({', '.join(SUFFIXES)}){': ' if notes else ''}{''.join(notes)}"
        )
    beside = sorted(known - set(classes))
    if beside:
        notes.append(f"folders passed over, which are no class: {_few(beside)}")
    if class_names is None and all(map(str.isdecimal, classes)) and sorted(classes, key=int) != found:
        notes.append(f"classes in the order {_few(found)}, of text as in torchvision; --class-names gives another")
    empty = sorted(set(range(len(classes))) - {label for label, _ in files})
    if empty:
        notes.append(f"classes without images: {_few([classes[label] for label in empty])}")
    if size is not None:
        _require_room(len(files), size, channels, str(path))
    sizes = [file_size(file, "remove it") for _, file in files]
    images: list[np.ndarray] = []
    stretched, converted = 0, 0
    for (_, file), bytes_of_file in zip(files, sizes, strict=True):
        picture, mode = image_pixels(file, file, "L" if channels == 1 else "RGB", bytes_of_file)
        converted += (mode in GRAY or mode.startswith("I;16")) != (channels == 1)
        if size is not None:
            stretched += resize is None and picture.width * size[0] != picture.height * size[1]
            picture = fitted(picture, size, resize)
        images.append(np.asarray(picture).reshape(picture.height, picture.width, channels))
        if images[-1].shape != images[0].shape:
            (height, width), (h, w) = images[-1].shape[:2], images[0].shape[:2]
            raise UserError(
                f"{file}: is {height}x{width}, the images before it {h}x{w}; resize all of them with --size {h}x{w}, "
                "or what the model was trained on (data.image_size in an experiment)"
            )
        if len(images) == 1 and size is None:
            require_budget(len(files) * images[0].nbytes, sum(sizes), path)
    if converted:
        kinds = ("in color, and were converted to gray", "gray, and were converted to color")
        notes.append(f"{converted} of {len(files)} images are {kinds[channels != 1]}, as the model takes them")
    if stretched:
        shape = "x".join(map(str, images[0].shape[:2]))
        notes.append(f"{stretched} of {len(files)} images stretched to {shape}; {STRETCHED}")
    labels = np.array([label for label, _ in files])
    names = tuple(file.relative_to(path).as_posix() for _, file in files)
    return FolderImages(np.stack(images), labels, classes, names, tuple(f"{path}: {note}" for note in notes))


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _require_room(count: int, size: tuple[int, int], channels: int, where: str) -> None:
    """Refuses a size to which no machine could resize that many images, which lie in memory twice meanwhile."""
    what = f"{where}: {count} images of {size[0]}x{size[1]}"
    require_memory(2 * count * size[0] * size[1] * channels, what, "give a smaller size")


def fitted(picture: Any, size: tuple[int, int], resize: int | None = None) -> Any:
    """Pillow's picture resized bilinearly: stretched, or as torchvision's ``Resize(resize)`` and ``CenterCrop(size)``.

    Only the pixels that are kept are computed, so that a long narrow picture needs no more memory.

    Args:
        picture: Pillow's.
        size: height and width.
        resize: pixels of the shorter side before the crop, at least those of `size`; None to stretch.

    Example:
        >>> from PIL import Image
        >>> picture = Image.fromarray(np.repeat(np.uint8([[0, 100, 200]]), 3, axis=1).repeat(3, axis=0))
        >>> np.asarray(fitted(picture, (2, 2), resize=2)).tolist()
        [[89, 111], [89, 111]]
    """
    from PIL import Image

    box = None
    if resize is not None:
        scaled = [int(resize * side / min(picture.size)) for side in picture.size]
        starts = [round((whole - kept) / 2) for whole, kept in zip(scaled, size[::-1], strict=True)]
        ends = [start + kept for start, kept in zip(starts, size[::-1], strict=True)]
        box = tuple(
            min(at * side / whole, side)
            for edges in (starts, ends)
            for at, side, whole in zip(edges, picture.size, scaled, strict=True)
        )
    return picture.resize(size[::-1], Image.Resampling.BILINEAR, box)


def resized(images: np.ndarray, size: tuple[int, int], resize: int | None = None, where: str = "images") -> np.ndarray:
    """Images ``(N, H, W, channels)`` resized bilinearly; see `fitted`.

    Args:
        images: uint8.
        size: height and width.
        resize: as in `fitted`.
        where: what errors call them.

    Raises:
        UserError: where they would not fit into memory.

    Example:
        >>> resized(np.zeros((2, 8, 8, 1), np.uint8), (4, 6)).shape
        (2, 4, 6, 1)
    """
    from PIL import Image

    _require_room(len(images), size, images.shape[-1], where)
    out = []
    for image in images:
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        out.append(np.asarray(fitted(picture, size, resize)).reshape(*size, -1))
    return np.stack(out)
