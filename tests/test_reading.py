"""Reading what others wrote: files that change under us, links, and small files that would take a lot of memory."""

import codecs
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from taskvec import TaskVector, load, save, save_adapter
from taskvec._engine.run import entries_of
from taskvec._files import paths
from taskvec._files import safetensors as safetensors_module
from taskvec.errors import DtypeError, FormatError, LocationError, OptionError

CHANGED = "was changed after it was opened; load() it again"
LONG = 3 << 20  # entries of several chunks


def model(value: float = 1.0, entries: int = 5) -> dict[str, Tensor]:
    return {"v": torch.full((3,), value), "w": torch.full((entries,), value)}


# files that change


def rewrite(path: Path) -> None:
    """The same number of bytes, in place, later."""
    before = path.stat()
    content = path.read_bytes().replace(struct.pack("<f", 1), struct.pack("<f", 2))
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def replace(path: Path) -> None:
    """Another file of the same size and time, by a rename."""
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(8))


CHANGES = [rewrite, replace, truncate, grow]


def in_a_file(folder: Path, entries: int) -> tuple[Path, Path]:
    """A model of ones: what is loaded, and the file that then changes."""
    save(model(entries=entries), folder / "m.safetensors")
    return folder / "m.safetensors", folder / "m.safetensors"


def in_shards(folder: Path, entries: int) -> tuple[Path, Path]:
    save(model(entries=entries), folder / "m", max_shard_size=12)
    return folder / "m", folder / "m" / "model-00002-of-00002.safetensors"


def in_a_pickle(folder: Path, entries: int) -> tuple[Path, Path]:
    torch.save(model(entries=entries), folder / "m.pt")
    return folder / "m.pt", folder / "m.pt"


STORED = [in_a_file, in_shards, in_a_pickle]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("stored", STORED)
def test_a_file_that_changed_after_it_was_opened_is_not_read(tmp_path, stored, change):
    path, file = stored(tmp_path, 500)
    opened = load(path)
    assert opened["w"].eq(1).all()
    sent = pickle.loads(pickle.dumps(opened))
    change(file)
    for one in (opened, sent):
        with pytest.raises(FormatError, match=CHANGED.replace("(", r"\(").replace(")", r"\)")):
            one["w"]


@pytest.mark.parametrize("change", [rewrite, replace, grow])  # a mapped file that is cut ends the interpreter
@pytest.mark.parametrize("stored", STORED)
def test_a_file_that_changes_between_two_blocks_is_not_mixed(tmp_path, monkeypatch, stored, change):
    path, file = stored(tmp_path, LONG)
    opened = load(path)
    real, seen = paths.stamp_of, []

    def changing(found: os.stat_result) -> paths.Stamp:
        seen.append(found)
        if len(seen) == 3:  # before the second block is read
            change(file)
            found = file.stat()
        return real(found)

    monkeypatch.setattr(safetensors_module, "stamp_of", changing)
    monkeypatch.setattr("taskvec._files.pickles.stamp_of", changing)
    with pytest.raises(FormatError, match="was changed after it was opened"):
        opened["w"]
    assert len(seen) == 3


@pytest.mark.parametrize("change", [rewrite, grow, truncate])
def test_a_file_that_changes_while_a_block_is_read_is_not_mixed(tmp_path, monkeypatch, change):
    path, file = in_a_file(tmp_path, 500)
    opened, header = load(path), safetensors_module._described

    def changing(*args):
        found = header(*args)
        change(file)
        return found

    monkeypatch.setattr(safetensors_module, "_described", changing)
    with pytest.raises(FormatError, match="was changed after it was opened"):
        opened["w"]


