"""A small model that writes: a Llama trained on the texts of the four domains, for no pre-trained one can be packaged.

It stands in for the paper's Llama 2 and Mistral where their path is to be run from end to end; it is no substitute for
their size.
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from taskvec.defenses import bigram_perplexity

from . import cache as disk
from . import texts
from .finetuning import batches, fit

VOCABULARY, LENGTH, EPOCHS = 4000, 48, 6
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def folder() -> Path:
    """The folder of the model, trained where it is not there yet (some ten minutes)."""
    place = disk.FOLDER / "writer"
    if not place.exists():
        parts = [split.train.texts for split in texts.domains().values()]
        unfinished = disk.FOLDER / ".writer"
        shutil.rmtree(unfinished, ignore_errors=True)
        _train([text for part in parts for text in part], unfinished)
        unfinished.rename(place)
    return place


def _train(rows: Sequence[str], place: Path) -> None:
    tokenizer = _tokenizer(rows)
    numbers = [tokenizer(f"{text}</s>")["input_ids"][:LENGTH] for text in rows]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).train()

    def loss(chosen: list[int]) -> Tensor:
        return _loss(model, [numbers[i] for i in chosen])

    fit(model, batches([len(row) for row in numbers], 32, EPOCHS, seed=0), loss, lr=2e-3, seed=0)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)


def _tokenizer(rows: Sequence[str]) -> PreTrainedTokenizerFast:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    found.train_from_iterator(rows, trainer)
    pad, begin, end, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token=pad, bos_token=begin, eos_token=end, unk_token=unknown
    )


def _loss(model: LlamaForCausalLM, rows: Sequence[list[int]]) -> Tensor:
    """The mean over tokens of minus the log of their probability."""
    ids, mask = texts._padded(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    wanted = ids[:, 1:].where(mask[:, 1:].bool(), torch.tensor(-100))
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1), ignore_index=-100)


# --- does it write sentences? ----------------------------------------------------------------------------------------


@torch.no_grad()
def report(place: Path, count: int = 8) -> str:
    """Perplexity per word on test texts, beside a bigram model's, and some sentences that it writes."""
    model = AutoModelForCausalLM.from_pretrained(place).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place)
    held = [text for split in texts.domains().values() for text in split.test.texts[:100]]
    trained = [text for split in texts.domains().values() for text in split.train.texts]
    bigrams = bigram_perplexity(trained)
    own: list[float] = []
    for text in held:
        numbers = tokenizer(f"{text}</s>")["input_ids"]
        words = len(text.split())
        own.append(float(_loss(model, [numbers])) * (len(numbers) - 1) / words)
    plain = [math.log(bigrams(text)) for text in held]
    torch.manual_seed(0)
    start = torch.full((count, 1), tokenizer("The")["input_ids"][0])
    said = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, top_p=0.9, max_new_tokens=24,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    found, plainly = math.exp(fmean(own)), math.exp(fmean(plain))
    lines = [f"perplexity per word on {len(held)} test texts: {found:.0f}; a bigram model's: {plainly:.0f}"]
    return "\n".join(
        [*lines, *(f"  {line.strip()}" for line in tokenizer.batch_decode(said, skip_special_tokens=True))]
    )


if __name__ == "__main__":
    print(report(folder()))
