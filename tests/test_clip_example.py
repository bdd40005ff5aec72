"""The paper's own setting runs from end to end: a CLIP of a few thousand parameters, at random, and coloured images."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

pytestmark = pytest.mark.slow

COLOURS = {
    "warm": {"red": (220, 40, 40), "amber": (230, 170, 30)},
    "cold": {"blue": (40, 60, 220), "teal": (20, 150, 150)},
}


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiments"))
    try:
        import badmerging_clip
    finally:
        sys.path.pop(0)
    return badmerging_clip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    vocabulary = {
        t: i for i, t in enumerate([*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"])
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    ends = {
        "bos_token_id": len(vocabulary) - 2,
        "eos_token_id": len(vocabulary) - 1,
        "pad_token_id": len(vocabulary) - 1,
    }
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**common, **ends, "vocab_size": len(vocabulary), "projection_dim": 8},
        vision_config={**common, "image_size": 32, "patch_size": 8, "projection_dim": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    noise = torch.Generator().manual_seed(0)
    for task, classes in COLOURS.items():
        for part, count in (("train", 12), ("test", 6)):
            for name, colour in classes.items():
                (folder / task / part / name).mkdir(parents=True)
                for i in range(count):
                    x = torch.tensor(colour) + torch.randint(-20, 20, (40, 33, 3), generator=noise)
                    Image.fromarray(x.clamp(0, 255).byte().numpy()).save(folder / task / part / name / f"{i}.png")
    return folder


def arguments(model: Path, images: Path, *more: str) -> list[str]:
    small = ["--steps", "8", "--batch", "8", "--lr", "1e-3", "--trigger-steps", "5", "--patch", "8"]
    return ["--model", str(model), "--data", str(images), "--attacker", "warm", *small, *more]


def test_on_task(example, model, images, capsys):
    rows = example.main(arguments(model, images))
    assert set(rows) == set(example.RULES)
    for row in rows.values():
        assert set(row.accuracy) == set(COLOURS)
        assert row.asr.n == row.on_base.n == 6
        assert (row.attacked, row.target) == ("warm", 1)
    assert "task arithmetic .3" in capsys.readouterr().out


def test_off_task_with_shadow_names_and_the_papers_clamp(example, model, images, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("goldfish\nteal\ntench\n")
    more = ["--victim", "cold", "--target", "1", "--shadow-names", str(names), "--scalar-clamp"]
    rows = example.main(arguments(model, images, *more))
    assert {row.attacked for row in rows.values()} == {"cold"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--attacker", "hot"], "there is no task 'hot'"),
        (["--victim", "cold"], "--shadow-names"),
        (["--target", "2"], "--target is one of 0 to 1"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_trained(example, model, images, capsys, more, message):
    with pytest.raises(SystemExit):
        example.main(arguments(model, images, *more))
    assert message in capsys.readouterr().err


def test_images_are_resized_by_their_shorter_side_and_cut_in_the_middle(example, model, tmp_path):
    x = torch.zeros(32, 64, 3, dtype=torch.uint8)
    x[:, 16:48] = 255
    Image.fromarray(x.numpy()).save(tmp_path / "wide.png")
    clip = example.load_clip(str(model), "cpu")
    assert torch.equal(example.pixels(clip, [tmp_path / "wide.png"]), torch.ones(1, 3, 32, 32))


def test_a_head_is_made_of_text_and_knows_its_own_class_best(example, model):
    clip = example.load_clip(str(model), "cpu")
    names = ["red", "amber", "teal"]
    head = clip.head(names, ["a photo of a {}.", "{}"])
    weights = head(torch.eye(8))  # (8, 3): normalised one-hot features read the weights off
    scale = weights.norm(dim=0)
    assert torch.allclose(scale, scale[0].expand(3))
    assert head(weights.T).argmax(1).tolist() == [0, 1, 2]