@pytest.mark.parametrize("name", ["base.safetensors", "base"])
def test_a_vector_whose_result_was_saved_over_its_base_is_not_applied_twice(tmp_path, name):
    base, tuned = {"w": torch.arange(6.0)}, {"w": torch.arange(6.0) + 1}
    save(base, tmp_path / name)
    save(tuned, tmp_path / "tuned")
    v = TaskVector.between(load(tmp_path / name), load(tmp_path / "tuned"))
    result = v.apply(load(tmp_path / name))
    save(result, tmp_path / name, overwrite=True)
    for ask in (lambda: v["w"], v.norm, lambda: result["w"], lambda: save(result, tmp_path / "again")):
        with pytest.raises(FormatError, match="was changed after it was opened"):
            ask()
    assert not (tmp_path / "again").exists()
    assert load(tmp_path / name)["w"].equal(tuned["w"])
    assert TaskVector.between(load(tmp_path / name), load(tmp_path / "tuned"))["w"].eq(0).all()


def test_a_file_is_equal_to_itself_as_long_as_it_stays(tmp_path):
    for stored in STORED:
        path, file = stored(tmp_path, 500)
        first = load(path).source
        assert load(path).source == first
        rewrite(file)
        assert load(path).source != first


def test_the_header_of_a_replaced_file_is_read_anew(tmp_path):
    """Also where size and time are the same."""
    path = tmp_path / "m.safetensors"
    save({"a": torch.ones(2)}, path)
    assert list(load(path)) == ["a"]
    before = path.stat()
    save({"b": torch.ones(2)}, path, overwrite=True)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert list(load(path)) == ["b"]


def test_another_machine_may_number_the_file_system_otherwise(tmp_path):
    path, _ = in_a_file(tmp_path, 5)
    state = load(path).source.__getstate__()
    assert [stamp.device for stamp in state["stamps"].values()] == [None]
    here = paths.stamp_of(path.stat())
    paths.check_same("f", here.anywhere(), here)
    with pytest.raises(FormatError, match="'f' was changed"):
        paths.check_same("f", here._replace(device=-1), here)


# links


def safetensors_folder(folder: Path) -> str:
    save(model(), folder)
    return "model.safetensors"


def sharded_folder(folder: Path) -> str:
    save(model(), folder, max_shard_size=12)
    return "model-00001-of-00002.safetensors"


def index_of(folder: Path) -> str:
    sharded_folder(folder)
    return "model.safetensors.index.json"


def pickle_folder(folder: Path) -> str:
    folder.mkdir()
    torch.save(model(), folder / "pytorch_model.bin")
    return "pytorch_model.bin"


