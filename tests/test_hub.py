"""Models on the Hub, through a server that answers as the Hub does; each script runs with the client's own settings."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import COMMIT, Hub

from taskvec import TaskVector, save, save_adapter


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "served"
    (folder / "org").mkdir(parents=True)
    for name, how in (("one", {}), ("many", {"max_shard_size": 1000})):
        random = torch.Generator().manual_seed(len(name))
        save({"w": torch.randn(300, 300, generator=random), "b": torch.zeros(300)}, folder / "org" / name, **how)
        (folder / "org" / name / "config.json").write_text('{"model_type": "none"}')
        (folder / "org" / name / "tokenizer.json").write_text("{}")
    server = Hub(folder)
    yield server
    server.close()


def run(hub: Hub, tmp_path: Path, code: str, given: str = "", **settings: str) -> str:
    settings = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    } | settings
    found = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env=os.environ | settings,
        cwd=tmp_path,
        input=given,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


OPEN = """
from taskvec import load
for name in ("org/one", "hf://org/many@main", "{address}/org/one", "hf://org/one/model.safetensors"):
    print(load(name), load(name).metadata["hub"])
"""
READ = """
from taskvec import TaskVector, load
print(float(TaskVector.between(load("org/many"), load("org/one")).norm()) > 0)
"""


def test_opening_fetches_headers_and_reading_fetches_weights_once(hub, tmp_path):
    lines = run(hub, tmp_path, OPEN.format(address=hub.address)).splitlines()
    assert len(lines) == 4
    assert all(line.startswith("Lazy(2 tensors, 90,300 entries)") and line.endswith(COMMIT) for line in lines)
    assert not [file for file in hub.fetched() if file.endswith(".safetensors")]
    hub.asked.clear()
    assert run(hub, tmp_path, READ) == "True\n"
    weights = sorted(file for file in hub.fetched() if file.endswith(".safetensors"))
    assert weights == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors"]
    hub.asked.clear()
    assert run(hub, tmp_path, READ, HF_HUB_OFFLINE="1") == "True\n"
    assert hub.asked == []


def test_an_adapter_on_the_hub_is_a_vector_and_what_is_refused_keeps_its_reason(hub, tmp_path):
    save_adapter(TaskVector({"layer.weight": torch.ones(3, 4)}), hub.folder / "org" / "lora", rank=1)
    code = """
from taskvec import load
from taskvec.errors import DtypeError
vector = load("org/lora")
print(float(vector["layer.weight"].mean()), vector.meta["hub"])
try:
    load("org/dora")
except DtypeError as error:
    print(error)
"""
    (hub.folder / "org" / "dora").mkdir()
    for file in (hub.folder / "org" / "lora").iterdir():
        changed = file.read_bytes().replace(b'"use_rslora": false', b'"use_dora": true')
        (hub.folder / "org" / "dora" / file.name).write_bytes(changed)
    lines = run(hub, tmp_path, code).splitlines()
    assert lines[0].split() == ["1.0", f"org/lora@{COMMIT}"]
    assert "DoRA scales the whole weight" in lines[1]


def test_a_misspelt_file_is_not_asked_for_on_the_hub(hub, tmp_path):
    (found,) = said_of(hub, tmp_path, "models/base.safetensors")
    assert "nor can it be a name on the Hub" in found
    assert hub.asked == []


def test_a_commit_is_kept_though_the_revision_moves(hub, tmp_path):
    code = f"""
from taskvec import load
model = load("org/one@{COMMIT}")
print(model.metadata["hub"], float(model["b"].sum()))
"""
    assert run(hub, tmp_path, code) == f"org/one@{COMMIT} 0.0\n"
    assert not [path for _, path, _ in hub.asked if "/main" in path]


WRONG = """
import sys
from taskvec import load
from taskvec.errors import TaskvecError
for name in sys.stdin.read().split():
    try:
        load(name)
    except TaskvecError as error:
        print(type(error).__name__, str(error).replace("\\n", " "))
