"""Downloading and unpacking write nothing outside of their folder. Temporary files of a killed process are removed by the next
one, and processes wait for each other."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torchvision.datasets import cifar

from fa_bench.data import fetch
from fa_bench.data import workspace as module
from fa_bench.data.fetch import download, fetching, unpack_tar, unpack_zip
from fa_bench.data.workspace import workspace
from fa_bench.errors import DataError
from fa_bench.registry.registries import DATASETS
from fa_bench.utils import locks

from .files import CIFAR_FILES, write_cifar

CPU = torch.device("cpu")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------ tar
ODD = {
    "..": ("../../evil.txt", tarfile.REGTYPE),
    "inside and out": ("cifar-10-batches-py/../../../evil.txt", tarfile.REGTYPE),
    "link": ("cifar-10-batches-py/link", tarfile.SYMTYPE),
    "hard link": ("cifar-10-batches-py/link", tarfile.LNKTYPE),
    "pipe": ("cifar-10-batches-py/pipe", tarfile.FIFOTYPE),
    "device": ("cifar-10-batches-py/zero", tarfile.CHRTYPE),
}


def write_tar(path: Path, folder: Path, name: str, kind: bytes) -> None:
    with tarfile.open(path, "w:gz") as opened:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, "/etc/passwd", 4 if kind == tarfile.REGTYPE else 0
        opened.addfile(member, io.BytesIO(b"evil"))
        opened.add(folder, folder.name)


def as_published(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the archive's checksum the expected one."""
    monkeypatch.setattr(cifar.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest())


@pytest.mark.parametrize("kind", ODD)
def test_unsafe_tar_members_are_rejected_despite_valid_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    write_cifar(tmp_path / "source", monkeypatch)
    data = tmp_path / "room" / "data"
    data.mkdir(parents=True)
    write_tar(data / "cifar-10-python.tar.gz", tmp_path / "source" / CIFAR_FILES["cifar10"][1], *ODD[kind])
    as_published(data / "cifar-10-python.tar.gz", monkeypatch)
    message = r"cifar-10-python\.tar\.gz: its member '.*' (would be unpacked outside|is a link or a device)"
    with pytest.raises(DataError, match=message) as caught:
        DATASETS["cifar10"]().load(data, CPU)
    assert "nothing was unpacked" in str(caught.value) and "\n" not in str(caught.value)
    assert names(data) == ["cifar-10-python.tar.gz"] and names(data.parent) == ["data"]
    assert not list(tmp_path.rglob("evil.txt"))


def test_absolute_member_name_is_unpacked_inside_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path / "source", monkeypatch)
    data = tmp_path / "data"
    data.mkdir()
    outside = tmp_path / "evil.txt"
    write_tar(data / "cifar-10-python.tar.gz", tmp_path / "source" / CIFAR_FILES["cifar10"][1], str(outside), tarfile.REGTYPE)
    as_published(data / "cifar-10-python.tar.gz", monkeypatch)
    assert len(DATASETS["cifar10"].from_mapping({"validation": 0}).load(data, CPU).test) == 6
    assert not outside.exists() and names(data) == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]


def test_damaged_tar_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8bnot one")
    with pytest.raises(ValueError, match=r"a\.tar\.gz is damaged"):
        unpack_tar(tmp_path / "a.tar.gz", tmp_path / "out")


def test_python_without_tar_filter_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(DataError, match="this Python is too old"):
        unpack_tar(tmp_path / "a.tar.gz", tmp_path / "out")


def test_unresponsive_server_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_TIMEOUT", 0.2)
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        with pytest.raises(DataError, match=r"failed \(.*timed out"), fetching(tmp_path / "data", "set", "x") as temporary:
            download(url, "0" * 32, temporary / "x")
    assert socket.getdefaulttimeout() is None and names(tmp_path) == []


# ------------------------------------------------------------------------------------------------ killed processes
def write_zip(path: Path, files: int = 3) -> Path:
    with zipfile.ZipFile(path, "w") as opened:
        for i in range(files):
            opened.writestr(f"set/{i}.txt", "text")
    return path


SLOW = """
import sys, time, zipfile
from pathlib import Path
from fa_bench.data.fetch import unpack_zip, fetching
data = Path(sys.argv[1])
original = zipfile.ZipFile.extract
def slow(self, *args):
    made = original(self, *args)
    print("begun", flush=True)
    time.sleep(float(sys.argv[3]))
    return made
zipfile.ZipFile.extract = slow
if sys.argv[2] == "unpack":
    unpack_zip(data / "set.zip", data / "set")
else:
    with fetching(data, "set", "files") as temporary:
        (temporary / "half").write_text("x")
        sys.stderr.write("begun\\n"); sys.stderr.flush()
        time.sleep(float(sys.argv[3]))
"""


def started(data: Path, what: str, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(data), what, str(seconds)],
        text=True,
        stdout=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )


