"""Replacing a directory whole.

New files are written to a sibling, flushed to disk, and the two directories change places in one system call where
there is one (Linux ``renameat2``, macOS ``renamex_np``): at any moment, also of a crash or a power cut, the path is the
old directory or the new one. What else the old one held then follows by renaming, and is never copied or deleted: files
are linked into the new one beforehand, subdirectories are missing between two system calls, and a crash there leaves
them to the next save. On a file system without that call (some network ones) there are two renames.

The sibling's name tells the next save what a killed one left: ``.NAME.writing-…`` holds half-written files and nothing
of anybody else's; ``.NAME.saving-…``, as it is called from when it is complete, may be the old directory;
``.NAME.previous-…`` is the old one, left exactly between two renames.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from pathlib import Path

from .errors import CheckpointError

NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def expect_replaceable(path: str | os.PathLike[str]) -> None:
    """Raise :class:`CheckpointError` where no directory can be put: to be asked before the work that would go there."""
    try:
        found = _in_the_way(path)
    except (OSError, ValueError) as error:  # a directory that may not be searched, a name that no file can have
        found = str(error)
    if found is not None:
        raise CheckpointError(f"{path or '.'}: expected a directory to write, or nothing yet, got {found}")


def _in_the_way(path: str | os.PathLike[str]) -> str | None:
    real = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):  # who works in a directory that is gone stands in nobody's way
        here = Path.cwd()
        if here.is_relative_to(real):  # whoever works in it, a shell too, would be left in a directory that is gone
            return "the current one" if real == here else "one that holds the current one"
    there = next((parent for parent in real.parents if parent.exists()), real)
    if real.exists() and not real.is_dir():
        return "a file"
    if os.path.ismount(real):
        return "a mount point, which cannot be replaced"
    if not there.is_dir():
        return f"{there}, a file"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there}, which cannot be written in"
    if real.exists():
        inside = [entry.path for entry in os.scandir(real) if entry.is_dir(follow_symlinks=False)]
        for folder in (str(real), *inside):
            if folder != str(real) and os.path.ismount(folder):
                return f"one with a mount point in it, which cannot be moved: {folder}"
            if not os.access(folder, os.W_OK) and os.stat(folder).st_uid != os.geteuid():
                return f"{folder}, a directory of another user, which cannot be moved"
    return None


def replace_directory(path: Path, write: Callable[[Path], None], names: Collection[str]) -> None:
    """Make ``path`` the directory that ``write`` fills; entries of the old one not in ``names`` are carried over."""
    expect_replaceable(path)
    path = Path(os.path.realpath(path))  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path, names)
    with ExitStack() as locks:
        fresh, lock = _fresh_beside(path)
        locks.callback(_release, lock)
        try:
            mode = stat.S_IMODE(fresh.stat().st_mode)  # as the umask has it
            fresh.chmod(mode & ~0o077)  # what is written may be going into a directory that others must not read
            write(fresh)
            for file in fresh.iterdir():
                file.chmod(mode & 0o666)  # whatever the writer thinks of others
                _flush(file)
            _flush(fresh)
            fresh = fresh.rename(_beside(path, "saving"))
            while (found := _put(fresh, path, names, locks, mode)) is None:
                pass  # another save was first: its other files are carried over too
            _flush(path.parent)
        finally:
            if fresh.exists():  # the old directory, or what an error left
                _clear(fresh, path, names, newest=True)
        if found != found | stat.S_IRWXU:
            path.chmod(found)  # nobody may write in it: last, for what has followed had to


def _fresh_beside(path: Path) -> tuple[Path, int]:
    """A new directory, and the lock that tells the next save that this one is alive."""
    while True:
        fresh = _beside(path, "writing")
        fresh.mkdir()
        if (lock := _locked(fresh)) is not None:
            return fresh, lock
        # taken for stale before it was locked


def _locked(path: Path) -> int | None:
    """A directory opened and locked; None where there is none, or another one by the time it is locked."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    same = False
    try:
        _lock(handle, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            same = os.path.samestat(os.fstat(handle), os.stat(path))
    finally:
        if not same:
            _release(handle)
    return handle if same else None


def _lock(handle: int, mode: int) -> bool:
    """Lock an open directory; False where its file system (some network ones) has no locks, and saves go without."""
    try:
        fcntl.flock(handle, mode)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def _release(handle: int) -> None:
    _lock(handle, fcntl.LOCK_UN)  # a child that was forked meanwhile shares the lock, and would keep it
    os.close(handle)


def _put(fresh: Path, path: Path, names: Collection[str], locks: ExitStack, mode: int) -> int | None:
    """Let ``fresh`` become ``path``: the mode to have, ``mode`` of a new one. None where another save came between."""
    if not path.exists():
        for left in left_beside(path):  # another save is between its two renames, or has died there
            with suppress(OSError):
                if (previous := _locked(left)) is not None:
                    _release(previous)
        recover(path, names)
        if path.exists():
            return None
        fresh.chmod(mode)
        try:
            fresh.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return None
            raise
        return mode
    if (old := _locked(path)) is None:
        return None
    locks.callback(_release, old)  # another save of this path waits until this one is done
    found = os.fstat(old)
    mode = stat.S_IMODE(found.st_mode)
    for made in (fresh, *(file for file in fresh.iterdir() if file.name in names)):
        with suppress(OSError):  # a group that one is no member of, or that is unknown in a container
            os.chown(made, -1, found.st_gid)
    fresh.chmod(mode | stat.S_IRWXU)
    for entry in os.scandir(path):
        if not _is_own(Path(entry), names) and not entry.is_dir(follow_symlinks=False):
            with suppress(OSError):  # no hard links here: it is moved
                os.link(entry.path, fresh / entry.name, follow_symlinks=False)
    _flush(fresh)
    exchange(fresh, path)
    return mode


def _is_own(entry: Path, names: Collection[str]) -> bool:
    """Whether an entry is one of ``names``, in other letters too where the file system makes no difference."""
    same = entry.with_name(entry.name.casefold())
    return entry.name in names or (
        same.name in names and same.exists() and os.path.samestat(same.lstat(), entry.lstat())
    )


def _clear(left: Path, path: Path, names: Collection[str], *, newest: bool) -> None:
    """Remove what a save of ``path`` made beside it; what is somebody else's in it goes to ``path``."""
    if left in left_beside(path, "writing"):
        shutil.rmtree(left)
    else:
        _empty(left, path, names, newest)


def _empty(old: Path, path: Path, names: Collection[str], newest: bool) -> None:
    """Remove a directory and its ``names``; what else is in it goes to ``path``. Raises :class:`OSError`: it stays."""
    _make_writable(old)
    while True:
        for entry, own in [(entry, _is_own(entry, names)) for entry in old.iterdir()]:
            if own:
                entry.unlink()
            else:
                _move(entry, path / entry.name, newest)
        try:
            return old.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise  # else someone has written in it since it was listed


def _move(source: Path, target: Path, newest: bool) -> None:
    """Rename. Where both are there, directories become one, and of two files the target or the ``newest`` stays."""
    here = source.lstat()
    is_folder = stat.S_ISDIR(here.st_mode)
    try:
        there = target.lstat()
    except FileNotFoundError:
        changed = is_folder and _make_writable(source)  # or its parent could not be another one
        source.rename(target)
        if changed:
            target.chmod(stat.S_IMODE(here.st_mode))
        return
    if is_folder and stat.S_ISDIR(there.st_mode):
        _empty(source, target, (), newest)
    elif newest and here.st_mtime_ns > there.st_mtime_ns:
        source.replace(target)
    else:
        source.unlink()


def _make_writable(folder: Path) -> bool:
    if os.access(folder, os.W_OK | os.X_OK):
        return False
    folder.chmod(stat.S_IMODE(folder.stat().st_mode) | stat.S_IRWXU)
    return True


def recover(path: Path, names: Collection[str]) -> None:
    """Put back what killed saves of ``path`` left beside it, and remove the rest; what is in use stays."""
    previous = left_beside(path)
    for left in (*previous, *left_beside(path, "saving"), *left_beside(path, "writing")):
        with suppress(OSError):  # its writer lives or has just ended, or something in it cannot be moved
            handle = os.open(left, os.O_RDONLY)
            try:
                alone = _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if left in previous and not path.exists():
                    left.rename(path)
                elif alone and os.path.samestat(os.fstat(handle), os.stat(left)):
                    _clear(left, path, names, newest=False)
            finally:
                _release(handle)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{secrets.token_hex(4)}")


def left_beside(path: Path, kind: str = "previous") -> list[Path]:
    """What killed saves left: ``previous``, ``saving`` or ``writing``, as this module's first lines say."""
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.{kind}-" + "[0-9a-f]" * 8))


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
    previous = _beside(b, "previous")
    b.rename(previous)
    try:
        a.rename(b)
    except OSError:
        previous.rename(b)
        raise
    previous.rename(a)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
