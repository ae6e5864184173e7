"""Where the subject's tokens are, with tokenizers of the three kinds that pipelines use and a vocabulary of our own."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from skipwise.errors import UserError
from skipwise.prompts import token_positions


def _clip() -> PreTrainedTokenizerFast:
    """Begin and end tokens, lower case, words in pieces: `sks` is one token, `dog` two."""
    words = {"<s>": 0, "</s>": 1, "a": 2, "photo": 3, "of": 4, "sks": 5, "do": 6, "##g": 7, ",": 8, "##s": 9}
    core = Tokenizer(models.WordPiece(words, unk_token="</s>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="</s>", padding_side="right")


def _t5() -> PreTrainedTokenizerFast:
    """An end token alone; a word begins with its space: `sks` is four tokens, of which the first is the space."""
    pieces = ["<pad>", "</s>", "▁", "▁a", "▁photo", "▁of", "s", "k", "▁dog", ","]
    core = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", padding_side="right")


def _gemma() -> PreTrainedTokenizerFast:
    """A begin token alone."""
    words = {"<bos>": 0, "<pad>": 1, "a": 2, "photo": 3, "of": 4, "sks": 5, "dog": 6, ":": 7, "Write": 8, "it": 9}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", padding_side="right")


PROMPT = "a photo of sks dog, a dog"


def _named(tokenizer: Any, positions: tuple[int, ...], **padding: Any) -> list[str]:
    ids = tokenizer(PROMPT, **padding)["input_ids"]
    return tokenizer.convert_ids_to_tokens([ids[position] for position in positions])


def test_tokens_of_clip() -> None:
    tokenizer = _clip()
    assert token_positions(tokenizer, PROMPT, "sks", max_length=77) == (4,)
    assert token_positions(tokenizer, PROMPT, "SKS dog") == (4, 5, 6)
    both = token_positions(tokenizer, PROMPT, "dog")
    assert _named(tokenizer, both) == ["do", "##g", "do", "##g"]


def test_tokens_of_t5() -> None:
    tokenizer = _t5()
    found = token_positions(tokenizer, PROMPT, "sks dog", max_length=16)
    assert _named(tokenizer, found) == ["s", "k", "s", "▁dog"]
    assert found == token_positions(tokenizer, PROMPT, "sks dog"), "padding is on the right"


def test_tokens_of_two_encoders_in_one_stream() -> None:
    """SD3: 77 tokens of CLIP, then those of T5."""
    clip, t5 = _clip(), _t5()
    tokens = token_positions(clip, PROMPT, "sks", max_length=77)
    tokens += token_positions(t5, PROMPT, "sks", max_length=256, offset=77)
    assert tokens == (4, *(77 + p for p in token_positions(t5, PROMPT, "sks")))


def test_tokens_behind_sanas_instruction() -> None:
    """As the pipeline selects: the first token, and the last max_length - 1 of the padded text."""
    tokenizer, prefix, length = _gemma(), "Write it : a sks dog : ", 12
    encoded = len(tokenizer.encode(prefix)) + length - 2
    ids = tokenizer(prefix + PROMPT, padding="max_length", max_length=encoded, truncation=True)["input_ids"]
    stream = [ids[i] for i in [0, *range(-length + 1, 0)]]
    found = token_positions(tokenizer, PROMPT, "sks dog", max_length=length, prefix=prefix)
    assert tokenizer.convert_ids_to_tokens([stream[position] for position in found]) == ["sks", "dog"]
    assert token_positions(tokenizer, PROMPT, "sks", max_length=length) == (4,)
    with pytest.raises(UserError, match="give max_length too"):
        token_positions(tokenizer, PROMPT, "sks", prefix=prefix)


@pytest.mark.parametrize(
    ("subject", "settings", "message"),
    [
        ("cat", {}, "The subject 'cat' is not in the prompt 'a photo of sks dog, a dog'; give a word of the prompt"),
        ("do", {}, "The subject 'do' is not in the prompt"),
        ("", {}, "The subject '' is not in the prompt"),
        ("sks", {"max_length": 4}, "The subject 'sks' is cut off: it is behind the 4 tokens"),
    ],
)
def test_subjects_that_are_not_there(subject: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        token_positions(_clip(), PROMPT, subject, **settings)


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(UserError, match="load a fast tokenizer"):
        token_positions(object(), PROMPT, "sks")
