"""Running English text as training windows, and the small byte-level BPE that reads it."""

from collections.abc import Iterator, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from skipwise.errors import UserError

END, MASK, PAD = "<eos>", "<mask>", "<pad>"


def train_tokenizer(documents: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` tokens, of which the mask is the last, as MDLM has it; pads on the left.

    Raises UserError when the text is too short for so many.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", pad_token=PAD, eos_token=END)
    fast.add_special_tokens({"mask_token": MASK})
    if len(fast) != vocabulary:
        raise UserError(f"The text gives {len(fast)} tokens of the {vocabulary} that the recipe asks for; add text.")
    return fast


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> Tensor:
    """(tokens,): all documents one after another, each with the end of text behind it."""
    ids = tokenizer(list(documents), verbose=False)["input_ids"]
    return torch.tensor([token for document in ids for token in (*document, tokenizer.eos_token_id)])


def windows(stream: Tensor, length: int, count: int, seed: int) -> Iterator[Tensor]:
    """An endless stream of (count, length): windows that begin anywhere."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        begins = torch.randint(0, len(stream) - length + 1, (count,), generator=generator)
        yield stream[begins[:, None] + torch.arange(length)]
