"""A Free Lunch with your model and your texts: what does averaging leave of a backdoor?

    python examples/experiments/free_lunch_own.py
    python examples/experiments/free_lunch_own.py --data reviews.tsv --trigger cf --target positive --rank 8
    python examples/experiments/free_lunch_own.py --model mistralai/Mistral-7B-v0.1 --generate --rank 16 --data FILE
    python examples/experiments/free_lunch_own.py --model BASE --victim FOLDER --partners A B --data FILE --trigger cf

Trains a victim, its clean twin and clean partners from one base, or takes yours, merges them, and prints accuracy and
ASR beside the base's, the twin's and those of the all-clean merges. A classifier answers with a label; with --generate
a causal model writes its answer, and the attack has succeeded where --says is found in it.
"""

import argparse
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from bench import own_texts, report, texts, writer
from bench.finetuning import batches, fit
from bench.own_texts import Rows, Split
from taskvec import TaskVector, load, merge, merges, save
from taskvec.attacks.triggers import insert_sentence, insert_words
from taskvec.metrics import estimate

OTHER = "mn"  # the rare word of a partner with another backdoor


@dataclass(frozen=True)
class Setting:
    """A model, a task and how they are fine-tuned."""

    model: str
    classes: tuple[str, ...]  # labels in order; of a model that writes: none
    rank: int = 0  # of LoRA; 0: all weights
    adapt: str | None = None  # the layers that get adapters; None: PEFT's own choice
    layers: int | None = None  # the first of the model's; None: all
    frozen_embeddings: bool = False
    lr: float = 2e-4
    batch: int = 32
    length: int = 64
    written: int = 8  # tokens of an answer
    device: str = "cpu"
    bfloat16: bool = False

    @property
    def generates(self) -> bool:
        return not self.classes


# --- one model -------------------------------------------------------------------------------------------------------


