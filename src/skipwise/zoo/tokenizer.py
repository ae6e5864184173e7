"""The zoo's tokenizer: one token a character."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "mask_token": "<mask>", "eos_token": "<eos>", "unk_token": "<unk>"}
CHARACTERS = "0123456789+-*=acrs"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer over `CHARACTERS` with pad, mask, end-of-text and unknown tokens; pads on the left."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **SPECIAL)
