"""What is checked of a path before anything in it is believed: its kind, its size, where it leads, that it stays."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import FormatError, LocationError

__all__ = ["SMALL", "Stamp", "check_same", "member", "regular", "small", "stamp_of"]

SMALL = 100_000_000
"""Bytes; an index or a configuration is never longer, and neither is a header that safetensors accepts."""


class Stamp(NamedTuple):
    """What differs once a file was written anew or replaced.

    Attributes:
        device: of the file system; None for any, since another machine may give the same one another number.
        inode: of the file.
        size: bytes.
        changed: the time of the last change, in nanoseconds.
    """

    device: int | None
    inode: int
    size: int
    changed: int

    def anywhere(self) -> "Stamp":
        """The stamp as another process compares it, maybe on another machine."""
        return self._replace(device=None)


def stamp_of(found: os.stat_result) -> Stamp:
    """The stamp of a file, by what the system says of its path or of its descriptor."""
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def check_same(path: str, opened: Stamp, now: Stamp) -> None:
    """Refuse a file that is not what it was when it was opened.

    Raises:
        FormatError: the stamps differ.
    """
    if opened[1:] != now[1:] or opened.device not in (None, now.device):
        raise FormatError(f"{path!r} was changed after it was opened; load() it again")


def regular(path: Path) -> Path:
    """The path, refused unless it is that of a regular file: a pipe would wait for a writer, a device never end."""
    if path.exists() and not path.is_file():
        raise FormatError(f"{os.fspath(path)!r} is not a regular file")
    return path


def small(path: Path) -> bytes:
    """The contents of an index or a configuration.

    Raises:
        FormatError: more than such a file ever has, or no regular file.
    """
    size = regular(path).stat().st_size
    if size > SMALL:
        raise FormatError(
            f"{os.fspath(path)!r} must be at most {SMALL:,} bytes to be an index or a configuration; it has {size:,}; "
            "download or save it again"
        )
    with path.open("rb") as file:
        return file.read(size)


def member(folder: Path, name: str) -> Path:
    """The path of a file in a folder, refused if it is a link that leads out of the folder.

    Whoever made the folder could else have any file of the user's read, and saved with the result. A Hub cache keeps
    its files in `blobs`, beside the `snapshots` that link to them: such links are followed.

    Raises:
        FormatError: it leads elsewhere, or to no regular file.
        LocationError: it leads nowhere.
    """
    path = folder / name
    if path.is_symlink():
        place, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
        if not any(place.is_relative_to(allowed) for allowed in (home, *_blobs(home))):
            raise FormatError(
                f"{os.fspath(path)!r} is a link that leads out of its folder, to {os.fspath(place)!r}; copy that file "
                "into the folder, or give the file itself to load()"
            )
        if not place.exists():
            raise LocationError(f"{os.fspath(path)!r} is a link to {os.fspath(place)!r}, which is not there")
    return regular(path)


def _blobs(folder: Path) -> Iterator[Path]:
    """The blobs of a Hub cache, `<repository>/blobs`, if a folder is in `<repository>/snapshots/<commit>`."""
    commit = next((part for part in (folder, *folder.parents) if part.parent.name == "snapshots"), None)
    if commit is not None:
        yield commit.parent.parent / "blobs"
