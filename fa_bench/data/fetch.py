"""Fetching files and unpacking archives so that nothing is ever half there."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import stat
import sys
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from fa_bench.data.workspace import workspace
from fa_bench.errors import DataError

#: An archive of images grows by less than this factor when it is unpacked, small ones aside (bytes).
_MOST_GROWTH, _SMALL = 20, 1 << 24

log = logging.getLogger("fa_bench")
_refusing = False


@contextlib.contextmanager
def nothing_fetched() -> Iterator[None]:
    """Within it what is missing is refused in place of being downloaded or unpacked: nothing is written."""
    global _refusing
    before, _refusing = _refusing, True
    try:
        yield
    finally:
        _refusing = before


@contextlib.contextmanager
def fetching(data_dir: Path, dataset: str, missing: str) -> Iterator[Path]:
    """A temporary folder in `data_dir` to download into; torchvision's progress bars show on a terminal alone.

    Where another process downloads the same dataset, it is waited for: what is missing may be there within the block.

    Args:
        data_dir: made where it is missing.
        dataset: name of the dataset.
        missing: what is missing, and where it belongs.

    Raises:
        DataError: where the block fails for want of a network, of space or of the right bytes, and within `nothing_fetched`.
    """
    if _refusing:
        raise DataError(f"dataset={dataset}: missing {missing}, and a dry run downloads nothing; put the files there, "
                        "set data_dir, or let a run download them")
    log.info("dataset=%s: downloading %s", dataset, missing)
    bar = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with workspace(data_dir / f".download-{dataset}") as temporary, bar, contextlib.redirect_stdout(io.StringIO()):
            yield temporary
    except DataError:
        raise
    except (RuntimeError, OSError, ValueError, EOFError, HTTPException) as error:
        with contextlib.suppress(OSError):
            data_dir.rmdir()  # only where it is empty: made for this download
        raise DataError(f"dataset={dataset}: missing {missing}, and the download failed ({reason(error)}); "
                        "put the files there, or set data_dir") from None


def download(url: str, md5: str, path: Path) -> None:
    """Download one file with a progress bar.

    Raises:
        OSError, HTTPException: where the server cannot be reached, says no or falls silent for a minute.
        ValueError: where the bytes that came have another MD5.
    """
    from tqdm import tqdm

    digest, request = hashlib.md5(usedforsecurity=False), urllib.request.Request(url, headers={"User-Agent": "fa_bench"})
    with urllib.request.urlopen(request, timeout=60) as response, path.open("wb") as file:
        total = int(response.headers.get("Content-Length") or 0) or None
        with tqdm(total=total, desc=path.name, unit="B", unit_scale=True, disable=None, leave=False) as bar:
            while block := response.read(1 << 20):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
    if digest.hexdigest() != md5:
        raise ValueError(f"what came from {url} is cut off or changed: its MD5 is {digest.hexdigest()}, not {md5}")


def has_md5(path: Path, md5: str) -> bool:
    """Whether a file is there and has this MD5."""
    from torchvision.datasets.utils import check_integrity

    return check_integrity(str(path), md5)


def unpack_zip(archive: Path, folder: Path) -> None:
    """Unpack the top folder `folder.name` of a zip archive as `folder`, which appears once everything is in it.

    Raises:
        DataError: naming the archive, where it is damaged, or where a member would land outside of the folder, and within
            `nothing_fetched`.
    """
    if _refusing:
        raise DataError(f"{archive}: not unpacked yet, and a dry run writes nothing; unpack it, or let a run do so")
    from tqdm import tqdm

    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            for member in members:
                path = PurePosixPath(member.filename.replace("\\", "/"))
                kind = stat.S_IFMT(member.external_attr >> 16)
                problem = None
                if path.is_absolute() or ".." in path.parts or not path.parts or ":" in path.parts[0]:
                    problem = f"would land outside of {folder.parent}"
                elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    problem = "is a link or a device, and no file"
                if problem:
                    raise DataError(f"{archive}: its member '{member.filename}' {problem}; "
                                    "nothing was unpacked: get the archive anew from a source you trust")
            unpacked = sum(member.file_size for member in members)
            if unpacked > _MOST_GROWTH * archive.stat().st_size + _SMALL:
                raise DataError(f"{archive}: would grow to {unpacked / 1e9:.3g} GB, more than images do; "
                                "nothing was unpacked: get the archive anew from a source you trust")
            with workspace(folder.with_name(f".unpack-{folder.name}")) as temporary:
                if folder.is_dir():  # another run unpacked it while this one waited
                    return
                for member in tqdm(members, desc=f"unpacking {archive.name}", unit="file", disable=None, leave=False):
                    opened.extract(member, temporary)
                made = temporary / folder.name
                if not made.is_dir():
                    raise DataError(f"{archive}: holds no folder {folder.name}; delete it to download it again")
                try:
                    os.replace(made, folder)
                except OSError:
                    if not folder.is_dir():  # else another run was faster
                        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(f"{archive}: damaged ({reason(error)}); delete it to download it again") from None
    except DataError:
        raise
    except OSError as error:
        if folder.is_dir():  # another run unpacked it and removed the archive
            return
        raise DataError(f"{archive}: cannot be unpacked ({reason(error)})") from None


def unpack_tar(archive: Path, folder: Path) -> None:
    """Unpack a tar archive, compressed or not, into `folder`; its checksum is no reason to trust its members.

    Raises:
        DataError: naming the archive, where a member would land outside of the folder, or is a link or a device.
        OSError: where it cannot be read or its members not be written.
        ValueError: where it is damaged.
    """
    if not hasattr(tarfile, "data_filter"):
        raise DataError(f"{archive}: this Python is too old to unpack it safely; take a newer patch release of it, or unpack the "
                        f"archive by hand into {folder.parent}")

    def only_files(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        if not (member.isreg() or member.isdir()):
            raise tarfile.SpecialFileError(member)
        return tarfile.data_filter(member, path)

    try:
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter=only_files)
    except tarfile.FilterError as error:
        kind = "is a link or a device, and no file" if isinstance(error, tarfile.SpecialFileError) else \
            "would land outside of the folder"
        raise DataError(f"{archive.name}: its member '{error.tarinfo.name}' {kind}; "
                        "nothing was unpacked: get the archive anew from a source you trust") from None
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise ValueError(f"{archive.name} is damaged: {reason(error)}") from None


def reason(error: Exception) -> str:
    """The last line of an error's text: torchvision puts the cause there."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
