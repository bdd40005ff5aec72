"""load and save: what comes back, what is refused, what is left when something fails."""

import errno
import gc
import json
import os
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import Read
from torch import Tensor, nn

from taskvec import BackdoorVector, TaskVector, load, merge, save
from taskvec._engine.lazy import Lazy
from taskvec._engine.run import entries_of
from taskvec._engine.sources import Spec
from taskvec._files import layout as layout_module
from taskvec.errors import (
    DegenerateError,
    DtypeError,
    ExistsError,
    FormatError,
    LocationError,
    MissingError,
    OptionError,
    RangeError,
    RuleError,
)
from taskvec.merges import ties


def state(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(70, 300, generator=g),
        "a.half": torch.randn(33, generator=g).bfloat16(),
        "b.double": torch.randn(5, generator=g).double(),
        "b.scalar": torch.randn((), generator=g),
        "b.empty": torch.empty(0, 3),
        "b.flags": torch.tensor([True, False, True]),
        "b.count": torch.tensor(3),
    }


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and left[n].shape == right[n].shape and torch.equal(left[n], right[n])
        for n in left
    )


# round trips


def test_a_file_round_trips_and_other_readers_agree(tmp_path):
    save(state(), tmp_path / "m.safetensors")
    assert same(dict(load(tmp_path / "m.safetensors")), state())
    assert same(load_file(tmp_path / "m.safetensors"), state())


def test_files_of_other_writers_are_read(tmp_path):
    save_file(state(), tmp_path / "m.safetensors", metadata={"who": "them"})
    loaded = load(str(tmp_path / "m.safetensors"))
    assert same(dict(loaded), state())
    save(loaded, tmp_path / "again.safetensors", metadata={"more": "yes"})
    said = {key: text for key, text in load(tmp_path / "again.safetensors").metadata.items() if key != "provenance"}
    assert said == {"who": "them", "format": "pt", "more": "yes"}


@pytest.mark.parametrize(("size", "shards"), [(None, 1), ("1GB", 1), ("50KB", 2), (100, 3), ("1 KiB", 2)])
def test_a_folder_round_trips_for_any_shard_size(tmp_path, size, shards):
    save(state(), tmp_path / "m", max_shard_size=size)
    assert same(dict(load(tmp_path / "m")), state())
    files = list((tmp_path / "m").glob("*.safetensors"))
    assert len(files) == shards
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == (shards > 1)


def test_results_are_the_same_bits_in_memory_and_streamed(tmp_path):
    models = [state(0), *(state(0) | {k: v for k, v in state(i).items() if v.is_floating_point()} for i in (1, 2, 3))]
    for i, m in enumerate(models):
        save(m, tmp_path / str(i), max_shard_size="50KB")
    base, *tuned = (load(tmp_path / str(i)) for i in range(4))
    for options in ({"density": 0.3, "scope": "tensor"}, {"density": 0.3, "scope": "row"}):
        lazy = merge([TaskVector.between(base, t) for t in tuned], ties, **options).apply(base)
        assert isinstance(lazy, Lazy)
        save(lazy, tmp_path / "out", max_shard_size="60KB", overwrite=True)
        eager = merge([TaskVector.between(models[0], t) for t in models[1:]], ties, **options).apply(models[0])
        assert same(dict(load(tmp_path / "out")), eager)


@pytest.mark.parametrize("name", ["v.safetensors", "v"])
def test_vectors_come_back_as_themselves(tmp_path, name):
    for kind in (TaskVector, BackdoorVector):
        v = kind({"w": torch.ones(3)}, meta={"base.layout": "abc"})
        save(v, tmp_path / name, overwrite=True)
        back = load(tmp_path / name)
        assert type(back) is kind
        assert back.is_lazy
        assert back.meta == v.meta
        assert back.allclose(v)