def wait_for(path: Path) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize(("what", "left"), [("unpack", ".unpack-set"), ("download", ".download-set")])
def test_leftovers_of_killed_process_are_removed(tmp_path: Path, what: str, left: str) -> None:
    write_zip(tmp_path / "set.zip")
    (tmp_path / ".unpack-other").mkdir()
    (tmp_path / ".unpack-other" / "mine").write_text("mine")
    process = started(tmp_path, what, 300)
    wait_for(tmp_path / left / ("set/0.txt" if what == "unpack" else "half"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left in names(tmp_path)
    if what == "unpack":
        unpack_zip(tmp_path / "set.zip", tmp_path / "set")
        assert names(tmp_path / "set") == ["0.txt", "1.txt", "2.txt"]
    else:
        with fetching(tmp_path, "set", "files") as temporary:
            assert names(temporary) == [module._MARK]
    assert not any(left in name for name in names(tmp_path))
    assert (tmp_path / ".unpack-other" / "mine").read_text() == "mine"


def test_second_process_waits_and_reuses_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zip(tmp_path / "set.zip")
    process = started(tmp_path, "unpack", 0.5)
    wait_for(tmp_path / ".unpack-set" / "set" / "0.txt")
    monkeypatch.setattr(zipfile.ZipFile, "extract", lambda *args: pytest.fail("unpacked twice"))
    unpack_zip(tmp_path / "set.zip", tmp_path / "set")
    assert names(tmp_path / "set") == ["0.txt", "1.txt", "2.txt"] and process.wait() == 0
    assert names(tmp_path) == ["set", "set.zip"]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_foreign_link_or_file_is_unchanged(tmp_path: Path, kind: str) -> None:
    write_zip(tmp_path / "set.zip")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    if kind == "link":
        (tmp_path / ".unpack-set").symlink_to(tmp_path / "precious")
    else:
        (tmp_path / ".unpack-set").write_text("mine")
    with pytest.raises(DataError, match=r"\.unpack-set: not a folder.*remove or rename it"):
        unpack_zip(tmp_path / "set.zip", tmp_path / "set")
    assert (tmp_path / "precious" / "file").read_text() == "mine"
    assert names(tmp_path) == [".unpack-set", "precious", "set.zip"]


def test_lock_link_is_not_followed(tmp_path: Path) -> None:
    write_zip(tmp_path / "set.zip")
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".unpack-set.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(DataError, match="not a lock file"):
        unpack_zip(tmp_path / "set.zip", tmp_path / "set")
    assert (tmp_path / "precious").read_text() == "mine" and (tmp_path / ".unpack-set.lock").is_symlink()


@pytest.mark.parametrize("kind", ["text", "hard link"])
def test_foreign_lock_file_is_not_used(tmp_path: Path, kind: str) -> None:
    write_zip(tmp_path / "set.zip")
    (tmp_path / "precious").write_text("mine")
    lock = tmp_path / ".unpack-set.lock"
    lock.write_text("mine") if kind == "text" else os.link(tmp_path / "precious", lock)
    with pytest.raises(DataError, match=r"\.unpack-set\.lock: not a lock file"):
        unpack_zip(tmp_path / "set.zip", tmp_path / "set")
    assert lock.read_text() == "mine" and names(tmp_path) == [".unpack-set.lock", "precious", "set.zip"]


def test_foreign_folder_is_not_removed(tmp_path: Path) -> None:
    write_zip(tmp_path / "set.zip")
    (tmp_path / ".unpack-set").mkdir()
    (tmp_path / ".unpack-set" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"\.unpack-set: contains other files"):
        unpack_zip(tmp_path / "set.zip", tmp_path / "set")
    assert (tmp_path / ".unpack-set" / "mine.txt").read_text() == "mine"


def test_workspace_is_exclusive_while_lock_is_recreated(tmp_path: Path) -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(15):
            with workspace(tmp_path / ".w") as room:
                with lock:
                    inside += 1
                    most = max(most, inside)
                (room / "x").write_text("x")
                time.sleep(0.001)
                assert names(room) == [module._MARK, "x"]
                with lock:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and names(tmp_path) == []


def test_replaced_lock_file_is_reacquired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, looked = tmp_path / "w.lock", []
    original = locks._is_same

    def replaced(place: Path, before: os.stat_result) -> bool:
        if not looked:  # another process removes the file and creates it again
            path.unlink()
            path.touch()
        looked.append(original(place, before))
        return looked[-1]

    monkeypatch.setattr(locks, "_is_same", replaced)
    with locks.locked(path, wait=True):
        assert looked == [False, True]


def test_interrupted_removal_leaves_recognisable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marker is removed last, so an interrupted removal leaves a folder that is still recognised."""
    import shutil

    from fa_bench.data.workspace import workspace

    class Killed(BaseException):
        pass

    def rmtree(path: Path, *arguments: object) -> None:
        if Path(path) == tmp_path / ".unpack-x":
            raise Killed
        remove(path)

    remove = shutil.rmtree
    with monkeypatch.context() as patch, pytest.raises(Killed), workspace(tmp_path / ".unpack-x") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "image").write_text("x")
        (folder / "file").write_text("x")
        patch.setattr(shutil, "rmtree", rmtree)
    assert [path.name for path in (tmp_path / ".unpack-x").iterdir()] == [".made-by-fa-bench"]
    with workspace(tmp_path / ".unpack-x") as folder:
        assert [path.name for path in folder.iterdir()] == [".made-by-fa-bench"]
