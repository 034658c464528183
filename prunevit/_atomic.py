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
from contextlib import suppress
from pathlib import Path

from .errors import CheckpointError


def expect_replaceable(path: str | os.PathLike[str]) -> None:
    """Raise :class:`CheckpointError` where no directory can be put: to be asked before the work that would go there."""
    real, here = Path(os.path.realpath(path)), Path.cwd()
    there = next(parent for parent in real.parents if parent.exists())
    if real.exists() and not real.is_dir():
        found = "a file"
    elif here.is_relative_to(real):  # whoever works in it, a shell too, would be left in a directory that is gone
        found = "the current one" if real == here else "one that holds the current one"
    elif os.path.ismount(real):
        found = "a mount point, which cannot be replaced"
    elif not there.is_dir():
        found = f"{there}, a file"
    elif not os.access(there, os.W_OK | os.X_OK):
        found = f"{there}, which cannot be written in"
    else:
        return
    raise CheckpointError(f"{path or '.'}: expected a directory to write, or nothing yet, got {found}")


def replace_directory(path: Path, write: Callable[[Path], None], names: Collection[str]) -> None:
    """Make ``path`` the directory that ``write`` fills; entries of the old one not in ``names`` are carried over."""
    expect_replaceable(path)
    path = Path(os.path.realpath(path))  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
    fresh, *locks = _fresh_beside(path)
    try:
        write(fresh)
        for file in fresh.iterdir():
            file.chmod(fresh.stat().st_mode & 0o666)  # as the umask has it, whatever the writer thinks of others
        while not _put(fresh, path, names, locks):
            pass  # another save was first: its other files are carried over too
        _flush(path.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # the old directory, or what an error left
        for lock in locks:
            os.close(lock)


def _fresh_beside(path: Path) -> tuple[Path, int]:
    """A new directory, and the lock that tells the next save that this one is alive."""
    while True:
        fresh = path.with_name(f".{path.name}.saving-{secrets.token_hex(4)}")
        fresh.mkdir()
        if (lock := _locked(fresh)) is not None:
            return fresh, lock
        # taken for stale before it was locked


def _locked(path: Path, mode: int = fcntl.LOCK_EX) -> int | None:
    """A directory opened and locked; None where there is none, or another one by the time it is locked."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    same = False
    try:
        fcntl.flock(handle, mode)
        with suppress(FileNotFoundError):
            same = os.path.samestat(os.fstat(handle), os.stat(path))
    finally:
        if not same:
            os.close(handle)
    return handle if same else None


def _put(fresh: Path, path: Path, names: Collection[str], locks: list[int]) -> bool:
    """Whether ``fresh`` has become ``path``; not where another save has changed it in between."""
    old = None
    if path.exists():
        if (old := _locked(path)) is None:
            return False
        locks.append(old)  # another save of this path waits until this one is done
        ignore = _at_top(path, names)
        shutil.copytree(path, fresh, symlinks=True, ignore=ignore, copy_function=_link, dirs_exist_ok=True)
    for directory, _, files in os.walk(fresh):
        for file in (Path(directory, name) for name in files):
            if not file.is_symlink():
                _flush(file)
        _flush(Path(directory))
    if old is not None:
        exchange(fresh, path)
        return True
    try:
        fresh.rename(path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def remove_stale(path: Path) -> None:
    """Undo and remove what killed saves of ``path`` left beside it."""
    previous = path.with_name(previous_name(path))
    if previous.is_dir() and not path.exists():
        previous.rename(path)
    shutil.rmtree(previous, ignore_errors=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.saving-*"):
        try:
            handle = _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its writer lives
        if handle is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(handle)


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
