"""Replacing a directory whole.

Files are written to a sibling, flushed to disk, and the two directories change places in one system call where there is
one (Linux ``renameat2``, macOS ``renamex_np``): at any moment, also of a crash or a power cut, the path is the old
directory or the new one. On a file system without that call (some network ones) there are two renames, and a crash
exactly between them leaves the old directory under ``.NAME.previous`` beside the path.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Collection
from pathlib import Path


def replace_directory(path: Path, write: Callable[[Path], None], names: Collection[str]) -> None:
    """Make ``path`` the directory that ``write`` fills; entries of the old one not in ``names`` are carried over."""
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path}: expected a directory, or nothing yet, got a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
    fresh = path.with_name(f".{path.name}.saving-{secrets.token_hex(4)}")
    fresh.mkdir()
    lock = os.open(fresh, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tells the next save that this one is alive
        write(fresh)
        if path.exists():
            shutil.copytree(
                path, fresh, symlinks=True, ignore=_at_top(path, names), copy_function=_link, dirs_exist_ok=True
            )
        for directory, _, files in os.walk(fresh):
            for file in (Path(directory, name) for name in files):
                if not file.is_symlink():
                    _flush(file)
            _flush(Path(directory))
        if path.exists():
            exchange(fresh, path)
        else:
            fresh.rename(path)
        _flush(path.parent)
    finally:
        os.close(lock)
        shutil.rmtree(fresh, ignore_errors=True)  # the old directory, or what an error left


def remove_stale(path: Path) -> None:
    """Undo and remove what killed saves of ``path`` left beside it."""
    previous = path.with_name(previous_name(path))
    if previous.is_dir() and not path.exists():
        previous.rename(path)
    shutil.rmtree(previous, ignore_errors=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.saving-*"):
        handle = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its writer lives
        finally:
            os.close(handle)
        shutil.rmtree(left, ignore_errors=True)


def exchange(a: Path, b: Path) -> None:
    """Two directories change names, in one step where the system can."""
    libc, here = ctypes.CDLL(None, use_errno=True), -100
    first, second = os.fsencode(a), os.fsencode(b)
    if hasattr(libc, "renameat2"):
        status = libc.renameat2(here, first, here, second, 2)  # RENAME_EXCHANGE
    elif sys.platform == "darwin":
        status = libc.renamex_np(first, second, 2)  # RENAME_SWAP
    else:
        status = None
    if status == 0:
        return
    number = ctypes.get_errno()
    if status is not None and number not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
        raise OSError(number, os.strerror(number), str(b))
    rename_twice(a, b)


def rename_twice(a: Path, b: Path) -> None:
    """The same in two steps; ``b`` is gone between them."""
    previous = b.with_name(previous_name(b))
    b.rename(previous)
    try:
        a.rename(b)
    except OSError:
        previous.rename(b)
        raise
    previous.rename(a)


def previous_name(path: Path) -> str:
    """Where the second-best way of exchanging directories leaves the old one if it is killed halfway."""
    return f".{path.name}.previous"


def _at_top(path: Path, names: Collection[str]) -> Callable[[str, list[str]], list[str]]:
    return lambda directory, entries: [n for n in entries if n in names] if Path(directory) == path else []


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # no hard links here
        shutil.copy2(source, target, follow_symlinks=False)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