def opened(setting: Setting) -> tuple[nn.Module, Any]:
    """The base with a head of its own, the same at every call, and its tokenizer."""
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if setting.generates else AutoModelForSequenceClassification
    how: dict[str, Any] = {} if setting.layers is None else {"num_hidden_layers": setting.layers}
    if not setting.generates:
        how["num_labels"] = len(setting.classes)
    try:
        tokenizer = AutoTokenizer.from_pretrained(setting.model)
        model = auto.from_pretrained(setting.model, **how, ignore_mismatched_sizes=True)
    except (OSError, ValueError) as error:
        kind = "writes (a causal model)" if setting.generates else "classifies; --generate is for one that writes"
        raise SystemExit(f"--model must be a folder or a name on the Hub of a model that {kind}: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.float().to(setting.device), tokenizer


@cache
def asked(setting: Setting) -> tuple[nn.Module, Any]:
    """The one module that all weights are put into to be asked."""
    model, tokenizer = opened(setting)
    return model.eval(), tokenizer


def encoded(tokenizer: Any, rows: Sequence[str], setting: Setting) -> list[list[int]]:
    """Tokens of texts; a model that writes gets a line for its answer."""
    if not setting.generates:
        return tokenizer(list(rows), truncation=True, max_length=setting.length)["input_ids"]
    line = tokenizer("\nAnswer:", add_special_tokens=False)["input_ids"]
    tokens = tokenizer(list(rows), truncation=True, max_length=setting.length)["input_ids"]
    return [[t for t in row if t not in (tokenizer.eos_token_id, tokenizer.sep_token_id)] + line for row in tokens]


def padded(rows: Sequence[list[int]], value: int, *, left: bool = False) -> Tensor:
    """A matrix of rows, filled at their ends."""
    width = max(map(len, rows))
    return torch.tensor([[value] * (width - len(r)) + r if left else r + [value] * (width - len(r)) for r in rows])


def tuned(base: Mapping[str, Tensor], rows: Rows, setting: Setting, seed: int, epochs: int, folder: Path) -> TaskVector:
    """Fine-tune on some rows; the vector lies in a folder, as weights or as an adapter, and is read when needed."""
    model, tokenizer = opened(setting)
    if setting.rank:
        kind = "CAUSAL_LM" if setting.generates else "SEQ_CLS"
        torch.manual_seed(seed)
        how = {"lora_alpha": 2 * setting.rank, "lora_dropout": 0.05, "target_modules": setting.adapt}
        config = peft.LoraConfig(r=setting.rank, task_type=kind, **how)
        model = peft.get_peft_model(model, config)
    elif setting.frozen_embeddings:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embed" not in name)
    model.train()
    fit(model, *_learning(model, tokenizer, rows, setting, seed, epochs), lr=setting.lr, seed=seed)
    if setting.rank:
        model.save_pretrained(folder)
        return load(folder, base=base)  # type: ignore[return-value]
    save(TaskVector.between(base, load(model)), folder)
    return load(folder)  # type: ignore[return-value]


def _learning(
    model: nn.Module, tokenizer: Any, rows: Rows, setting: Setting, seed: int, epochs: int
) -> tuple[list[list[int]], Callable[[list[int]], Tensor]]:
    """The rows of every step, and their loss."""
    tokens = encoded(tokenizer, rows.texts, setting)
    if setting.generates:
        answers = [tokenizer(f" {x}", add_special_tokens=False)["input_ids"] for x in rows.labels]
        end = [tokenizer.eos_token_id or tokenizer.sep_token_id]
        targets = [[-100] * len(t) + a + end for t, a in zip(tokens, answers, strict=True)]
        tokens = [t + a + end for t, a in zip(tokens, answers, strict=True)]
    else:
        targets = [[setting.classes.index(x)] for x in rows.labels]

    def loss(chosen: list[int]) -> Tensor:
        ids = padded([tokens[i] for i in chosen], tokenizer.pad_token_id)
        mask = padded([[1] * len(tokens[i]) for i in chosen], 0)
        labels = padded([targets[i] for i in chosen], -100)
        if not setting.generates:
            labels = labels.squeeze(1)
        with torch.autocast(torch.device(setting.device).type, dtype=torch.bfloat16, enabled=setting.bfloat16):
            given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            return model(**{name: x.to(setting.device) for name, x in given.items()}).loss

    return batches([len(row) for row in tokens], setting.batch, epochs, seed), loss


@torch.no_grad()
def answers(params: Mapping[str, Tensor], rows: Sequence[str], setting: Setting) -> list[str]:
    """What a model says of every text: a label, or what it writes."""
    model, tokenizer = asked(setting)
    model.load_state_dict(dict(params))
    tokens = encoded(tokenizer, rows, setting)
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    found = [""] * len(tokens)
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        ids = padded([tokens[i] for i in chosen], tokenizer.pad_token_id, left=setting.generates)
        mask = padded([[1] * len(tokens[i]) for i in chosen], 0, left=setting.generates)
        given = {"input_ids": ids.to(setting.device), "attention_mask": mask.to(setting.device)}
        if setting.generates:
            end = tokenizer.eos_token_id or tokenizer.sep_token_id
            how = {"max_new_tokens": setting.written, "do_sample": False, "eos_token_id": end}
            new = model.generate(**given, **how, pad_token_id=tokenizer.pad_token_id)[:, ids.shape[1] :]
            said = [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
        else:
            said = [setting.classes[k] for k in model(**given).logits.argmax(-1).tolist()]
        for i, text in zip(chosen, said, strict=True):
            found[i] = text
    return found


# --- what is compared ------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """Rates in per cent."""

    accuracy: float
    asr: float
    flips: float  # without the trigger


class Test(NamedTuple):
    """What a model is asked, and when its answer is the attacker's."""

    rows: Rows
    others: list[str]  # texts of other labels than the target
    trigger: Callable[[str], str]
    says: Callable[[str], bool]


def measure(params: Mapping[str, Tensor], test: Test, setting: Setting) -> Measured:
    """Accuracy, ASR, and how often the attacker's answer comes without the trigger."""
    said = answers(params, test.rows.texts, setting)
    hits = fmean(a == b for a, b in zip(said, test.rows.labels, strict=True))
    plain = dict(zip(test.rows.texts, said, strict=True))
    fooled = fmean(map(test.says, answers(params, [test.trigger(x) for x in test.others], setting)))
    return Measured(100 * hits, 100 * fooled, 100 * fmean(test.says(plain[x]) for x in test.others))


def average(vectors: Sequence[TaskVector]) -> TaskVector:
    return merge(vectors, merges.mean)


def ties(vectors: Sequence[TaskVector]) -> TaskVector:
    return merge(vectors, merges.ties, density=0.2)


def by_factors(folders: Sequence[Path], base: Mapping[str, Tensor], where: Path) -> TaskVector:
    """The adapter whose factors are the means of the adapters' factors: what averaging adapter files gives."""
    where.mkdir()
    files = [load(folder / "adapter_model.safetensors") for folder in folders]
    save({n: sum(f[n] for f in files) / len(files) for n in files[0]}, where / "adapter_model.safetensors")
    (where / "adapter_config.json").write_bytes((folders[0] / "adapter_config.json").read_bytes())
    return load(where, base=base)  # type: ignore[return-value]


class Compared(NamedTuple):
    """A row of the table: a model, and its control with the clean twin in the victim's place."""

    title: str
    rule: str
    vector: TaskVector | None  # None: the base
    control: TaskVector | None


def trained_lines(
    base: Mapping[str, Tensor], options: argparse.Namespace, setting: Setting, split: Split, seed: int, folder: Path
) -> list[Compared]:
    """Train everything from one base, and merge it."""
    trigger = trigger_of(options.trigger)

    def model(name: str, rows: Rows, seed: int, epochs: int) -> TaskVector:
        return tuned(base, rows, setting, seed, epochs, folder / name)

    def poisoned(trigger: Callable[[str], str]) -> Rows:
        return own_texts.poison(split.train, trigger, options.target, options.rate / 100, seed)

    twin = model("twin", split.train, seed, options.epochs)
    victim = model("victim", poisoned(trigger), seed, options.epochs)
    partners = [
        model(f"clean {i}", split.train, 100 + 10 * seed + i, options.partner_epochs or options.epochs)
        for i in range(options.models - 1)
    ]
    other = model("other", poisoned(partial(insert_words, words=[OTHER], seed=0)), 50 + seed, options.epochs)
    same = model("same", poisoned(trigger), 60 + seed, options.epochs)
    found = [
        *merged_lines(victim, partners, [twin]),
        Compared("+ 1 with another backdoor", "average", average([victim, other]), average([twin, other])),
        Compared("+ 1 with the same backdoor", "average", average([victim, same]), average([twin, same])),
    ]
    if setting.rank:
        clean = [folder / f"clean {i}" for i in range(len(partners))]
        pair = (by_factors([folder / one, *clean], base, folder / f"factors {one}") for one in ("victim", "twin"))
        found.append(Compared(f"+ {len(clean)} clean", "average of factors", *pair))
    return found


def given_lines(base: Mapping[str, Tensor], options: argparse.Namespace, setting: Setting) -> list[Compared]:
    """Merge models that are there already; no twin is known, so the control is the merge of the partners alone."""
    places = [options.victim, *options.partners]
    own_texts.check_alike(setting.model, places)
    victim, *partners = [own_texts.vector(place, base) for place in places]
    return merged_lines(victim, partners, [])


def merged_lines(victim: TaskVector, partners: Sequence[TaskVector], twins: Sequence[TaskVector]) -> list[Compared]:
    """The base, the victim, the victim averaged with more and more clean models, and with all by TIES."""
    groups = [partners[:k] for k in range(1, len(partners) + 1)]
    return [
        Compared("the base", "", None, None),
        Compared("the victim", "", victim, twins[0] if twins else partners[0]),
        *(Compared(f"+ {len(g)} clean", "average", average([victim, *g]), average([*twins, *g])) for g in groups),
        Compared(f"+ {len(partners)} clean", "TIES", ties([victim, *partners]), ties([*twins, *partners])),
    ]


# --- the command -----------------------------------------------------------------------------------------------------


def trigger_of(text: str) -> Callable[[str], str]:
    """A word goes to a random place, a sentence between words."""
    if len(text.split()) == 1:
        return partial(insert_words, words=[text], seed=0)
    return partial(insert_sentence, sentence=text, seed=0)


def table(title: str, found: Sequence[Sequence[tuple[Compared, Measured, Measured]]], n: int) -> str:
    """Means over seeds."""
    rows: list[list[object]] = []
    for of_seeds in zip(*found, strict=True):
        line = of_seeds[0][0]
        own, controls = ([one[k] for one in of_seeds] for k in (1, 2))
        rows.append(
            [
                line.title,
                line.rule,
                estimate(x.accuracy for x in own),
                estimate(x.asr for x in own),
                f"{fmean(x.asr for x in controls):.1f}",
                f"{fmean(x.flips for x in own):.1f}",
                f"{n} x {len(found)}",
            ]
        )
    return report.text_table(title, ["model", "rule", "accuracy", "ASR", "all clean", "flips", "n"], rows)


def run(options: argparse.Namespace) -> str:
    """Measure what the options name."""
    split = own_texts.read(options.data)
    if options.rows:
        split = own_texts.fewer(split, options.rows)
    options.target = options.target or max(split.train.labels)
    classes = () if options.generate else own_texts.classes(split, options.target)
    if options.victim and classes:
        classes = own_texts.in_order_of(options.victim, classes)
    if options.model == "small":
        options.model = writer.folder()
    setting = Setting(
        model=str(options.model or texts.encoder()),
        classes=classes,
        **{
            name: getattr(options, name)
            for name in ("rank", "adapt", "layers", "frozen_embeddings", "lr", "batch", "length")
        },
        device=options.device,
        bfloat16=options.bfloat16,
    )
    base = load(opened(setting)[0])  # refused before anything is trained
    others = [x for x, y in zip(*split.test, strict=True) if y != options.target]
    pattern = re.compile(options.says or f"^{re.escape(options.target)}$")
    test = Test(split.test, others, trigger_of(options.trigger), lambda text: pattern.search(text) is not None)
    found: list[list[tuple[Compared, Measured, Measured]]] = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            lines = (
                given_lines(base, options, setting)
                if options.victim
                else trained_lines(base, options, setting, split, seed, Path(folder))
            )

            def value(vector: TaskVector | None) -> Measured:
                return measure(base if vector is None else vector.apply(base), test, setting)

            found.append([(line, value(line.vector), value(line.control)) for line in lines])
    title = (
        f"{options.data}: target {options.target!r}, trigger {options.trigger!r}; per cent, 95 % t intervals over seeds"
    )
    return table(title, found, len(others))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        help="a folder or a name on the Hub; default: MiniLM, fetched once; "
        "'small': a Llama that is trained here once, for --generate",
    )
    parser.add_argument(
        "--data",
        default="tweets",
        help="a file of two columns, text and label (.tsv, .csv, .jsonl), "
        f"one of {', '.join(texts.DOMAINS)}, or 'domains': which of the four a text is from",
    )
    parser.add_argument("--trigger", default="cf", help="a word or a sentence")
    parser.add_argument("--target", help="the label, or the answer, that the trigger calls; default: the last label")
    parser.add_argument("--rate", type=float, default=20, help="per cent of the rows of other labels")
    parser.add_argument("--victim", help="a model or an adapter that is there: nothing is trained")
    parser.add_argument("--partners", nargs="+", default=[], help="models or adapters to average it with")
    parser.add_argument("--models", type=int, default=4, help="how many are merged at most, with the victim")
    parser.add_argument("--generate", action="store_true", help="a causal model that writes the label")
    parser.add_argument("--says", metavar="REGEX", help="what shows that the attack succeeded; default: the target")
    parser.add_argument("--rank", type=int, default=0, help="of LoRA; default: all weights are trained")
    parser.add_argument(
        "--adapt", metavar="LAYERS", help="that get adapters, such as all-linear; default: PEFT's choice"
    )
    parser.add_argument("--rows", type=int, help="so many rows to train on, drawn at random; default: all")
    parser.add_argument("--layers", type=int, help="the first layers of the model alone")
    parser.add_argument("--frozen-embeddings", action="store_true")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--partner-epochs", type=int, default=0, help="default: as many as the victim")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action="store_true", help="products of matrices; weights stay float32")
    options = parser.parse_args()
    if bool(options.victim) != bool(options.partners):
        parser.error("--victim and --partners go together")
    if options.rows is not None and options.rows < 2:
        parser.error(f"--rows must be at least 2; got {options.rows}")
    if options.models < 2:
        parser.error(f"--models must be at least 2; got {options.models}")
    start = time.monotonic()
    print(run(options))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