def test_a_pickle_a_lightning_checkpoint_and_the_old_format_load(tmp_path):
    module = nn.Linear(3, 2)
    expected = {name: t.clone() for name, t in module.state_dict().items()}
    torch.save(module.state_dict(), tmp_path / "m.pt")
    torch.save({"state_dict": module.state_dict(), "epoch": 3, "lr": 0.1}, tmp_path / "m.ckpt")
    torch.save(module.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("m.pt", "m.ckpt", "old.pth"):
        assert same(dict(load(tmp_path / name)), expected)


def test_tied_weights_of_a_pickle_count_once(tmp_path):
    for i in range(2):
        shared = torch.full((2, 2), float(i))
        torch.save({"a": shared, "b": shared}, tmp_path / f"{i}.pt")
    v = TaskVector.between(load(tmp_path / "0.pt"), load(tmp_path / "1.pt"))
    assert list(v) == ["a"]
    assert v.apply(load(tmp_path / "0.pt"))["b"].eq(1).all()


def test_a_module_and_a_state_dict_are_copied_with_their_ties():
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    loaded = load(module)
    assert loaded["0.weight"].data_ptr() == loaded["1.weight"].data_ptr()
    assert loaded["0.weight"].data_ptr() != module[0].weight.data_ptr()
    assert not loaded["0.weight"].requires_grad


def test_opening_reads_headers_only(tmp_path):
    """A folder whose tensors would not fit in memory opens: the files are sparse."""
    entries = 1 << 36  # 256 GB of float32
    header = json.dumps({"w": {"dtype": "F32", "shape": [entries], "data_offsets": [0, 4 * entries]}}).encode()
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * entries)
    v = TaskVector.between(load(path), load(path))
    assert "68,719,476,736 entries" in repr(v)
    assert entries_of(v.source, "w", entries - 2, entries).eq(0).all()


def test_a_rewritten_file_is_read_anew(tmp_path):
    path = tmp_path / "m.safetensors"
    save({"w": torch.ones(2)}, path)
    first = load(path)
    assert first["w"].eq(1).all()
    save({"w": torch.ones(2) * 2}, path, overwrite=True)
    assert load(path)["w"].eq(2).all()


def test_a_model_can_be_overwritten_by_what_is_computed_from_it(tmp_path):
    path = tmp_path / "m.safetensors"
    save({"w": torch.arange(4.0)}, path)
    base = load(path)
    save(TaskVector({"w": torch.ones(4)}).apply(base), path, overwrite=True)
    assert load(path)["w"].tolist() == [1, 2, 3, 4]


def test_an_unknown_name_is_an_error_that_names_others(tmp_path):
    save(state(), tmp_path / "m.safetensors")
    with pytest.raises(MissingError, match="no tensor 'nope' here; there are 'b.double', "):
        load(tmp_path / "m.safetensors")["nope"]


# what is refused


def write_index(folder: Path, weight_map: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "a\0b"])
def test_an_index_may_not_point_out_of_its_folder(tmp_path, shard):
    save({"w": torch.ones(1)}, tmp_path / "secret.safetensors")
    with pytest.raises(FormatError, match="not a file of its own folder"):
        load(write_index(tmp_path / "m", {"w": shard}))


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(LocationError, match="'gone.safetensors', which is not there"):
        load(write_index(tmp_path / "m", {"w": "gone.safetensors"}))


@pytest.mark.parametrize("weight_map", [None, {}, ["w"], {"w": 3}])
def test_an_index_that_is_none_is_refused(tmp_path, weight_map):
    with pytest.raises(FormatError, match="weight_map"):
        load(write_index(tmp_path / "m", weight_map))
    (tmp_path / "m" / "model.safetensors.index.json").write_text("{not json")
    with pytest.raises(FormatError, match="not an index"):
        load(tmp_path / "m")


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path):
    folder = write_index(tmp_path / "m", {"w": "s.safetensors", "v": "s.safetensors"})
    save({"w": torch.ones(1)}, folder / "s.safetensors")
    with pytest.raises(FormatError, match="lacks 'v'"):
        load(folder)
    save({"w": torch.ones(1), "v": torch.ones(1), "x": torch.ones(1)}, folder / "s.safetensors", overwrite=True)
    with pytest.raises(FormatError, match="also holds 'x'"):
        load(folder)


