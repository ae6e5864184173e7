"""Training batches of a recipe, and what is minimised on them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from skipwise.models.llada import LLaDAConfig
from skipwise.zoo.corpora import training_documents
from skipwise.zoo.english import token_stream, train_tokenizer, windows
from skipwise.zoo.recipes import Objective, Recipe
from skipwise.zoo.tasks import MAX_LENGTH, TASKS, examples
from skipwise.zoo.tokenizer import build_tokenizer


@dataclass(frozen=True)
class Batch:
    """Left-padded sequences (batch, length); `answer` is True on what is learnt, `attention` 0 on padding."""

    tokens: Tensor
    attention: Tensor
    answer: Tensor


def data(recipe: Recipe, seed: int) -> tuple[PreTrainedTokenizerFast, Iterator[Batch]]:
    """The recipe's tokenizer, and an endless stream of its training batches."""
    if recipe.corpus == "tasks":
        tokenizer = build_tokenizer()
        return tokenizer, _task_batches(recipe, tokenizer, seed)
    texts = training_documents()
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    return tokenizer, _text_batches(recipe, token_stream(tokenizer, texts), seed)


def held_out_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], length: int, count: int = 32
) -> float:
    """Likelihood bound in nats a token on the first `count` windows of each text."""
    generator = torch.Generator().manual_seed(0)
    total = []
    for text in texts:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: count * length]).view(-1, length)
        batch = Batch(ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool))
        with torch.no_grad():
            total.append(float(masked_diffusion_loss(model, batch, generator, stratified=True)))
    return sum(total) / len(total)


def _text_batches(recipe: Recipe, stream: Tensor, seed: int) -> Iterator[Batch]:
    for tokens in windows(stream, recipe.length, recipe.batch_size, seed):
        yield Batch(tokens, torch.ones_like(tokens), torch.ones_like(tokens, dtype=torch.bool))


def _task_batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Batch]:
    ids = tokenizer.get_vocab()
    streams = {task: examples(task, "train", seed) for task, _ in recipe.share}
    counts = [round(recipe.batch_size * part) for _, part in recipe.share]
    tasks = [task for (task, _), count in zip(recipe.share, counts, strict=True) for _ in range(count)]
    while True:
        tokens = torch.full((len(tasks), MAX_LENGTH), tokenizer.pad_token_id)
        answer = torch.zeros(len(tasks), MAX_LENGTH, dtype=torch.bool)
        for row, task in enumerate(tasks):
            text = "".join(next(streams[task]))
            tokens[row, -len(text) :] = torch.tensor([ids[c] for c in text])
            answer[row, -TASKS[task].answer_length :] = True
        yield Batch(tokens, (tokens != tokenizer.pad_token_id).long(), answer)


def masked_diffusion_loss(
    model: nn.Module, batch: Batch, generator: torch.Generator, stratified: bool = False
) -> Tensor:
    """Mean over rows of sum_{masked} cross-entropy / k."""
    length = batch.answer.sum(1)  # (batch,)
    draws = torch.rand(length.shape, generator=generator)
    if stratified:
        draws = (draws + torch.arange(len(draws))) / len(draws)
    k = (draws * length).long() + 1
    # the k answer positions that draw the smallest numbers are masked
    order = torch.rand(batch.tokens.shape, generator=generator).where(batch.answer, 2.0)
    masked = order.argsort(1).argsort(1) < k[:, None]
    noised = batch.tokens.where(~masked, cast(LLaDAConfig, model.config).mask_token_id or 0)
    attention = None if bool(batch.attention.all()) else batch.attention
    logits = model(input_ids=noised, attention_mask=attention).logits
    losses = _token_losses(logits, batch.tokens)
    return (losses * masked / k[:, None]).sum() / len(k)


def autoregressive_loss(model: nn.Module, batch: Batch, generator: torch.Generator, stratified: bool = False) -> Tensor:
    """Mean over rows of the mean cross-entropy of the answer tokens, each predicted from those before it."""
    logits = model(input_ids=batch.tokens, attention_mask=batch.attention, use_cache=False).logits[:, :-1]
    target, scored = batch.tokens[:, 1:], batch.answer[:, 1:]
    losses = _token_losses(logits, target)
    return (losses * scored / scored.sum(1, keepdim=True)).sum() / len(target)


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(batch, length, vocabulary), (batch, length) -> cross-entropy of every token (batch, length)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)


LOSSES: dict[Objective, Callable[..., Tensor]] = {
    "masked_diffusion": masked_diffusion_loss,
    "autoregressive": autoregressive_loss,
}
