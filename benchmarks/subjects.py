"""What the benchmarks decode: the embedded models' tasks, and random models of published shapes."""

from typing import Any

import torch
from pairs import Prompts

from skipwise.evaluation import calibration_texts
from skipwise.models import LLaDA
from skipwise.models.dream import DreamConfig, DreamModel
from skipwise.models.mdlm import MDLM, MDLMConfig
from skipwise.models.random import random_model

WIDTH, LAYERS = 512, 8  # of the shapes


def zoo_prompts(tokenizer: Any, batch: int, padded: bool, length: int = 9) -> Prompts:
    """Prompts of `length` tokens; padded: row r lacks its first r tokens, up to five."""
    texts = ["".join(text) for text in calibration_texts(tokenizer, max(batch, 8))][:batch]
    ids = torch.tensor([tokenizer(text)["input_ids"][:length] for text in texts])
    if not padded:
        return Prompts(ids)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : row % 6] = 0
    return Prompts(ids.masked_fill(mask == 0, 0), mask)


def llada_shape(quick: bool) -> Any:
    return LLaDA.from_dims(
        width=64 if quick else WIDTH, layers=LAYERS, heads=8, mlp=96 if quick else 1536, vocab=999 if quick else 126464
    )


def dream_shape(quick: bool) -> Any:
    config = DreamConfig(
        hidden_size=64 if quick else WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=96 if quick else 1536,
        vocab_size=999 if quick else 152064,
        mask_token_id=998 if quick else 151666,
        eos_token_id=None,
        pad_token_id=None,
        bos_token_id=None,
    )
    return random_model(DreamModel, config)


def mdlm_shape(quick: bool) -> Any:
    sizes = {"hidden_dim": 64 if quick else WIDTH, "n_blocks": LAYERS, "n_heads": 8}
    return random_model(MDLM, MDLMConfig(vocab_size=999 if quick else 50258, **sizes))


def random_prompts(batch: int, length: int) -> Prompts:
    return Prompts(torch.randint(900, (batch, length), generator=torch.Generator().manual_seed(0)))