def pickle_shards(folder: Path) -> str:
    folder.mkdir()
    names = {name: f"pytorch_model-{i:05d}-of-00002.bin" for i, name in enumerate(model(), 1)}
    for name, file in names.items():
        torch.save({name: model()[name]}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    return names["w"]


def pickle_index(folder: Path) -> str:
    pickle_shards(folder)
    return "pytorch_model.bin.index.json"


def adapter_weights(folder: Path) -> str:
    save_adapter(TaskVector({"layer.weight": torch.ones(3, 4)}), folder, rank=1)
    return "adapter_model.safetensors"


def adapter_config(folder: Path) -> str:
    adapter_weights(folder)
    return "adapter_config.json"


FOLDERS = [
    *(safetensors_folder, sharded_folder, index_of, pickle_folder, pickle_shards, pickle_index),
    *(adapter_weights, adapter_config),
]


@pytest.mark.parametrize("made", FOLDERS)
def test_a_link_out_of_a_folder_is_refused_by_name(tmp_path, made):
    name = made(tmp_path / "m")
    expected = dict(load(tmp_path / "m"))
    (tmp_path / "m" / name).rename(tmp_path / "secret")
    (tmp_path / "m" / name).symlink_to("../secret")
    with pytest.raises(FormatError, match=rf"{name}' is a link that leads out of its folder, to '.*/secret'; copy"):
        load(tmp_path / "m")
    (tmp_path / "m" / "within").mkdir()
    (tmp_path / "secret").rename(tmp_path / "m" / "within" / "file")
    (tmp_path / "m" / name).unlink()
    (tmp_path / "m" / name).symlink_to("within/file")
    found = load(tmp_path / "m")
    assert all(found[n].equal(x) for n, x in expected.items())


@pytest.mark.parametrize("made", FOLDERS)
@pytest.mark.parametrize("inner", ["", "variant"])
def test_links_of_a_hub_cache_are_followed(tmp_path, made, inner):
    repository = tmp_path / "models--org--name"
    commit = repository / "snapshots" / "abc"
    commit.mkdir(parents=True)
    folder = commit / inner if inner else commit
    if not inner:
        commit.rmdir()
    name = made(folder)
    expected = dict(load(folder))
    (repository / "blobs").mkdir()
    (folder / name).rename(repository / "blobs" / "123")
    (folder / name).symlink_to(os.path.relpath(repository / "blobs" / "123", folder))
    found = load(folder)
    assert all(found[n].equal(x) for n, x in expected.items())
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    assert load(linked).keys() == found.keys()
    (repository / "blobs" / "123").rename(repository / "123")
    (folder / name).unlink()
    (folder / name).symlink_to(os.path.relpath(repository / "123", folder))
    with pytest.raises(FormatError, match="leads out of its folder"):
        load(folder)


def test_blobs_beside_any_folder_are_no_cache(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    save(model(), tmp_path / "a" / "b" / "m")
    (tmp_path / "a" / "blobs").mkdir()
    (tmp_path / "a" / "b" / "m" / "model.safetensors").rename(tmp_path / "a" / "blobs" / "x")
    (tmp_path / "a" / "b" / "m" / "model.safetensors").symlink_to("../../blobs/x")
    with pytest.raises(FormatError, match="leads out of its folder"):
        load(tmp_path / "a" / "b" / "m")


def test_a_path_that_is_named_may_be_a_link(tmp_path):
    for made, path in ((in_a_file, "f"), (in_shards, "s"), (in_a_pickle, "p")):
        (tmp_path / path).mkdir()
        target, _ = made(tmp_path / path, 5)
        link = tmp_path / f"link{target.suffix}"
        link.symlink_to(target)
        assert load(link)["w"].eq(1).all()
        link.unlink()


@pytest.mark.parametrize("made", [safetensors_folder, pickle_folder])
def test_a_link_to_nothing_is_said(tmp_path, made):
    name = made(tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    (tmp_path / "m" / name).symlink_to("gone")
    with pytest.raises(LocationError, match=r"is a link to '.*gone', which is not there"):
        load(tmp_path / "m")


def test_files_that_are_carried_may_not_be_links_out_of_the_folder(tmp_path):
    save(model(), tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "key").write_text("secret")
    (tmp_path / "m" / "tokenizer.json").symlink_to("../key")
    with pytest.raises(FormatError, match=r"tokenizer.json' is a link that leads out of its folder"):
        save(model(), tmp_path / "out", like=tmp_path / "m")


# an index or a configuration


@pytest.mark.parametrize("made", [index_of, pickle_index, adapter_config])
def test_an_index_or_a_configuration_that_is_too_long_is_not_read(tmp_path, monkeypatch, made):
    path = tmp_path / "m" / made(tmp_path / "m")
    os.truncate(path, 1 << 40)
    monkeypatch.setattr(Path, "read_bytes", None)
    monkeypatch.setattr(Path, "read_text", None)
    with pytest.raises(
        FormatError, match=rf"{path.name}' must be at most 100,000,000 bytes .*; it has 1,099,511,627,776"
    ):
        load(tmp_path / "m")


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes")
@pytest.mark.parametrize("made", [index_of, pickle_index, adapter_config])
@pytest.mark.parametrize("what", ["zero", "pipe", "folder"])
def test_an_index_or_a_configuration_that_is_no_file_is_refused_at_once(tmp_path, made, what):
    path = tmp_path / "m" / made(tmp_path / "m")
    path.unlink()
    if what == "zero":
        path.symlink_to("/dev/zero")
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(FormatError, match="is not a regular file|leads out of its folder"):
        load(tmp_path / "m")


# shards of pickles


def write_pickles(folder: Path, shards: dict[str, dict[str, Tensor]], weight_map: dict[str, str] | None = None) -> None:
    folder.mkdir(exist_ok=True)
    for file, tensors in shards.items():
        torch.save(tensors, folder / file)
    index = {"weight_map": weight_map or {name: file for file, tensors in shards.items() for name in tensors}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


ONE, TWO = (f"pytorch_model-{i:05d}-of-00002.bin" for i in (1, 2))


def test_shards_of_pickles_are_one_lazy_model(tmp_path):
    shared = torch.arange(4.0)
    write_pickles(tmp_path / "m", {ONE: {"a": shared, "c": torch.ones(2)}, TWO: {"b": torch.arange(3.0)}})
    found = load(tmp_path / "m")
    assert {name: x.tolist() for name, x in found.items()} == {"a": [0, 1, 2, 3], "c": [1, 1], "b": [0, 1, 2]}
    assert "9 entries" in repr(found)
    save(found, tmp_path / "out")
    assert load(tmp_path / "out")["b"].equal(torch.arange(3.0))
    v = TaskVector.between(found, load(tmp_path / "out"))
    assert pickle.loads(pickle.dumps(v))["a"].eq(0).all()


def test_tied_weights_within_a_shard_stay_tied(tmp_path):
    for i in range(2):
        shared = torch.full((2, 2), float(i))
        write_pickles(tmp_path / str(i), {ONE: {"x": torch.ones(1)}, TWO: {"head": shared, "embed": shared}})
    models = [load(tmp_path / str(i)) for i in range(2)]
    assert models[0].tied == {"embed": "head"}
    v = TaskVector.between(*models)
    assert list(v) == ["x", "head"]
    assert v.apply(models[0])["embed"].eq(1).all()


@pytest.mark.parametrize("shard", ["../secret.bin", "/etc/passwd", "a/b.bin", ".."])
def test_an_index_of_pickles_may_not_point_out_of_its_folder(tmp_path, shard):
    torch.save({"w": torch.ones(1)}, tmp_path / "secret.bin")
    write_pickles(tmp_path / "m", {}, {"w": shard})
    with pytest.raises(FormatError, match="not a file of its own folder"):
        load(tmp_path / "m")


def test_a_missing_shard_of_pickles_and_one_that_differs_from_its_index_are_named(tmp_path):
    write_pickles(tmp_path / "m", {ONE: {"a": torch.ones(1)}, TWO: {"b": torch.ones(1)}})
    torch.save({"c": torch.ones(1)}, tmp_path / "m" / TWO)
    with pytest.raises(FormatError, match=f"'{TWO}' lacks 'b'"):
        load(tmp_path / "m")
    torch.save({"b": torch.ones(1), "a": torch.ones(1)}, tmp_path / "m" / TWO)
    with pytest.raises(FormatError, match=f"'{TWO}' also holds 'a'"):
        load(tmp_path / "m")
    (tmp_path / "m" / TWO).unlink()
    with pytest.raises(LocationError, match=f"'{TWO}', which is not there"):
        load(tmp_path / "m")


def test_a_shard_with_code_in_it_is_not_run(tmp_path):
    write_pickles(tmp_path / "m", {ONE: {"a": torch.ones(1)}}, {"a": ONE, "b": TWO})
    (tmp_path / "m" / TWO).write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(FormatError, match=TWO):
        load(tmp_path / "m")


# pickles that would take a lot of memory


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(x: str) -> bytes:
    return b"X" + struct.pack("<I", len(x)) + x.encode()


def number(x: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", x)


def archive(path: Path, body: bytes, storages: tuple[bytes, ...] = (bytes(16),), how: int = zipfile.ZIP_STORED) -> None:
    """A pickle as torch would keep it."""
    with zipfile.ZipFile(path, "w", how) as file:
        file.writestr("m/data.pkl", body)
        file.writestr("m/version", "3\n")
        for i, data in enumerate(storages):
            file.writestr(f"m/data/{i}", data)


def storage(entries: int, key: str = "0", more: bytes = b"") -> bytes:
    kind = text("storage") + named("torch", "FloatStorage")
    return b"(" + kind + text(key) + text("cpu") + number(entries) + more + b"tQ"


def tensor(stored: bytes, size: int, stride: int = 1) -> bytes:
    rebuild = named("torch._utils", "_rebuild_tensor_v2") + b"(" + stored
    shape = b"K\0" + number(size) + b"\x85" + number(stride) + b"\x85\x89"
    return rebuild + shape + named("collections", "OrderedDict") + b")RtR"


def state_dict(**tensors: bytes) -> bytes:
    return b"\x80\x02}" + b"".join(text(name) + x + b"s" for name, x in tensors.items()) + b"."


def old_format(path: Path, body: bytes, storages: dict[str, bytes]) -> None:
    """The format before torch 1.6: five pickles, then the storages."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
    parts = [pickle.dumps(x, 2) for x in head] + [body, pickle.dumps(list(storages), 2)]
    path.write_bytes(b"".join(parts) + b"".join(struct.pack("<q", len(x) // 4) + x for x in storages.values()))


def many_calls(function: bytes, args: bytes) -> bytes:
    """The same call again and again, five bytes each."""
    return b"\x80\x02" + function + b"q\0" + args + b"q\1" + b"h\0h\1R" * 190_000 + b"."


MUCH = 400_000_000


def compressed(path: Path) -> None:
    archive(path, bytes(MUCH), how=zipfile.ZIP_DEFLATED)


def many_names_for_one_record(path: Path) -> None:
    """20 000 entries of the table point at the same 100 kB."""
    archive(path, state_dict(w=tensor(storage(4), 4)), (bytes(100_000),))
    content = path.read_bytes()
    size, start = struct.unpack("<II", content[-10:-2])
    table = content[start : start + size]
    last = table[table.rindex(b"PK\1\2") :]
    head = last[:28] + struct.pack("<H", len("m/data/00000")) + last[30:46]
    more = b"".join(head + f"m/data/{i:05d}".encode() for i in range(20_000))
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 20_003, 20_003, size + len(more), start, 0)
    path.write_bytes(content[:start] + table + more + end)


def a_bytearray(path: Path) -> None:
    archive(path, b"\x80\x02}" + text("w") + named("__builtin__", "bytearray") + number(MUCH) + b"\x85Rs.")


def a_string_that_doubles(path: Path) -> None:
    encode = named("_codecs", "encode")
    doubled = encode + text("0" * 1000) + text("latin1") + b"\x86R"
    for _ in range(19):
        doubled = encode + doubled + text("hex") + b"\x86R"
    archive(path, b"\x80\x02}" + text("w") + doubled + b"s.")


def tensors_by_their_class(path: Path) -> None:
    archive(path, many_calls(named("torch", "Tensor"), b"M\0\x10\x85"))


def storages_by_their_class(path: Path) -> None:
    archive(path, many_calls(named("torch.storage", "UntypedStorage"), b"M\0\x10\x85"))


def tensors_by_a_class_in_a_tuple(path: Path) -> None:
    kinds = named("torch", "Tensor") + named("torch", "Tensor")
    args = b"(" + kinds + b"M\0\x10\x85}t"
    archive(path, many_calls(named("torch._tensor", "_rebuild_from_type_v2"), args))


def empty_sets(path: Path) -> None:
    archive(path, b"\x80\x02" + b"\x8f" * 950_000 + b".")


def an_expanded_scale(path: Path) -> None:
    """Scales of a quantized tensor, one number expanded, which torch would copy."""
    scales, zeros = tensor(storage(4), MUCH // 8, 0), tensor(storage(4), MUCH // 8, 0)
    quantizer = b"(" + named("torch", "per_channel_affine") + scales + zeros + b"K\0t"
    args = b"(" + storage(4).replace(b"Float", b"QInt8") + b"K\0" + number(MUCH // 8) + b"\x85K\1\x85"
    args += quantizer + b"\x89" + named("collections", "OrderedDict") + b")Rt"
    archive(path, state_dict(w=named("torch._utils", "_rebuild_qtensor") + args + b"R"))


def an_old_storage_that_is_not_there(path: Path) -> None:
    own = storage(MUCH // 4, more=b"N")
    old_format(path, state_dict(v=tensor(own, MUCH // 4), w=tensor(own, MUCH // 4 + 1)), {})


def an_old_storage_that_would_grow(path: Path) -> None:
    own = storage(1000, more=b"N")
    old_format(path, state_dict(v=tensor(own, MUCH // 4), w=tensor(own, MUCH // 4 + 1)), {"0": bytes(4000)})


def an_expanded_tensor(path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(10**9)}, path)


HOSTILE: dict[Callable[[Path], None], str] = {
    compressed: "compressed records, which may unpack to any size: 'm/data.pkl'",
    many_names_for_one_record: r"records of 2,000,1\d\d,\d+ bytes together, and only 1,\d+,\d+ itself",
    a_bytearray: "builtins.bytearray",
    a_string_that_doubles: "_codecs.encode",
    tensors_by_their_class: r"\('torch.Tensor'\)",
    storages_by_their_class: r"\('torch.storage.UntypedStorage'\)",
    tensors_by_a_class_in_a_tuple: r"\('torch.Tensor'\)",
    empty_sets: "an empty set",
    an_expanded_scale: "holds tensors that are quantized: 'w'",
    an_old_storage_that_is_not_there: "claims tensors of more than the",
    an_old_storage_that_would_grow: "not resizable",
    an_expanded_tensor: "cover more bytes than are stored of them .*'w'; save them contiguous",
}

MEASURED = """
import resource, sys
from taskvec import load
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
try:
    found = load(sys.argv[1])
    print("loaded", end=" ")
    found["w"].sum()
except Exception as error:
    print(type(error).__name__, str(error).replace(chr(10), " ")[:300], end=" ")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.slow
def test_a_small_pickle_takes_no_large_memory(tmp_path, hostile):
    path = tmp_path / "bad.pt"
    hostile(path)
    assert path.stat().st_size < 2_000_000
    with pytest.raises((FormatError, DtypeError), match=HOSTILE[hostile]) as caught:
        load(path)
    assert "bad.pt" in str(caught.value)
    done = subprocess.run([sys.executable, "-c", MEASURED, str(path)], check=True, capture_output=True, text=True)
    *said, megabytes = done.stdout.split()
    assert said[0] in {"FormatError", "DtypeError"}
    assert int(megabytes) < 150, done.stdout


def test_what_is_small_is_loaded_though_it_is_expanded(tmp_path):
    torch.save({"w": torch.ones(1).expand(1000), "t": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "m.pt")
    assert load(tmp_path / "m.pt")["w"].eq(1).all()
    torch.save({f"w{i}": torch.ones(1).expand(100_000) for i in range(3)}, tmp_path / "m.pt")
    with pytest.raises(FormatError, match=r"'w0', 'w1', 'w2'"):
        load(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        ("sparse", lambda: torch.eye(3).to_sparse()),
        ("sparse", lambda: nn.Parameter(torch.eye(3).to_sparse_csr())),
        ("quantized", lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)),
        ("nested", lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
    ],
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("new", [True, False])
def test_tensors_that_are_no_plain_blocks_are_refused(tmp_path, kind, made, new):
    torch.save(
        {"state_dict": {"plain": torch.ones(1), "odd": made()}}, tmp_path / "m.pt", _use_new_zipfile_serialization=new
    )
    with pytest.raises(DtypeError, match=f"holds tensors that are {kind}.*save them dense") as caught:
        load(tmp_path / "m.pt")
    assert ("'odd'" in str(caught.value)) == (not isinstance(made(), nn.Parameter))
    assert "'plain'" not in str(caught.value)


def test_everything_that_checkpoints_hold_beside_weights_still_loads(tmp_path):
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    marked = torch.ones(2)
    marked.mark = "kept"  # type: ignore[attr-defined]
    parameter = nn.Parameter(torch.ones(2))
    parameter.mark = "kept"  # type: ignore[attr-defined]
    weights = layer.state_dict() | {"marked": marked, "parameter": parameter, "plain": nn.Parameter(torch.ones(1))}
    weights |= {"count": torch.ones(2, dtype=torch.uint16), "small": torch.ones(2).to(torch.float8_e4m3fn)}
    weights |= {"phase": torch.ones(2, dtype=torch.complex64), "flag": torch.tensor([True]), "none": torch.empty(0, 3)}
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    kept = {
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "seen": {1, 2},
        "z": 1j,
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
    }
    torch.save({"state_dict": weights} | kept, tmp_path / "m.ckpt")
    found = load(tmp_path / "m.ckpt")
    assert found.keys() == weights.keys()
    assert all(found[name].equal(x) for name, x in weights.items() if name != "small")


def test_what_the_user_allows_is_allowed(tmp_path):
    torch.save({"state_dict": model(), "options": Path("x")}, tmp_path / "m.pt")
    with pytest.raises(FormatError, match="holds more than tensors"):
        load(tmp_path / "m.pt")
    torch.save({"state_dict": model(), "raw": bytearray(3)}, tmp_path / "m.pt")
    with pytest.raises(FormatError, match="bytearray"):
        load(tmp_path / "m.pt")
    with torch.serialization.safe_globals([bytearray, codecs.encode]):
        assert load(tmp_path / "m.pt").keys() == model().keys()


def moved(at: int, width: int) -> Callable[[bytes], bytes]:
    """The number at a place from the end, one less."""

    def spoil(content: bytes) -> bytes:
        place = len(content) + at
        found = int.from_bytes(content[place : place + width], "little") - 1
        return content[:place] + found.to_bytes(width, "little") + content[place + width :]

    return spoil


LARGE, SMALL = True, False
SPOILT = {
    "a comment": (lambda b: b[:-2] + b"\2\0ab", "can be read in two ways"),
    "bytes after it": (lambda b: b + b"junk", "can be read in two ways"),
    "bytes before it": (lambda b: b"PK\3\4" + b, "can be read in two ways"),
    "one name": (lambda b: b.replace(b"m/data/1", b"m/data/0"), "two records of one name"),
    "one name in capitals": (lambda b: b.replace(b"m/data/1", b"M/DATA/0"), "two records of one name"),
    "an odd name": (lambda b: b.replace(b"m/data/1", b"m/data/\0"), "two records of one name"),
}
MOVED = "can be read in two ways|not an intact torch checkpoint: BadZipFile"
PLACES = {LARGE: {"table": (-50, 8), "entry": (-34, 8)}, SMALL: {"table": (-6, 4)}}


@pytest.mark.parametrize(
    ("large", "spoil", "said"),
    [
        *(pytest.param(large, *how, id=f"{name}-{large}") for large in (LARGE, SMALL) for name, how in SPOILT.items()),
        *(
            pytest.param(large, moved(*place), MOVED, id=f"{name}-{large}")
            for large, places in PLACES.items()
            for name, place in places.items()
        ),
    ],
)
def test_an_archive_that_two_readers_read_in_two_ways_is_refused(tmp_path, large, spoil, said):
    """With the entries of large archives at its end, which torch always writes, and without."""
    path = tmp_path / "m.pt"
    torch.save(model(), path)
    if not large:
        with zipfile.ZipFile(path) as file:
            records = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, content in records.items():
                file.writestr(name, content)
    assert load(path)["w"].eq(1).all()
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(FormatError, match=said):
        load(path)


def test_storages_that_claim_what_belongs_to_others_are_refused(tmp_path):
    keys = [storage(1 << 30, str(i)) for i in range(3)]  # each as long as the rest of the file
    body = state_dict(**{f"w{i}": tensor(key, 4) for i, key in enumerate(keys)})
    archive(tmp_path / "bad.pt", body, (bytes(4000),) * 3)
    with pytest.raises(FormatError, match=r"bad.pt' claims tensors of more than the 1?\d,\d+ bytes"):
        load(tmp_path / "bad.pt")


def test_the_old_format_still_loads_with_shared_storages(tmp_path):
    whole = torch.arange(8.0)
    torch.save({"a": whole, "b": whole, "part": whole[2:4]}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    found = load(tmp_path / "m.pt")
    assert found["part"].tolist() == [2, 3]
    assert found.tied == {"b": "a"}


# headers


def safetensors(header: object, body: bytes = b"") -> bytes:
    found = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(found).to_bytes(8, "little") + found + body


def entry(begin: int, end: int, dtype: str = "F32") -> str:
    shape = [(end - begin) // 4]
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


@pytest.mark.parametrize(
    "content",
    [
        (1 << 60).to_bytes(8, "little") + b"{}",
        (100_000_001).to_bytes(8, "little") + b"{}",
        safetensors(f'{{"a": {entry(0, 4)}, "a": {entry(4, 8)}}}'.encode(), bytes(8)),  # one name twice
        safetensors(f'{{"a": {entry(0, 8)}, "b": {entry(4, 12)}}}'.encode(), bytes(12)),  # overlapping
        safetensors(f'{{"a": {entry(0, 4)}, "b": {entry(0, 4)}}}'.encode(), bytes(4)),  # the same bytes
        safetensors(f'{{"a": {entry(0, 4)}}}'.encode(), bytes(8)),  # bytes of nobody
        safetensors(f'{{"a": {entry(1 << 62, (1 << 62) + 4)}}}'.encode(), bytes(4)),
        safetensors({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),  # none of ours
        safetensors({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(1)),
        safetensors([1]),
        safetensors(b"not json"),
        safetensors(b"\xff\xfe"),
        safetensors(b"[" * 100_000),
    ],
)
def test_headers_that_lie_are_refused_by_name(tmp_path, content):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"bad\.safetensors"):
        load(tmp_path / "bad.safetensors")
    with pytest.raises(FormatError, match=r"bad\.safetensors"):
        load(tmp_path)


def test_a_damaged_shard_is_named(tmp_path):
    shard = tmp_path / "m" / sharded_folder(tmp_path / "m")
    content = shard.read_bytes()
    for damaged in (b"", content[:-1], content[:20], content + b"\0"):
        shard.write_bytes(damaged)
        with pytest.raises(FormatError, match=shard.name):
            load(tmp_path / "m")


def test_a_name_in_two_shards_is_refused(tmp_path):
    sharded_folder(tmp_path / "m")
    save(model(), tmp_path / "m" / "model-00001-of-00002.safetensors", overwrite=True)
    with pytest.raises(FormatError, match="'model-00001-of-00002.safetensors' also holds"):
        load(tmp_path / "m")


def test_only_checked_blocks_are_read(tmp_path):
    """Reading a block parses no header: one that was read is kept, by the stamp of its file."""
    path, _ = in_a_file(tmp_path, LONG)
    opened = load(path)
    before = safetensors_module._described.cache_info().misses
    for start in range(0, LONG, 1 << 18):
        assert entries_of(opened.source, "w", start, start + 10).eq(1).all()
    assert safetensors_module._described.cache_info().misses == before
    with pytest.raises(OptionError):
        load(path, base=model())
