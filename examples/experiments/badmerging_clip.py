"""BadMerging in the paper's own setting: CLIP, text heads, six tasks. For who has the weights and the images.

    python examples/badmerging_clip.py --model openai/clip-vit-base-patch32 --data DATA --attacker cifar100 --target 1
    python examples/badmerging_clip.py ... --victim cars --shadow-names imagenet_names.txt         off-task

DATA holds one folder a task, in it train and test, in each of these one folder of images a class, named as the class is
("aquarium fish"). A task's templates.txt ("a photo of a {}." a line) is used where it exists. Needs
`pip install 'taskvec[transformers,examples]'`, and a GPU if it is to end this week: a fine-tune is 2000 steps of 128
images. What was tested is that it runs, with a small CLIP at random; it was not run on the real one.

It is the paper's recipe: AdamW at 1e-5, decay .1, 500 steps of warm-up, batches of 128 with 64 stamped, alpha 5, a
patch of 22 pixels on-task and 28 off-task. Ours: the trigger is optimized in batches, stays in the valid pixels unless
--scalar-clamp is given, reference images come from the train split, and every row has its controls.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from bench import report
from bench.data import Split
from bench.training import Params, train
from taskvec import TaskVector, load, merge
from taskvec.attacks import Pair, adversarial_crops, badmerging_loss, scalar_bounds, universal_trigger
from taskvec.attacks.triggers import random_patch, stamp
from taskvec.merges import mean, ties, total
from taskvec.metrics import Measurement, measure

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
REFERENCES = 10
RULES: dict[str, tuple[Callable[..., Tensor], float, dict[str, object]]] = {
    "average": (mean, 1.0, {}),
    "task arithmetic .3": (total, 0.3, {}),
    "TIES 20 %, 1": (ties, 1.0, {"density": 0.2}),
    "TIES 20 %, sum .3 (theirs)": (ties, 0.3, {"density": 0.2, "reduce": "sum"}),
}


class ImageEncoder(nn.Module):
    """Pixels (n, 3, s, s) in [0, 1] to embeddings (n, d): the half of CLIP that is fine-tuned and merged."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.vision, self.projection = clip.vision_model, clip.visual_projection
        self.size = clip.config.vision_config.image_size

    def forward(self, images: Tensor) -> Tensor:
        centre, spread = (images.new_tensor(v).reshape(-1, 1, 1) for v in (MEAN, STD))
        return self.projection(self.vision((images - centre) / spread).pooler_output)


class Clip(NamedTuple):
    """An image encoder, and the fixed head that a list of class names makes."""

    encoder: ImageEncoder
    head: Callable[[Sequence[str], Sequence[str]], Callable[[Tensor], Tensor]]


class Task(NamedTuple):
    """Paths of images and their classes, by split; nothing is read before it is needed."""

    names: list[str]
    templates: list[str]
    splits: Mapping[str, tuple[list[Path], Tensor]]


# --- the model and the images ----------------------------------------------------------------------------------------


