"""Copies to and from a GPU: their path, with the processor in the place of the GPU."""

import pytest
import torch

from taskvec import TaskVector, load, merge, save
from taskvec._engine import transfers
from taskvec._engine.run import TINY, Run, workers_of
from taskvec._engine.sources import Memory
from taskvec._engine.transfers import copy_into, moved_to
from taskvec.merges import ties
from taskvec.sparsify import topk


@pytest.fixture(params=["there", "back"])
def locked(request, monkeypatch):
    """Every copy is taken for one to a GPU, or for one back; the sizes of the page-locked memory that is asked for."""
    sizes: list[torch.Size] = []

    def memory(like):
        sizes.append(like.shape)
        return torch.full(like.shape, torch.nan).to(like.dtype)

    asked = iter([True] * 10**6 if request.param == "there" else [False, True] * 10**6)
    monkeypatch.setattr(transfers, "_crosses", lambda start, end: next(asked))
    monkeypatch.setattr(transfers, "_locked", memory)
    return sizes


def test_a_copy_through_locked_memory_is_a_copy(locked):
    x, out = torch.randn(1000).bfloat16(), torch.zeros(1000)
    copy_into(out, x)
    assert torch.equal(out, x.float())
    assert locked == [x.shape]


def test_a_move_through_locked_memory_converts(monkeypatch):
    monkeypatch.setattr(transfers, "_crosses", lambda start, end: True)
    monkeypatch.setattr(transfers, "_locked", lambda like: torch.full_like(like, torch.nan))
    x = torch.randn(1000).bfloat16()
    found = moved_to(x, x.device, torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, x.float())


def test_nothing_is_copied_where_nothing_moves():
    x = torch.randn(3)
    assert moved_to(x, x.device, x.dtype) is x
    assert moved_to(x, x.device, torch.float64).dtype == torch.float64
    vector = TaskVector({"w": x})
    assert vector.to(dtype=torch.float32)["w"].data_ptr() != x.data_ptr(), "to() is a copy"


def test_a_merge_from_disk_has_the_same_bits_by_this_path(tmp_path, monkeypatch):
    for i in range(3):
        save({"w": torch.randn(70, 5000).bfloat16()}, tmp_path / str(i))

    def merged():
        base, *tuned = (load(tmp_path / str(i)) for i in range(3))
        vectors = [TaskVector.between(base, model).map(topk, density=0.5) for model in tuned]
        return merge(vectors, ties, density=0.2).apply(base)

    expected, sizes = merged()["w"], []
    monkeypatch.setattr(transfers, "_crosses", lambda start, end: True)
    monkeypatch.setattr(transfers, "_locked", lambda like: sizes.append(like.shape) or torch.full_like(like, torch.nan))
    assert torch.equal(merged()["w"], expected)
    assert sizes


class There(Memory):
    """Tensors that say they are on another device."""

    def __init__(self, entries: int, device: str) -> None:
        super().__init__({"w": torch.zeros(entries)})
        self.place = torch.device(device)

    def device(self, name):
        return self.place


@pytest.mark.parametrize(
    ("device", "entries", "wanted", "expected"),
    [
        ("cuda", TINY + 1, None, 2),
        ("cuda", TINY + 1, 8, 2),
        ("cuda", TINY + 1, 1, 1),
        ("cuda", TINY, None, 1),
        ("meta", TINY + 1, 8, 1),
        ("cpu", TINY + 1, 8, 8),
    ],
)
def test_two_threads_take_turns_with_a_gpu(device, entries, wanted, expected):
    assert workers_of(Run(There(entries, device)), ["w"], wanted) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_merge_on_a_gpu_from_disk_to_disk(tmp_path):
    for i in range(3):
        save({f"w{k}": torch.randn(700, 5000).bfloat16() for k in range(4)}, tmp_path / str(i))
    base, *tuned = (load(tmp_path / str(i)) for i in range(3))
    vectors = [TaskVector.between(base, model) for model in tuned]
    save(merge(vectors, ties, density=0.2), tmp_path / "here")
    save(merge(vectors, ties, density=0.2, device="cuda"), tmp_path / "there")
    here, there = load(tmp_path / "here"), load(tmp_path / "there")
    for name in here:
        assert torch.equal(here[name] != 0, there[name] != 0)
        assert torch.allclose(here[name], there[name], atol=1e-6)
