"""What is checked in a torch pickle before torch reads it, so that a short file takes no large memory.

It must unpack to no more than it is, and may call nothing but what tensors and plain values are made of. That is a
narrower list than torch's own, and a second one: nothing is run here.
"""

import os
import pickletools
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple, cast
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import torch

from .._engine.names import listed
from ..errors import DtypeError, FormatError
from .paths import SMALL

__all__ = ["check_archive", "check_bare", "refused"]

CALLED = frozenset({
    *("collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device"),
    *("builtins.set", "builtins.complex"),
    *("torch.serialization._get_layout", "torch._tensor._rebuild_from_type_v2"),
    *("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"),
    *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
    "torch._utils._rebuild_meta_tensor_no_storage",
})  # fmt: skip
"""What a pickle may call. torch allows a few more, by which a few bytes take any amount of memory: `bytearray(n)`,
`Tensor(n)`, `encode` of its own result."""

NAMED = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})
"""What it may name, beside dtypes and kinds of storage, but not call."""

FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
"""Rebuilds a tensor that has attributes; calls its first argument."""

KINDS = {
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_nested_tensor": "nested",
}
"""What rebuilds tensors that are no plain blocks of memory."""

MARK = object()


def refused(path: str, what: str) -> FormatError:
    """The error for a pickle that holds more than tensors."""
    return FormatError(
        f"{path!r} holds more than tensors ({what}), and what it holds would run as code or take any amount of memory: "
        "it is not loaded. Ask for safetensors, or for its state dict alone, or convert it where its code may run"
    )


# --- archives --------------------------------------------------------------------------------------------------------


def check_archive(path: str, file: BinaryIO) -> None:
    """Check a zip archive, as torch writes them since 1.6.

    Raises:
        FormatError: records that unpack to more than the file is, or a pickle that calls what it may not.
        DtypeError: sparse, quantized or nested tensors.
    """
    with ZipFile(file) as archive:
        records = archive.infolist()
        if archive.comment or not _one_directory(file, archive.start_dir):
            raise FormatError(f"{path!r} has a table of records that can be read in two ways; save it with torch.save")
    names = [record.orig_filename.lower() for record in records]
    if len(set(names)) < len(names) or not all(name.isascii() and name.isprintable() for name in names):
        raise FormatError(f"{path!r} has two records of one name, or odd names; save it with torch.save")
    if packed := [r.filename for r in records if r.compress_type != ZIP_STORED or r.compress_size != r.file_size]:
        raise FormatError(
            f"{path!r} has compressed records, which may unpack to any size: {listed(packed)}; save it with torch.save"
        )
    claimed, size = sum(record.file_size for record in records), file.seek(0, os.SEEK_END)
    if claimed > size:
        raise FormatError(f"{path!r} has records of {claimed:,} bytes together, and only {size:,} itself")
    for record, name in zip(records, names, strict=True):
        if name.endswith("data.pkl"):
            if record.file_size > SMALL:
                raise FormatError(f"{record.filename!r} in {path!r} must be at most {SMALL:,} bytes")
            _check_pickle(path, _record(file, record))