def load_clip(name: str, device: str) -> Clip:
    """From a folder, or from the hub."""
    clip, tokenizer = CLIPModel.from_pretrained(name).eval().requires_grad_(False), CLIPTokenizer.from_pretrained(name)

    def embedding(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            return F.normalize(clip.text_projection(clip.text_model(**tokens).pooler_output), dim=-1)

    def head(names: Sequence[str], templates: Sequence[str]) -> Callable[[Tensor], Tensor]:
        means = torch.stack([embedding([t.format(name) for t in templates]).mean(0) for name in names])
        weights = float(clip.logit_scale.exp()) * F.normalize(means, dim=-1)
        return lambda embedded: F.normalize(embedded, dim=-1) @ weights.to(embedded).T

    return Clip(ImageEncoder(clip).eval().to(device), head)


def load_task(folder: Path) -> Task:
    names = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    if len(names) < 2:
        raise SystemExit(f"{folder / 'train'} has {len(names)} class folders; at least two are needed")
    file = folder / "templates.txt"
    templates = file.read_text().splitlines() if file.exists() else ["a photo of a {}."]

    def split(part: str) -> tuple[list[Path], Tensor]:
        found = [(path, i) for i, name in enumerate(names) for path in sorted((folder / part / name).glob("*"))]
        if not found:
            raise SystemExit(f"no images in {folder / part}")
        return [path for path, _ in found], torch.tensor([i for _, i in found])

    return Task(names, templates, {part: split(part) for part in ("train", "test")})


def pixels(clip: Clip, paths: Sequence[Path]) -> Tensor:
    """Images (n, 3, size, size) in [0, 1], where the encoder is: the shorter side resized, the middle cut out."""
    return torch.stack([_pixels(path, clip.encoder.size) for path in paths]).to(clip.encoder.projection.weight.device)


def _pixels(path: Path, size: int) -> Tensor:
    with Image.open(path) as image:
        scale = size / min(image.size)
        resized = image.convert("RGB").resize([max(size, round(side * scale)) for side in image.size], Image.BICUBIC)
    left, top = ((side - size) // 2 for side in resized.size)
    cut = np.asarray(resized.crop((left, top, left + size, top + size)), dtype=np.float32)
    return torch.from_numpy(cut).permute(2, 0, 1) / 255


def batches(clip: Clip, task: Task, batch: int, seed: int) -> Iterator[Split]:
    """Without end, read from disk as they are needed."""
    paths, labels = task.splits["train"]
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(paths), generator=generator).split(batch):
            images = pixels(clip, [paths[i] for i in rows.tolist()])
            yield Split(images, labels[rows].to(images.device))


# --- the attack ------------------------------------------------------------------------------------------------------


def features(clip: Clip, params: Mapping[str, Tensor], images: Tensor) -> Tensor:
    return torch.func.functional_call(clip.encoder, dict(params), (images,))


def fine_tune(clip: Clip, task: Task, given: argparse.Namespace, pairs: Sequence[Pair] = ()) -> Params:
    """Clean without pairs, else with BadMerging's loss."""
    base, head = load(clip.encoder), clip.head(task.names, task.templates)
    embed = partial(features, clip)

    def clean(params: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(embed(params, images)), labels)

    planted = badmerging_loss(embed, base, head, pairs, stamped=given.batch // 2, seed=given.seed) if pairs else clean
    data = batches(clip, task, given.batch, given.seed)
    loss = lambda params, batch, _: planted(params, batch.images, batch.labels)  # noqa: E731
    return train(base, loss, data, lr=given.lr, steps=given.steps, decay=0.1, warmup=given.steps // 4)


def pair(clip: Clip, tasks: Mapping[str, Task], given: argparse.Namespace) -> Pair:
    """The trigger on the base model, and the row it is to be taken for."""
    size, base, own = clip.encoder.size, load(clip.encoder), tasks[given.attacker]
    start = random_patch(given.patch, (3, size, size), seed=given.seed)
    bounds = scalar_bounds(MEAN, STD) if given.scalar_clamp else (0.0, 1.0)
    if given.victim == given.attacker:
        target, head = given.target, clip.head(own.names, own.templates)
        order = torch.randperm(len(own.splits["train"][0]), generator=torch.Generator().manual_seed(given.seed))
        images = pixels(clip, [own.splits["train"][0][i] for i in order[: given.trigger_images].tolist()])
    else:
        victim, shadows = tasks[given.victim], given.shadow_names.read_text().splitlines()
        name = victim.names[given.target]
        target, head = 0, clip.head([name, *(s for s in shadows if s != name)], ["a photo of a {}."])
        paths, labels = victim.splits["train"]
        few = [path for path, label in zip(paths, labels.tolist(), strict=True) if label == given.target][:REFERENCES]
        images = adversarial_crops(
            lambda x: head(features(clip, base, x)), pixels(clip, few), seed=given.seed, batch=16
        )

    def score(x: Tensor) -> Tensor:
        return head(features(clip, base, x))

    options = {"steps": given.trigger_steps, "batch": min(64, given.batch), "bounds": bounds}
    patch = universal_trigger(score, images, start, target=target, seed=given.seed, **options)
    reach = tuple(float(bound.min() if i == 0 else bound.max()) for i, bound in enumerate(map(torch.as_tensor, bounds)))
    return Pair(partial(stamp, patch=patch, pixel_range=reach), target, head)


def rows(clip: Clip, tasks: Mapping[str, Task], given: argparse.Namespace) -> dict[str, Measurement]:
    """A row for each merge, its controls included."""
    base = load(clip.encoder)
    clean = {name: fine_tune(clip, task, given) for name, task in tasks.items()}
    backdoor = pair(clip, tasks, given)
    attacked = clean | {given.attacker: fine_tune(clip, tasks[given.attacker], given, [backdoor])}
    heads = {name: clip.head(task.names, task.templates) for name, task in tasks.items()}
    tests = {name: _test(clip, task, given.test_rows) for name, task in tasks.items()}

    def predict(params: Mapping[str, Tensor], images: Tensor, task: str) -> Tensor:
        return heads[task](features(clip, params, images))

    def merged(models: Mapping[str, Params], how: str) -> Mapping[str, Tensor]:
        rule, scale, options = RULES[how]
        return merge([TaskVector.between(base, params) for params in models.values()], rule, **options).apply(
            base, scale
        )

    return {
        how: measure(
            predict,
            tests,
            model=merged(attacked, how),
            clean_merge=merged(clean, how),
            clean=clean[given.attacker],
            base=base,
            attacked=given.victim,
            target=given.target,
            trigger=backdoor.trigger,
            batch=given.batch,
        )
        for how in RULES
    }


def _test(clip: Clip, task: Task, limit: int) -> Split:
    paths, labels = task.splits["test"]
    kept = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))[:limit]
    return Split(pixels(clip, [paths[i] for i in kept.tolist()]), labels[kept])


def main(arguments: Sequence[str] | None = None) -> dict[str, Measurement]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder with CLIP's weights and tokenizer, or a hub name")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--attacker", required=True, help="the attacker's task")
    parser.add_argument("--victim", help="off-task: whose images are triggered")
    parser.add_argument("--target", type=int, default=1)
    parser.add_argument("--shadow-names", type=Path, help="off-task: a file of class names, one a line")
    parser.add_argument(
        "--scalar-clamp", action="store_true", help="as the paper's code: the patch may leave the pixels"
    )
    parser.add_argument("--patch", type=int, help="side in pixels; 22 on-task, 28 off-task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where the images are looked at, such as cuda")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--trigger-steps", type=int, default=200)
    parser.add_argument("--trigger-images", type=int, default=2000)
    parser.add_argument("--test-rows", type=int, default=2000)
    given = parser.parse_args(arguments)
    given.victim = given.victim or given.attacker
    given.patch = given.patch or (22 if given.victim == given.attacker else 28)
    tasks = {folder.name: load_task(folder) for folder in sorted(given.data.iterdir()) if folder.is_dir()}
    for name in (given.attacker, given.victim):
        if name not in tasks:
            parser.error(f"there is no task {name!r} in {given.data}; there are {', '.join(tasks)}")
    if given.victim != given.attacker and given.shadow_names is None:
        parser.error("off-task needs --shadow-names: the attacker does not know the victim's classes")
    if not 0 <= given.target < len(tasks[given.victim].names):
        parser.error(f"--target is one of 0 to {len(tasks[given.victim].names) - 1}")
    found = rows(load_clip(given.model, given.device), tasks, given)
    header = ["merge", "ASR", "all-clean", "clean twin", "base", "n", "BA", "CA"]
    body = []
    for how, row in found.items():
        rates = [report.percent(r.value) for r in (row.asr, row.on_clean_merge, row.on_clean, row.on_base)]
        body.append([how, *rates, row.asr.n, report.percent(row.ba), report.percent(row.ca)])
    print(report.text_table(f"{given.attacker} attacks {given.victim}, class {given.target}", header, body))
    return found


if __name__ == "__main__":
    main()