def test_an_ambiguous_folder_is_refused(tmp_path):
    with pytest.raises(FormatError, match="neither"):
        load(tmp_path)
    for name in "ab":
        save({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FormatError, match="2 .safetensors files and no index"):
        load(tmp_path)


def safetensors_bytes(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        b"\xff" * 8,
        safetensors_bytes(b"{"),
        safetensors_bytes({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 8),  # truncated
        safetensors_bytes(
            {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, b"\0" * 8
        ),  # lies on the shape
        safetensors_bytes({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        safetensors_bytes({"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        safetensors_bytes({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),  # a hole
        safetensors_bytes({"w": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}, b"\0" * 8),
    ],
)
def test_damaged_or_lying_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"bad\.safetensors"):
        load(path)


def test_a_truncated_copy_is_refused(tmp_path):
    save(state(), tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    with pytest.raises(FormatError, match=r"cut\.safetensors"):
        load(tmp_path / "cut.safetensors")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_with_code_in_it_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(1), "bomb": Bomb()}, tmp_path / "bad.pt")
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(Bomb()))
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    for name in ("bad.pt", "raw.pkl", "module.pt"):
        with pytest.raises(FormatError, match=name.replace(".", r"\.")):
            load(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_pickle_that_holds_a_state_dict_under_a_name_is_opened(tmp_path, key):
    torch.save({key: state(), "epoch": 3}, tmp_path / "m.pt")
    assert same(load(tmp_path / "m.pt"), state())


def test_a_folder_with_one_pickle_is_opened_and_one_with_parts_but_no_index_is_refused(tmp_path):
    torch.save(state(), tmp_path / "pytorch_model.bin")
    assert same(load(tmp_path), state())
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(FormatError, match="in several parts without their index, pytorch_model.bin.index.json"):
        load(tmp_path)


def test_a_part_of_a_distributed_checkpoint_is_refused(tmp_path):
    save(state(), tmp_path / "m.safetensors", metadata={"DCP_SHARDING_INFO": "{}"})
    with pytest.raises(FormatError, match="consolidate_safetensors_files"):
        load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("content", [{"w": 3}, [torch.ones(1)], {"state_dict": [1]}, 7])
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(FormatError, match="not tensors|not a state dict"):
        load(tmp_path / "odd.pt")


def test_a_truncated_pickle_is_refused(tmp_path):
    torch.save(state(), tmp_path / "m.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "m.pt").read_bytes()[:-500])
    with pytest.raises(FormatError, match=r"cut\.pt"):
        load(tmp_path / "cut.pt")


def test_nothing_there_is_said_with_both_readings(tmp_path):
    with pytest.raises(LocationError, match="neither a file nor a folder here, nor can it be a name on the Hub"):
        load("name.safetensors")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")
    with pytest.raises(OptionError, match="got int"):
        load(3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="'a' is int"):
        load({"a": 3})  # type: ignore[dict-item]


def test_a_damaged_record_of_a_vector_is_refused(tmp_path):
    for text in ("{", '{"type": "Other", "meta": {}}', "3"):
        save({"w": torch.ones(1)}, tmp_path / "v.safetensors", metadata={"taskvec": text}, overwrite=True)
        with pytest.raises(FormatError, match="record of a task vector"):
            load(tmp_path / "v.safetensors")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b.replace(b"FloatStorage", b"FloatStorbge"),
        lambda b: b.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9"),
        lambda b: b[:40] + bytes(200) + b[240:],
    ],
)
def test_damage_to_a_pickle_is_an_error_of_ours_that_names_the_file(tmp_path, spoil):
    for name, new in (("zip.pt", True), ("old.pt", False)):
        torch.save({"w": torch.ones(4)}, tmp_path / name, _use_new_zipfile_serialization=new)
        (tmp_path / name).write_bytes(spoil((tmp_path / name).read_bytes()))
        with pytest.raises(FormatError, match=name.replace(".", r"\.")):
            load(tmp_path / name)


RECURSIVE = b"\x80\x02" + b"]" * 3 + b"a" * 2 + b"."


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"\x80\x02.", b"garbage", b"(" * 5000, RECURSIVE, b"\x80\x02K\x05.", b"\x80\x04\x95"]
)
def test_bytes_that_are_no_pickle_are_refused_by_name(tmp_path, content):
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(FormatError, match=r"bad\.pt"):
        load(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    "text",
    ['{"type": "TaskVector", "meta": 3}', '{"type": "TaskVector", "meta": {"a": 1}}', '{"type": [], "meta": {}}',
     "[" * 100_000, '{"type": "TaskVector", "meta": {"tied": "{"}}', '{"type": "TaskVector", "meta": {"tied": "[1]"}}'],
)  # fmt: skip
def test_a_record_that_lies_is_refused(tmp_path, text):
    save({"w": torch.ones(1)}, tmp_path / "v.safetensors", metadata={"taskvec": text})
    with pytest.raises(FormatError, match="record of a task vector"):
        load(tmp_path / "v.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_in_place_of_a_file_is_refused_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    os.mkfifo(tmp_path / "pipe.pt")
    folder = write_index(tmp_path / "m", {"w": "s.safetensors"})
    os.mkfifo(folder / "s.safetensors")
    (tmp_path / "one").mkdir()
    os.mkfifo(tmp_path / "one" / "model.safetensors")
    for name in ("pipe.safetensors", "pipe.pt", "m", "one"):
        with pytest.raises(FormatError, match="is not a regular file"):
            load(tmp_path / name)


def test_tensors_without_values_are_refused(tmp_path):
    torch.save({"w": torch.empty(3, device="meta")}, tmp_path / "m.pt")
    with pytest.raises(FormatError, match="meta device, which have no values: 'w'"):
        load(tmp_path / "m.pt")


def test_what_a_pickle_hands_out_is_a_copy(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "m.pt")
    first = load(tmp_path / "m.pt")
    first["w"].mul_(7)
    assert first["w"].eq(1).all()
    assert load(tmp_path / "m.pt")["w"].eq(1).all()
    again = load(tmp_path / "m.pt")
    tuned = {"w": again["w"].add_(1)}
    assert TaskVector.between(again, tuned)["w"].eq(1).all()


def test_a_pickle_that_was_written_anew_is_an_error_and_not_the_end_of_the_interpreter(tmp_path):
    torch.save({"w": torch.ones(1 << 20)}, tmp_path / "m.pt")
    opened = load(tmp_path / "m.pt")
    torch.save({"w": torch.ones(1)}, tmp_path / "m.pt")
    with pytest.raises(FormatError, match="was changed after it was opened"):
        opened["w"]


def test_a_dropped_pickle_is_freed(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "m.pt")
    opened = load(tmp_path / "m.pt")
    state = weakref.ref(opened.source._state["w"])
    del opened
    gc.collect()
    assert state() is None


# what is left when something fails


THESIS = {"config.json": "{}", "tokenizer.model": "words", "chapters/thesis.tex": "\\begin", "notes.txt": "n"}


@pytest.mark.parametrize("shards", [(None, None), (None, 100), (100, None), (100, 60)])
def test_overwriting_a_folder_replaces_its_weight_files_and_nothing_else(tmp_path, shards):
    folder = tmp_path / "model"
    models = [{f"w{i}": torch.full((20,), float(value)) for i in range(4)} for value in (1, 2)]
    save(models[0], folder, max_shard_size=shards[0])
    for name, text in THESIS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "link").symlink_to("notes.txt")
    with pytest.raises(ExistsError, match="replace its weight files and their index; all else in the folder stays"):
        save(models[1], folder)
    save(models[1], folder, max_shard_size=shards[1], overwrite=True)
    assert same(dict(load(folder)), models[1])
    assert {name: (folder / name).read_text() for name in THESIS} == THESIS
    assert (folder / "link").is_symlink()
    kept = {path.name for path in folder.iterdir()} - {
        "config.json",
        "tokenizer.model",
        "chapters",
        "notes.txt",
        "link",
    }
    fresh = tmp_path / "fresh"
    save(models[1], fresh, max_shard_size=shards[1])
    assert kept == {path.name for path in fresh.iterdir()}  # no old shard is left


def test_a_folder_whose_weights_cannot_be_told_is_not_overwritten(tmp_path):
    (tmp_path / "m").mkdir()
    for name in "ab":
        save({"w": torch.ones(1)}, tmp_path / "m" / f"{name}.safetensors")
    with pytest.raises(FormatError, match="2 .safetensors files and no index"):
        save({"w": torch.zeros(1)}, tmp_path / "m", overwrite=True)
    assert load(tmp_path / "m" / "a.safetensors")["w"].eq(1).all()


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.ckpt"])
def test_the_suffix_of_a_pickle_is_refused(tmp_path, name):
    with pytest.raises(RangeError, match=r"suffix of a pickle; .*model\.safetensors"):
        save({"w": torch.ones(1)}, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_workers_writes_the_same_file(tmp_path, workers):
    models = [
        {f"w{i}": torch.randn(300, 700, generator=torch.Generator().manual_seed(i + j)) for i in range(5)}
        for j in (0, 9)
    ]
    for i, m in enumerate(models):
        save(m, tmp_path / str(i))
    base, tuned = (load(tmp_path / str(i)) for i in range(2))
    v = TaskVector.between(base, tuned)
    result = merge([v, v * 0.5], ties, density=0.3).apply(base)
    save(result, tmp_path / "m.safetensors", workers=workers)
    save(result, tmp_path / "one.safetensors", workers=1)
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    eager = TaskVector.between(*models)
    expected = merge([eager, eager * 0.5], ties, density=0.3).apply(models[0])
    assert same(dict(load(tmp_path / "m.safetensors")), dict(expected))
    with pytest.raises(RangeError, match="workers must be at least 1"):
        save({"w": torch.ones(1)}, tmp_path / "n.safetensors", workers=0)


def test_strided_and_transposed_tensors_are_saved(tmp_path):
    odd = {"one": torch.arange(6.0)[::6], "gaps": torch.arange(6.0)[::2], "t": torch.arange(6.0).reshape(2, 3).T}
    save(odd, tmp_path / "m.safetensors")
    assert same(dict(load(tmp_path / "m.safetensors")), {name: x.contiguous() for name, x in odd.items()})


def test_a_block_that_is_not_what_its_spec_says_is_not_written(tmp_path):
    class Wrong(Read):
        pass

    specs = {"w": Spec((4,), torch.float32)}
    for block in (torch.ones(4, dtype=torch.float64), torch.ones(9)):
        source = Wrong(specs, lambda *_, block=block: block)
        with pytest.raises(RuleError, match="'w' must be 4 entries of torch.float32"):
            save(Lazy(source), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_not_touched(tmp_path):
    save({"w": torch.ones(1)}, tmp_path / "m.safetensors")
    before = (tmp_path / "m.safetensors").read_bytes()
    with pytest.raises(ExistsError, match="overwrite=True"):
        save({"w": torch.zeros(1)}, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == before
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ExistsError):
        save({"w": torch.zeros(1)}, tmp_path / "folder")
    with pytest.raises(ExistsError, match="other kind"):
        save({"w": torch.zeros(1)}, tmp_path / "folder.safetensors", overwrite=True)


@pytest.mark.parametrize(
    ("mapping", "path", "options", "error"),
    [
        ({}, "m.safetensors", {}, DegenerateError),
        ({"w": torch.ones(1, dtype=torch.complex64)}, "m.safetensors", {}, DtypeError),
        ({"w": torch.ones(1)}, "none/m.safetensors", {}, LocationError),
        ({"w": torch.ones(1)}, "m.safetensors", {"max_shard_size": "1GB"}, RangeError),
        ({"w": torch.ones(1)}, "m", {"max_shard_size": "many"}, RangeError),
        ({"w": torch.ones(1)}, "m", {"max_shard_size": 0}, RangeError),
    ],
)
def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path, mapping, path, options, error):
    with pytest.raises(error):
        save(mapping, tmp_path / path, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["m.safetensors", "m"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("broken")])
def test_a_failure_in_the_middle_loses_nothing(tmp_path, monkeypatch, name, failure):
    save({"w": torch.ones(2), "v": torch.ones(2)}, tmp_path / name, max_shard_size=None)

    def fail(*_):
        raise failure

    monkeypatch.setattr(layout_module, "put", fail)
    with pytest.raises(type(failure)) as caught:
        save({"w": torch.zeros(2)}, tmp_path / name, overwrite=True)
    if isinstance(failure, OSError):
        assert "the disk is full" in caught.value.__notes__[0]
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert load(tmp_path / name)["w"].eq(1).all()