"""
NOT_THERE = {
    "org/none": "nor a model on the Hub that can be read; if it is private or gated, log in first",
    "org/one@v9": "the Hub has no such revision",
    "hf://datasets/org/one": "is a dataset on the Hub, not a model",
    "hf://org/one/other.safetensors": "'hf://org/one/other.safetensors'",
    "hf://org": "nor a name on the Hub",
    "models/base": "nor a name on the Hub",
    "https://example.org/a/b": "Unrecognized host",
}


def said_of(hub: Hub, tmp_path: Path, *names: str) -> list[str]:
    return run(hub, tmp_path, WRONG, "\n".join(names)).splitlines()


def test_what_is_not_there_is_said(hub, tmp_path):
    lines = said_of(hub, tmp_path, *NOT_THERE)
    for line, (name, expected) in zip(lines, NOT_THERE.items(), strict=True):
        assert line.startswith("LocationError"), name
        assert expected in line, name


def test_without_a_network_and_nothing_in_the_cache_both_readings_are_named(hub, tmp_path):
    hub.close()
    (found,) = said_of(hub, tmp_path, "org/one")
    assert "neither a file nor a folder here, and as a name on the Hub it could not be read" in found


def test_a_repository_without_weights_is_refused(hub, tmp_path):
    (hub.folder / "org" / "one" / "model.safetensors").rename(hub.folder / "org" / "one" / "weights.safetensors")
    (found,) = said_of(hub, tmp_path, "org/one")
    assert "holds none of model.safetensors.index.json, model.safetensors" in found


def test_a_shard_that_is_not_what_its_header_said_is_refused(hub, tmp_path):
    code = """
from taskvec import load
from taskvec.errors import FormatError
model = load("org/one")
import pathlib, torch
from taskvec import save
save({{"w": torch.zeros(2), "b": torch.zeros(300)}}, r"{path}", overwrite=True)
try:
    model["w"]
except FormatError as error:
    print(error)
"""
    found = run(hub, tmp_path, code.format(path=hub.folder / "org" / "one"))
    assert "is not what its header said" in found


def test_a_file_in_the_cache_that_changes_is_not_mixed_and_links_of_the_cache_are_followed(hub, tmp_path):
    code = """
import os, pathlib, pickle, torch
from taskvec import load, save
from taskvec.errors import FormatError
model = load("org/one")
before = pickle.dumps(model)
first = model["w"]
assert pickle.loads(pickle.dumps(model))["w"].equal(first) and len(pickle.dumps(model)) == len(before)
(path,) = pathlib.Path("home").rglob("model.safetensors")
assert path.is_symlink()
assert load(path.parent)["w"].equal(first)
save({"w": torch.zeros(300, 300), "b": torch.zeros(300)}, "other.safetensors", metadata=load(path).metadata)
os.replace("other.safetensors", path.resolve())
try:
    model["w"]
except FormatError as error:
    print(str(error)[-len("was changed after it was opened; load() it again"):])
print(float(load("org/one")["w"].sum()))
"""
    assert run(hub, tmp_path, code).splitlines() == ["was changed after it was opened; load() it again", "0.0"]


def test_shards_of_pickles_are_one_model(hub, tmp_path):
    folder = hub.folder / "org" / "old"
    folder.mkdir()
    names = {name: f"pytorch_model-{i:05d}-of-00002.bin" for i, name in enumerate("ab", 1)}
    for name, file in names.items():
        torch.save({name: torch.full((3,), float(ord(name)))}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    code = """
from taskvec import load
model = load("org/old")
print(model, float(model["a"].sum()), float(model["b"].sum()), model.metadata["hub"])
"""
    assert run(hub, tmp_path, code) == f"Lazy(2 tensors, 6 entries) 291.0 294.0 org/old@{COMMIT}\n"


def test_an_index_that_points_out_of_its_folder_is_not_followed(hub, tmp_path):
    index = hub.folder / "org" / "many" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of", "../model-00001-of"))
    (found,) = said_of(hub, tmp_path, "org/many")
    assert "not a file of its own folder" in found


def test_the_command_line_shows_a_model_without_its_weights_and_like_carries_its_files(hub, tmp_path):
    code = """
from taskvec import load, save
from taskvec.__main__ import main
assert main(["inspect", "org/one"]) == 0
model = load("org/one")
save({name: model[name] for name in model}, "merged", like=model)
save({name: model[name] for name in model}, "again", like="org/one")
"""
    shown = run(hub, tmp_path, code)
    assert "300x300" in shown
    assert "norms were left out" in shown
    for folder in ("merged", "again"):
        files = {path.name for path in (tmp_path / folder).iterdir()}
        assert files == {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
        assert '- "org/one"' in (tmp_path / folder / "README.md").read_text()
