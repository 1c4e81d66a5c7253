"""List the images in class folders, and count the files that are skipped."""

from __future__ import annotations

import dataclasses
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from fa_bench.errors import DataError, nearest

EXTENSIONS = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".pjpeg",
        ".pjp",
        ".png",
        ".apng",
        ".bmp",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".tif",
        ".tiff",
        ".webp",
        ".gif",
        ".avif",
    }
)
#: Matches the names of folders that operating systems and network drives create, for example for thumbnails, snapshots or deleted
#: files. Names with a leading dot are hidden anyway.
_SYSTEM = re.compile(
    r"__macosx|__pycache__|\$recycle\.bin|(?-i:RECYCLER)|system volume information|found\.\d{3}|lost\+found|"
    r"network trash folder|temporary items|[@#]recycle|@eadir|@tmp|[#~]snapshot|@recently-snapshot",
    re.IGNORECASE,
)

HIDDEN = "hidden or system"
LOOSE = "outside the class folders"


@dataclasses.dataclass
class Listing:
    """The files of a dataset.

    Attributes:
        classes: names of the classes.
        parts: for each of train, test and possibly validation: its folder, and (file, label) of every image.
        notes: sentences about the source, for example on skipped files.
    """

    classes: list[str]
    parts: dict[str, tuple[Path, list[tuple[Path, int]]]]
    notes: list[str] = dataclasses.field(default_factory=list)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or belongs to the operating system, according to its name."""
    return name.startswith(".") or _SYSTEM.fullmatch(name) is not None


def visible_folders(root: Path, skipped: Counter[str] | None = None) -> list[Path]:
    """The visible subfolders of a folder, including links to folders, sorted by name; other entries are counted in `skipped`."""
    counts: Counter[str] = Counter() if skipped is None else skipped
    folders, parents = [], {_identity(root), _identity(root.parent)}
    for entry in _scan(root):
        if is_hidden(entry.name):
            counts[HIDDEN] += 1
        elif not _is_folder(entry):
            counts[LOOSE] += 1
        elif _identity(Path(entry.path)) in parents:
            counts["links to a parent folder"] += 1
        else:
            folders.append(root / entry.name)
    return folders


def images_below(folder: Path, skipped: Counter[str]) -> list[Path]:
    """The image files in a folder and its visible subfolders, sorted by path; links to folders are followed.

    Each folder is read once, even if several links lead to it.

    Args:
        folder: the folder of one class.
        skipped: counts skipped files, by reason.

    Raises:
        DataError: if a folder cannot be read; the message names it.
    """
    images: list[Path] = []
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
                images.append(here / entry.name)
            elif _is_folder(entry):
                (links if entry.is_symlink() else folders).append(here / entry.name)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                skipped["broken links"] += 1
            else:
                skipped[suffix or "no extension"] += 1
    # Sort by the parts of the paths, because comparisons of Windows paths ignore case.
    return sorted(images, key=lambda path: path.parts)


def labelled_files(folders: Iterable[Path], skipped: Counter[str]) -> list[tuple[Path, int]]:
    """The pairs (file, label) of all images in the class folders, sorted by path within each class. Skipped files are counted in
    `skipped`.

    Raises:
        DataError: if a folder cannot be read or contains no images; the message names it.
    """
    files: list[tuple[Path, int]] = []
    for label, folder in enumerate(folders):
        here: Counter[str] = Counter()
        images = images_below(folder, here) if folder.is_dir() else []
        if not images:
            raise DataError(f"{folder}: contains no images{_hint(here)}")
        files += [(path, label) for path in images]
        skipped.update(here)
    return files


def train_classes(root: Path, skipped: Counter[str]) -> list[Path]:
    """The folders of the classes.

    Raises:
        DataError: if there are none, or two whose names look the same.
    """
    folders = visible_folders(root, skipped)
    if not folders:
        raise DataError(f"{root}: contains no class folders{_hint(skipped)}")
    names: dict[str, str] = {}
    for folder in folders:
        if (other := names.setdefault(plain_name(folder.name), folder.name)) != folder.name:
            raise DataError(f"{root}: two class names look the same: {other!r} and {folder.name!r}; rename or merge the folders")
    return folders


def class_listing(train: Path, test: Path, validation: Path | None = None) -> Listing:
    """The images of a dataset with one folder per class.

    Raises:
        DataError: if there are no classes, if a class has no training images, or if `test` or `validation` has no images or has a
            class that `train` does not have.
    """
    skipped: Counter[str] = Counter()
    folders = train_classes(train, skipped)
    classes = [folder.name for folder in folders]
    files = labelled_files(folders, skipped)
    parts, notes = {"train": (train, files)}, skip_notes(train, skipped)
    for part, root in (("test", test), ("validation", validation)):
        if root is not None:
            parts[part] = root, _evaluation(train, root, classes, notes)
    return Listing(classes, parts, notes)


def _evaluation(train: Path, root: Path, classes: list[str], notes: list[str]) -> list[tuple[Path, int]]:
    skipped: Counter[str] = Counter()
    labels = {plain_name(name): label for label, name in enumerate(classes)}
    files: list[tuple[Path, int]] = []
    missing, unknown, present = list(classes), [], visible_folders(root, skipped)
    # The folders are read in the order of the training classes.
    for folder in sorted(present, key=lambda path: labels.get(plain_name(path.name), len(labels))):
        images = images_below(folder, skipped)
        if images and plain_name(folder.name) not in labels:
            unknown.append(folder.name)
        elif images:
            label = labels[plain_name(folder.name)]
            files += [(path, label) for path in images]
            missing.remove(classes[label])
    if unknown:
        hint = nearest(unknown[0], missing)
        raise DataError(f"{root}: contains classes that {train} does not: {', '.join(unknown[:5])}{hint}")
    if not files:
        raise DataError(f"{root}: contains no images in folders of the classes of {train}{_hint(skipped)}")
    notes += skip_notes(root, skipped)
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        notes.append(f"{root}: no images of {len(missing)} of {len(classes)} classes ({some})")
    return files


def has_classes(root: Path, classes: list[str]) -> bool:
    """Whether a folder has a subfolder named after one of the classes."""
    names = {plain_name(name) for name in classes}
    return any(plain_name(folder.name) in names for folder in visible_folders(root))


def plain_name(name: str) -> str:
    """Normalise a name to one Unicode form, because macOS writes é as two characters and other systems write it as one."""
    return unicodedata.normalize("NFC", name)


def skip_notes(root: Path, skipped: Counter[str]) -> list[str]:
    """A list with one sentence on the files skipped in a folder, or an empty list if none were skipped."""
    return [f"{root}: skipped {skipped.total():,} ({_counted(skipped)})"] if skipped else []


def _hint(skipped: Counter[str]) -> str:
    """The end of an error message about a folder without images: the numbers of skipped files by reason or, if there are none,
    the allowed extensions."""
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
    """Whether the entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: Path) -> tuple[int, int]:
    """The device and inode numbers of a folder, which identify it."""
    try:
        status = folder.stat()
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None
    return status.st_dev, status.st_ino
