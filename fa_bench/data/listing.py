"""Which files in a folder of classes are images, and what else lies there: what is skipped is counted."""

from __future__ import annotations

import dataclasses
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fa_bench.errors import DataError, nearest

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".png", ".apng", ".bmp", ".ppm", ".pgm", ".pbm",
                        ".pnm", ".tif", ".tiff", ".webp", ".gif", ".avif"})
#: Folders without a dot in front that systems and network drives make, with thumbnails or deleted files in them.
_SYSTEM = frozenset({"__macosx", "__pycache__", "$recycle.bin", "system volume information", "lost+found", "@eadir", "#recycle",
                     "@recycle"})

HIDDEN = "hidden or system"
LOOSE = "outside the class folders"


@dataclasses.dataclass
class Listing:
    """What a dataset of image files holds.

    Attributes:
        classes: names of the classes.
        parts: for train, test and, where there is one, validation: its folder, and (file, label) of every image.
        notes: what was skipped, a sentence each.
    """

    classes: list[str]
    parts: dict[str, tuple[Path, list[tuple[Path, int]]]]
    notes: list[str] = dataclasses.field(default_factory=list)


def is_hidden(name: str) -> bool:
    """Whether a viewer does not show a file or folder of this name: hidden ones, and those that systems leave behind."""
    return name.startswith(".") or name.lower() in _SYSTEM


def visible_folders(root: Path, skipped: Counter[str] | None = None) -> list[Path]:
    """The visible folders in a folder, and links to folders, in the order of names; what else is there is counted."""
    counts: Counter[str] = Counter() if skipped is None else skipped
    found, holders = [], {_identity(root), _identity(root.parent)}
    for entry in _scan(root):
        if is_hidden(entry.name):
            counts[HIDDEN] += 1
        elif not _is_folder(entry):
            counts[LOOSE] += 1
        elif _identity(Path(entry.path)) in holders:
            counts["links to a parent folder"] += 1
        else:
            found.append(root / entry.name)
    return found


def images_below(folder: Path, skipped: Counter[str]) -> list[Path]:
    """The image files in a folder and the visible folders below it, in the order of names; links to folders are followed.

    Each folder is read once, whatever links lead to it.

    Args:
        folder: of one class.
        skipped: counts what was skipped, by reason.

    Raises:
        DataError: naming a folder that cannot be read.
    """
    found: list[Path] = []
    folders, links = [folder], []
    seen = {_identity(folder.parent), _identity(folder.parent.parent)}
    while folders or links:
        here = folders.pop() if folders else links.pop()
        if (identity := _identity(here)) in seen:
            skipped["links to a folder already read"] += 1
            continue
        seen.add(identity)
        for entry in _scan(here):
            suffix = os.path.splitext(entry.name)[1].lower()
            if is_hidden(entry.name):
                skipped[HIDDEN] += 1
            elif suffix in EXTENSIONS:
                found.append(here / entry.name)
            elif _is_folder(entry):
                (links if entry.is_symlink() else folders).append(here / entry.name)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                skipped["broken links"] += 1
            else:
                skipped[suffix or "no extension"] += 1
    # By the parts as they are written: a Path of Windows is compared without regard to case.
    return sorted(found, key=lambda path: path.parts)


def labelled_files(root: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """(file, label) of every image in the folders `root`/class, in the order of names.

    Raises:
        DataError: naming the folder that cannot be read or holds no images.
    """
    return _labelled(root, [(root / name, label) for label, name in enumerate(classes)], Counter())


def _labelled(root: Path, folders: list[tuple[Path, int]], skipped: Counter[str]) -> list[tuple[Path, int]]:
    found: list[tuple[Path, int]] = []
    for folder, label in folders:
        here: Counter[str] = Counter()
        images = images_below(folder, here) if folder.is_dir() else []
        if not images:
            raise DataError(f"{folder}: holds no images{_holds(here)}")
        found += [(path, label) for path in images]
        skipped.update(here)
    return found


def train_classes(root: Path, skipped: Counter[str]) -> list[Path]:
    """The folders of the classes.

    Raises:
        DataError: where there are none, or two whose names look the same.
    """
    folders = visible_folders(root, skipped)
    if not folders:
        raise DataError(f"{root}: holds no folders, one for each class{_holds(skipped)}")
    names: dict[str, str] = {}
    for folder in folders:
        if (other := names.setdefault(plain_name(folder.name), folder.name)) != folder.name:
            raise DataError(f"{root}: two classes look the same: {other!r} and {folder.name!r}; rename or join them")
    return folders


def class_listing(train: Path, test: Path, validation: Path | None = None) -> Listing:
    """The images of folders that each have one folder for each class, which their names tell.

    Raises:
        DataError: where there are no classes or no images, or where `test` or `validation` has a class that `train` has not.
    """
    skipped: Counter[str] = Counter()
    folders = train_classes(train, skipped)
    classes = [folder.name for folder in folders]
    files = _labelled(train, [(folder, label) for label, folder in enumerate(folders)], skipped)
    parts, notes = {"train": (train, files)}, _notes(train, skipped)
    for part, root in (("test", test), ("validation", validation)):
        if root is not None:
            parts[part] = root, _evaluation(train, root, classes, notes)
    return Listing(classes, parts, notes)


def _evaluation(train: Path, root: Path, classes: list[str], notes: list[str]) -> list[tuple[Path, int]]:
    skipped: Counter[str] = Counter()
    labels = {plain_name(name): label for label, name in enumerate(classes)}
    found: list[tuple[Path, int]] = []
    lacking, unknown, present = list(classes), [], visible_folders(root, skipped)
    # In the order of the classes, as train has it.
    for folder in sorted(present, key=lambda path: labels.get(plain_name(path.name), len(labels))):
        images = images_below(folder, skipped)
        if images and plain_name(folder.name) not in labels:
            unknown.append(folder.name)
        elif images:
            label = labels[plain_name(folder.name)]
            found += [(path, label) for path in images]
            lacking.remove(classes[label])
    if unknown:
        hint = nearest(unknown[0], lacking)
        raise DataError(f"{root}: holds classes that {train} does not: {', '.join(unknown[:5])}{hint}")
    if not found:
        raise DataError(f"{root}: holds no images in folders of the classes of {train}{_holds(skipped)}")
    notes += _notes(root, skipped)
    if lacking:
        some = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        notes.append(f"{root}: no images of {len(lacking)} of {len(classes)} classes ({some})")
    return found


def has_classes(root: Path, classes: list[str]) -> bool:
    """Whether a folder has a folder of one of the classes: whether its images are labelled."""
    names = {plain_name(name) for name in classes}
    return any(plain_name(folder.name) in names for folder in visible_folders(root))


def plain_name(name: str) -> str:
    """A name as it looks: macOS writes é as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def _notes(root: Path, skipped: Counter[str]) -> list[str]:
    return [f"{root}: skipped {skipped.total():,} ({_counted(skipped)})"] if skipped else []


def _holds(skipped: Counter[str]) -> str:
    """What a folder without images holds, as the end of a message."""
    return f" (skipped {_counted(skipped)})" if skipped else f" ({', '.join(sorted(EXTENSIONS))})"


def _counted(skipped: Counter[str]) -> str:
    kinds = [f"{kind}: {number:,}" for kind, number in skipped.most_common(6)]
    return ", ".join([*kinds, "..."] if len(skipped) > 6 else kinds)


def _scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return iter(sorted(entries, key=lambda entry: entry.name))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or leads to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: Path) -> tuple[int, int]:
    """What is the same for every path to a folder."""
    try:
        found = folder.stat()
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None
    return found.st_dev, found.st_ino