def _one_directory(file: BinaryIO, start: int) -> bool:
    """Whether the table of records lies where the end of the file says.

    Other readers might otherwise find another table than `zipfile` does, of records that were not checked.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 98))
    end = file.read().rjust(98, b"\0")  # of a large archive: an entry of 56 bytes, where it is in 20, one of 22
    if end[56:60] == b"PK\6\7":
        begin, place = (int.from_bytes(end[at : at + 8], "little") for at in (48, 64))
        sound = end[:4] == b"PK\6\6" and place == size - 98
    else:
        begin, sound = int.from_bytes(end[92:96], "little"), True
    return sound and end[76:80] == b"PK\5\6" and begin == start


def _record(file: BinaryIO, record: ZipInfo) -> BinaryIO:
    """The bytes of a stored record as torch reads them: without a look at its checksum."""
    file.seek(record.header_offset + 26)
    lengths = file.read(4)
    file.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), os.SEEK_CUR)
    return BytesIO(file.read(record.file_size))


# --- pickles ---------------------------------------------------------------------------------------------------------


class Name(str):
    """The name of a function or a class, on the stack of `_scanned`."""

    __slots__ = ()


class Kind(str):
    """A tensor of one of `KINDS`, on that stack."""

    __slots__ = ()


class Scan(NamedTuple):
    """What a pickle would do.

    Attributes:
        named: the functions and classes that it names.
        called: those that it calls.
        kinds: name -> kind of a tensor that is none of the plain ones.
    """

    named: set[str]
    called: set[str]
    kinds: dict[str, str]


def check_bare(path: str, file: BinaryIO) -> None:
    """Check a file of the format before torch 1.6: pickles one after the other, then the storages.

    Raises:
        FormatError: a pickle calls what it may not.
        DtypeError: sparse, quantized or nested tensors.
    """
    file.seek(0)
    for _ in range(5):  # magic number, version, system, the state dict, the order of the storages
        _check_pickle(path, file)


def _check_pickle(path: str, stream: BinaryIO) -> None:
    scan = _scanned(stream)
    user = _allowed_by_user()
    wrong = {name for name in scan.called if name not in CALLED and name not in KINDS}
    wrong |= {name for name in scan.named if not (name in CALLED or name in KINDS or name in NAMED or _is_type(name))}
    if wrong - user:
        raise refused(path, listed(sorted(wrong - user)))
    if found := sorted({KINDS[name] for name in scan.called if name in KINDS}):
        names = f": {listed(list(scan.kinds))}" if scan.kinds else ""
        raise DtypeError(
            f"{path!r} holds tensors that are {' and '.join(found)}{names}; save them dense: to_dense(), dequantize(), "
            "or one tensor for each part"
        )


def _is_type(name: str) -> bool:
    """Whether a name is that of a dtype, of a kind of quantization or of storage."""
    module, _, own = name.rpartition(".")
    if own.endswith("Storage") and own != "TypedStorage":
        return module in {"torch", "torch.storage", "torch.cuda"}
    return module == "torch" and isinstance(getattr(torch, own, None), torch.dtype | torch.qscheme)


def _allowed_by_user() -> set[str]:
    """What the user has allowed by `torch.serialization.add_safe_globals`."""
    found: list[Any] = cast("Any", torch.serialization).get_safe_globals()
    return {item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}" for item in found}


def _scanned(stream: BinaryIO) -> Scan:
    """What a pickle names and calls; nothing of it is run.

    Follows the pickle on a stack of names: of functions and classes, of strings, and tuples of such; all else is None.
    What is called is so known wherever it was kept in between.
    """
    scan = Scan(set(), set(), {})
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for op, arg, _ in pickletools.genops(stream):
        if op.name == "GLOBAL":
            module, _, own = str(arg).partition(" ")
            stack.append(Name(f"{'builtins' if module == '__builtin__' else module}.{own}"))
            scan.named.add(stack[-1])
        elif op.name in {"BINPUT", "LONG_BINPUT"}:
            memo[arg] = stack[-1]
        elif op.name in {"BINGET", "LONG_BINGET"}:
            stack.append(memo[arg])
        elif op.name in {"BINUNICODE", "SHORT_BINSTRING", "MARK"}:
            stack.append(MARK if op.name == "MARK" else arg)
        else:
            stack += _made(scan, op, _taken(stack, op))
    return scan


def _made(scan: Scan, op: pickletools.OpcodeInfo, taken: list[Any]) -> list[Any]:
    """What an operation leaves on the stack for what it took."""
    if op.name in {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"}:
        return [tuple(taken)]
    if op.name in {"REDUCE", "NEWOBJ"}:
        scan.called.update(_called(*taken))
        return [Kind(KINDS[taken[0]]) if isinstance(taken[0], Name) and taken[0] in KINDS else None]
    if op.name == "EMPTY_SET":  # one byte that takes 200; torch.save writes none
        scan.called.add("an empty set")
    if op.name in {"SETITEM", "SETITEMS"}:
        pairs = zip(taken[1::2], taken[2::2], strict=False)
        scan.kinds.update((str(key), str(kind)) for key, kind in pairs if isinstance(kind, Kind))
    return [None] * len(op.stack_after)


def _taken(stack: list[Any], op: pickletools.OpcodeInfo) -> list[Any]:
    """What an operation takes from the stack, without the mark, removed from it."""
    before = [kind.name for kind in op.stack_before]
    count = len(before)
    if "mark" in before:
        last = max(i for i, item in enumerate(stack) if item is MARK)
        count = len(stack) - last + before.index("mark")
    taken = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return [item for item in taken if item is not MARK]


def _called(function: Any, args: Any) -> list[str]:
    """What is called when a function is."""
    called = [function]
    if function == FROM_TYPE:
        called += cast("tuple[Any, ...]", args)[:1] if isinstance(args, tuple) else [None]
    return [name if isinstance(name, Name) else "a call of what it makes itself" for name in called]
