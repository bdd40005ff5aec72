"""An output that is not finished: a folder beside the target, with a journal of what is in it already.

Whoever writes it holds a lock on the journal, which the system lets go when the process ends, however it ends. At the
end the output takes the target's place in one step.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from ..errors import ExistsError
from .layout import Written

try:
    import fcntl
except ImportError:  # a system without locks on files
    fcntl = None  # type: ignore[assignment]

__all__ = ["Partial", "begun", "sync", "sync_folder", "take_place"]

LONGEST = 200
"""Bytes of the target's name that the folder's own has; systems allow 255."""


class Partial:
    """A folder that is being filled.

    Args:
        folder: beside the target.
        journal: the descriptor of its journal, locked.
    """

    def __init__(self, folder: Path, journal: int) -> None:
        self.folder, self._journal = folder, journal
        self.complete = folder / "complete"  # what takes the target's place, or holds the file that does

    def note(self, written: Written) -> None:
        """Add a chunk to the journal, whole or not at all."""
        self._add(["written", *written])

    def ready(self, new: Path) -> None:
        """Note that everything is on disk, and which inode takes the target's place now."""
        found = new.stat()
        self._add(["ready", found.st_dev, found.st_ino])
        os.fsync(self._journal)

    def begin(self, digest: str) -> None:
        """Note what the output will be."""
        self._add(["begun", digest])
        os.fsync(self._journal)
        sync_folder(self.folder.parent)

    def _add(self, entry: list[Any]) -> None:
        os.write(self._journal, f"{json.dumps(entry)}\n".encode())  # one write at the end of the file

    def entries(self) -> list[list[Any]]:
        """What the journal holds; a last line that was cut off does not count."""
        found: list[list[Any]] = []
        with (self.folder / "journal").open("rb") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    break
                if not line.endswith(b"\n") or not isinstance(entry, list) or not entry:
                    break
                found.append(cast("list[Any]", entry))
        return found

    def remove(self) -> None:
        """Remove the folder, the journal last: a folder without one holds nothing that anybody could miss."""
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != "journal":
                path.unlink()
        (self.folder / "journal").unlink()
        self.folder.rmdir()
        sync_folder(self.folder.parent)


def folder_of(target: Path) -> Path:
    """The folder for an unfinished target, always the same."""
    name = target.name
    if len(os.fsencode(name)) > LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return target.parent / f".{name}.partial"


@contextmanager
def begun(target: Path, digest: str, *, resume: bool) -> Generator[Partial]:
    """The folder of an unfinished target: a new one, or the one that is there, if it is to be continued.

    Afterwards it is gone; only where something fails and it was to be continued does it stay.

    Args:
        target: what is to be written.
        digest: of the result; what is continued must be of the same.
        resume: whether to continue.

    Raises:
        ExistsError: another process writes there now, or what is there is unfinished and is not to be continued, or is
            of another result.
    """
    folder = folder_of(target)
    journal = _locked(folder, target)
    partial = Partial(folder, journal)
    try:
        entries = partial.entries()
        _check_left(target, folder, entries, digest, resume)
        partial.complete.mkdir(exist_ok=True)
        if not entries:
            os.ftruncate(journal, 0)
            partial.begin(digest)
        try:
            yield partial
        except BaseException as error:
            if resume and any(entry[0] == "written" for entry in partial.entries()):
                error.add_note(f"what was written is kept in {os.fspath(folder)!r}; the same call continues it")
            else:
                partial.remove()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                error.add_note(f"the disk is full: {os.fspath(target)!r} was not written; what was there is untouched")
            raise
        partial.remove()
    finally:
        os.close(journal)


def _locked(folder: Path, target: Path) -> int:
    """The descriptor of the journal in a folder, made where it is absent, and locked."""
    busy = ExistsError(f"{os.fspath(target)!r} is being written by another process; wait for it, or use another name")
    while True:
        folder.mkdir(exist_ok=True)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
            journal = os.open(folder / "journal", flags, 0o666)
        except FileNotFoundError:  # another process has finished just now, and removed the folder
            continue
        try:
            if fcntl is not None:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(journal), (folder / "journal").stat()):
                return journal
        except BlockingIOError:
            os.close(journal)
            raise busy from None
        except FileNotFoundError:
            pass
        except OSError:  # a file system without locks
            return journal
        os.close(journal)


def _check_left(target: Path, folder: Path, entries: list[list[Any]], digest: str, resume: bool) -> None:
    """Refuse what another run has left, unless this one continues it."""
    if not entries:
        return
    written = sum(entry[0] == "written" for entry in entries)
    what = f"{os.fspath(folder)!r} holds an unfinished {target.name!r} of an earlier save() ({written} pieces)"
    if not resume:
        raise ExistsError(f"{what}; use resume=True to continue it, or remove that folder")
    if entries[0] != ["begun", digest]:
        raise ExistsError(
            f"{what}, which is of another result: other inputs, options or versions, or tensors in memory without "
            "resume=True; remove that folder"
        )


# --- the target's place ----------------------------------------------------------------------------------------------

NOREPLACE, EXCHANGE = 1, 2
_HERE = -100  # AT_FDCWD


def take_place(new: Path, target: Path, aside: Path, *, overwrite: bool) -> None:
    """Give a finished file or folder its place, in one step where the system can.

    Args:
        new: what takes it.
        target: the place.
        aside: where an old folder goes for a moment, if two steps are needed.
        overwrite: whether something may be there.

    Raises:
        ExistsError: something is there, and overwrite is false.
    """
    if not overwrite:
        try:
            if not _renameat2(new, target, NOREPLACE):
                _rename_into_nothing(new, target)
        except FileExistsError:
            raise ExistsError(
                f"{os.fspath(target)!r} was written by somebody else meanwhile; it is left as it is"
            ) from None
    elif target.is_dir() and not _renameat2(new, target, EXCHANGE):
        target.replace(aside)  # between the two the old folder lies beside its place, whole
        try:
            new.replace(target)
        except BaseException:
            aside.replace(target)
            raise
    elif not target.is_dir():
        new.replace(target)


def _rename_into_nothing(new: Path, target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise FileExistsError
    new.replace(target)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Rename with flags; False where the system or the file system cannot."""
    rename = None if os.name != "posix" else getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(source), _HERE, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(source), None, os.fspath(target))


def keep_owner(old: Path, new: Path) -> None:
    """Give something the mode and the owner of what it replaces, as far as that is allowed."""
    found = old.stat()
    if hasattr(os, "chown"):
        with suppress(PermissionError):
            os.chown(new, found.st_uid, found.st_gid)
    new.chmod(stat.S_IMODE(found.st_mode))


def sync(path: Path) -> None:
    """Bring a file to the disk."""
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk: a rename is there when its folder is."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
