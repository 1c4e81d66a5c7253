"""Download files and unpack archives so that an interruption never leaves an incomplete dataset.

torchvision downloads the files, since it has the sources and checksums of most datasets. A library such as pooch could replace
only `download` and `has_md5`, so it is not worth a dependency.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import stat
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from fa_bench.data.workspace import workspace
from fa_bench.errors import DataError

#: A server that has not responded for this many seconds counts as unreachable.
_TIMEOUT = 60.0
#: The files in an archive of images may take at most the first number times the size of the archive, plus the second number in
#: bytes.
_MOST_GROWTH, _SMALL = 20, 1 << 24

log = logging.getLogger("fa_bench")
_refuse_downloads = False


@contextlib.contextmanager
def downloads_refused() -> Iterator[None]:
    """Within the block, raise a DataError instead of downloading or unpacking missing files, so that nothing is written."""
    global _refuse_downloads
    before, _refuse_downloads = _refuse_downloads, True
    try:
        yield
    finally:
        _refuse_downloads = before


@contextlib.contextmanager
def fetching(data_dir: Path, dataset: str, missing: str) -> Iterator[Path]:
    """Create a temporary folder in `data_dir` to download into, and show torchvision's progress bars only on a terminal.

    If another process is downloading the same dataset, this waits until that download ends, so the missing files may already
    exist when the block starts.

    Args:
        data_dir: created if it does not exist.
        dataset: name of the dataset.
        missing: the missing files and where they belong, as text.

    Raises:
        DataError: if the download in the block fails, for example because of a missing network, a full disk or a wrong checksum;
            always within `downloads_refused`.
    """
    if _refuse_downloads:
        raise DataError(
            f"dataset={dataset}: missing {missing}, and a dry run downloads nothing; put the files there, "
            "set data_dir, or start a run to download them"
        )
    log.info("dataset=%s: downloading %s", dataset, missing)
    bar = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)  # torchvision sets none, and would wait forever
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with workspace(data_dir / f".download-{dataset}") as temporary, bar, contextlib.redirect_stdout(io.StringIO()):
            yield temporary
    except DataError:
        raise
    except (RuntimeError, OSError, ValueError, EOFError, HTTPException) as error:
        with contextlib.suppress(OSError):
            data_dir.rmdir()  # fails unless it is empty
        raise DataError(
            f"dataset={dataset}: missing {missing}, and the download failed ({reason(error)}); "
            "put the files there, or set data_dir"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def download(url: str, md5: str, path: Path) -> None:
    """Download one file; call this function within `fetching`.

    Raises:
        OSError, HTTPException: if the server cannot be reached, refuses or stops responding.
        RuntimeError: if the file has a different MD5.
    """
    from torchvision.datasets.utils import download_url

    download_url(url, str(path.parent), path.name, md5)


def has_md5(path: Path, md5: str) -> bool:
    """Whether a file exists and has this MD5 checksum."""
    from torchvision.datasets.utils import check_integrity

    return check_integrity(str(path), md5)


def unpack_zip(archive: Path, folder: Path) -> None:
    """Unpack the top-level folder `folder.name` of a zip archive as `folder`, which appears only when it is complete.

    Raises:
        DataError: if the archive is damaged, unpacks to too much data, lacks the folder, or contains links, devices or members
            that would be unpacked elsewhere; always within `downloads_refused`. The message names the archive.
    """
    if _refuse_downloads:
        raise DataError(f"{archive}: not unpacked yet, and a dry run writes nothing; unpack it, or start a run to do so")
    from tqdm import tqdm

    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            for member in members:
                path = PurePosixPath(member.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or not path.parts or ":" in path.parts[0]:
                    raise _unsafe(f"{archive}: its member '{member.filename}' would be unpacked outside of {folder.parent}")
                if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise _unsafe(f"{archive}: its member '{member.filename}' is a link or a device")
            size = sum(member.file_size for member in members)
            if size > _MOST_GROWTH * archive.stat().st_size + _SMALL:
                raise _unsafe(f"{archive}: would unpack to {size / 1e9:.3g} GB, too much for an image dataset")
            with workspace(folder.with_name(f".unpack-{folder.name}")) as temporary:
                if folder.is_dir():  # unpacked by another process in the meantime
                    return
                for member in tqdm(members, desc=f"unpacking {archive.name}", unit="file", disable=None, leave=False):
                    opened.extract(member, temporary)
                if not (temporary / folder.name).is_dir():
                    raise DataError(f"{archive}: contains no folder {folder.name}; delete it to download it again")
                os.replace(temporary / folder.name, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(f"{archive}: damaged ({reason(error)}); delete it to download it again") from None
    except DataError:
        raise
    except OSError as error:
        if not folder.is_dir():  # otherwise another process has unpacked it, and may have removed the archive
            raise DataError(f"{archive}: cannot be unpacked ({reason(error)})") from None


def unpack_tar(archive: Path, folder: Path) -> None:
    """Unpack a tar archive, compressed or not, into `folder`.

    Raises:
        DataError: if the archive contains links, devices or members that would be unpacked outside of the folder, or if this
            Python is too old to check for them; the message names the archive.
        OSError: if the archive cannot be read or its members cannot be written.
        ValueError: if the archive is damaged.
    """
    if not hasattr(tarfile, "data_filter"):
        raise DataError(
            f"{archive}: this Python is too old to unpack it safely; update Python to a newer patch release, or unpack "
            f"the archive by hand into {folder.parent}"
        )

    def only_files(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        if not (member.isreg() or member.isdir()):
            raise tarfile.SpecialFileError(member)
        return tarfile.data_filter(member, path)

    try:
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter=only_files)
    except tarfile.FilterError as error:
        problem = (
            "is a link or a device" if isinstance(error, tarfile.SpecialFileError) else "would be unpacked outside of the folder"
        )
        raise _unsafe(f"{archive.name}: its member '{error.tarinfo.name}' {problem}") from None
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise ValueError(f"{archive.name} is damaged: {reason(error)}") from None


def _unsafe(problem: str) -> DataError:
    return DataError(f"{problem}; nothing was unpacked. Download the archive again from a source you trust")


def reason(error: Exception) -> str:
    """The last line of an error's text, where torchvision puts the cause."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
