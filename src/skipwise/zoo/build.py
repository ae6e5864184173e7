"""Zoo models as they begin, and as standard checkpoints when they are trained."""

import json
import math
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from skipwise.errors import UserError
from skipwise.files import write_atomically, write_bytes_atomically
from skipwise.loading import load
from skipwise.models.dream import SHARED, DreamConfig, DreamModel
from skipwise.models.llada import LLaDAConfig, LLaDAModelLM, official_state_dict
from skipwise.models.mdlm import MDLM, MDLMBlock, MDLMConfig
from skipwise.zoo.recipes import Recipe
from skipwise.zoo.tokenizer import build_tokenizer

ZooModel = LLaDAModelLM | DreamModel | MDLM | LlamaForCausalLM

_TASKS = """A {kind} language model over generated tasks with exact answers: three-digit addition, chained arithmetic,
sorting and reversing digits. Made to measure what skipping blocks costs; of no other use."""
_ENGLISH = """A {kind} language model (MDLM) over English text: State of the Union addresses up to 2009 and Moby-Dick
from chapter 11 on (both free of copyright). Made to measure what lighter denoising steps cost; of no other use."""
CARD = """# {name}

{what} Apache-2.0, trained from scratch.

Reproduce it with `skipwise zoo train {name} --seed {seed}`; the log of the run that made these weights is train.jsonl.
"""


def build_model(recipe: Recipe, seed: int, parent: str | None = None) -> ZooModel:
    """A freshly initialised model, or one with the weights of `parent` (what `load` takes; the recipe's by default)."""
    if recipe.parent:
        return _continued(parent or recipe.parent)
    torch.manual_seed(seed)
    if recipe.corpus == "english":
        return _settle(MDLM(_mdlm_config(recipe)), recipe)
    model: LLaDAModelLM | LlamaForCausalLM
    if recipe.objective == "masked_diffusion":
        model = LLaDAModelLM(LLaDAConfig(mask_token_id=build_tokenizer().mask_token_id, **_llama_settings(recipe)))
    else:
        model = LlamaForCausalLM(LlamaConfig(**_llama_settings(recipe)))
    _shrink_branches(model)
    return model


def _mdlm_config(recipe: Recipe) -> MDLMConfig:
    return MDLMConfig(
        model_length=recipe.length,
        vocab_size=recipe.vocabulary,
        hidden_dim=recipe.width,
        cond_dim=32,
        n_blocks=recipe.blocks,
        n_heads=recipe.heads,
        dropout=0.0,
    )


@torch.no_grad()
def _settle(model: MDLM, recipe: Recipe) -> MDLM:
    """Every block takes part from the start, and what tells it the noise level, which is always 0 here, is not trained.

    Gates that begin at zero and rates that multiply through the conditioning cost the deep model its lead.
    """
    width, branch_end = recipe.width, (2 * recipe.blocks) ** -0.5
    nn.init.normal_(model.vocab_embed.embedding, std=1.0)
    for block in cast(list[MDLMBlock], model.blocks):
        for linear, scale in (
            (block.attn_qkv, 1.0),
            (block.attn_out, branch_end),
            (cast(nn.Linear, block.mlp[0]), 1.0),
            (cast(nn.Linear, block.mlp[2]), branch_end),
        ):
            nn.init.normal_(linear.weight, std=scale * linear.in_features**-0.5)
        for gate in (2, 5):  # of shift, scale and gate of the attention, and of the MLP
            block.adaLN_modulation.bias[gate * width : (gate + 1) * width] = 1.0
    for conditioning in (model.sigma_map, *(m for n, m in model.named_modules() if n.endswith("adaLN_modulation"))):
        for name, parameter in conditioning.named_parameters():
            parameter.requires_grad_(conditioning is not model.sigma_map and name == "bias")
    return model


def _llama_settings(recipe: Recipe) -> dict[str, Any]:
    tokenizer = build_tokenizer()
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp_width,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=recipe.width**-0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


@torch.no_grad()
def _shrink_branches(model: LLaDAModelLM | LlamaForCausalLM) -> None:
    """Residual branches start small, so that depth does not blow up the stream."""
    for layer in model.model.layers:
        for branch_end in (layer.self_attn.o_proj, layer.mlp.down_proj):
            branch_end.weight.div_(math.sqrt(2 * len(model.model.layers)))


def _continued(parent: str) -> DreamModel:
    """A Dream with the weights of an autoregressive Llama; the biases that only Dream has are 0."""
    source, tokenizer = load(parent)
    if type(source) is not LlamaForCausalLM or tokenizer.mask_token_id is None:
        raise UserError(f"{parent} is a {type(source).__name__}; a parent is a zoo model such as tiny-ar.")
    shared = {key: value for key, value in source.config.to_dict().items() if key in SHARED}
    shared |= {"mask_token_id": tokenizer.mask_token_id, "rope_parameters": source.config.rope_parameters}
    model = DreamModel(DreamConfig(**shared))
    biases = {key: torch.zeros_like(value) for key, value in model.state_dict().items() if key.endswith(".bias")}
    model.load_state_dict(source.state_dict() | biases)
    return model.train()


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The blocks of a zoo model."""
    return model.blocks if isinstance(model, MDLM) else model.model.layers  # type: ignore[return-value, union-attr]


def save_model(
    model: ZooModel, name: str, seed: int, folder: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Write a standard checkpoint: the official layouts of LLaDA, Dream and MDLM, transformers' for the others."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    if type(model) is LlamaForCausalLM:  # LLaDA is one as well
        model.save_pretrained(folder)
    else:
        weights = official_state_dict(model) if isinstance(model, LLaDAModelLM) else model.state_dict()
        write_bytes_atomically(folder / "model.safetensors", save(weights, {"format": "pt"}))
        write_atomically(folder / "config.json", json.dumps(model.config.to_official(), indent=2) + "\n")
    kind = recipe.objective.replace("_", " ")
    what = (_ENGLISH if recipe.corpus == "english" else _TASKS).format(kind=kind)
    write_atomically(folder / "README.md", CARD.format(name=name, seed=seed, what=what))
    return folder
