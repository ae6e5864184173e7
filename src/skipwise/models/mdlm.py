"""MDLM: masked diffusion with a DiT backbone, native, from the official checkpoints.

Source: Sahoo et al., "Simple and Effective Masked Diffusion Language Models" (arXiv 2406.07524). A transformer with
adaptive layer norm: every block's norms are shifted and scaled, and its branches gated, by an embedding of the noise
level sigma. The published OpenWebText model is not told the noise level, so that sigma is 0.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MaskedLMOutput

from skipwise.models.bidirectional import Where, kept
from skipwise.models.hooks import watched
from skipwise.models.lean import Places, following, quickly, spread
from skipwise.models.linear import linear
from skipwise.models.native import MaskedDiffusion, OfficialConfig, registered
from skipwise.models.official import Layout
from skipwise.models.workspace import Workspace

FREQUENCIES = 256  # of the sinusoidal embedding of sigma
ROTARY_BASE = 10000.0
Store = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Modulation = tuple[Tensor, ...]
KEY_MAPPING = {r"^backbone\.": ""}
_NEEDED = ("vocab_size", "hidden_dim", "cond_dim", "n_blocks", "n_heads")
_KEYS = (*_NEEDED, "model_length", "dropout", "time_conditioning")

LAYOUT = Layout(family="MDLM", architectures=("MDLM",), needed=_NEEDED, used=(*_KEYS, "mask_token_id"))


class MDLMConfig(OfficialConfig, PreTrainedConfig):
    """The official config's own keys. The mask token is the last of the vocabulary, unless mask_token_id names one."""

    model_type = "mdlm"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "n_blocks",
        "num_attention_heads": "n_heads",
    }
    model_length: int = 1024
    vocab_size: int = 50258
    hidden_dim: int = 768
    cond_dim: int = 128
    n_blocks: int = 12
    n_heads: int = 12
    dropout: float = 0.1
    time_conditioning: bool = False
    mask_token_id: int | None = None
    layout: ClassVar[Layout] = LAYOUT

    def __post_init__(self, **kwargs: Any) -> None:
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size - 1
        super().__post_init__(**kwargs)

    @classmethod
    def is_official(cls, config: Mapping[str, Any]) -> bool:
        """The official keys are this config's own; only this one also names the mask token."""
        return "mask_token_id" not in config

    @classmethod
    def from_official(cls, official: dict[str, Any]) -> "MDLMConfig":
        """Translate the dictionary of an official config.json.

        Raises UserError naming the key when one is missing, or means nothing that this module implements.
        """
        stored = LAYOUT.check(official)
        settings = {key: official[key] for key in (*_KEYS, "mask_token_id") if key in official}
        return cls(architectures=["MDLM"], **settings, **stored)

    def to_official(self) -> dict[str, Any]:
        """The dictionary of the official config.json."""
        keys = _KEYS if self.mask_token_id == self.vocab_size - 1 else (*_KEYS, "mask_token_id")
        return {"architectures": ["MDLM"], "model_type": self.model_type} | {key: getattr(self, key) for key in keys}


class _Norm(nn.Module):
    """Layer norm without bias, in float32 whatever the stream's dtype."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], self.weight.float()).to(x.dtype)


class _Embedding(nn.Module):
    def __init__(self, rows: int, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embedding)


class _SigmaEmbedding(nn.Module):
    """sigma (batch,) -> (batch, cond_dim), in the model's dtype, which quantised weights do not tell."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(10000.0) * torch.arange(half, device=sigma.device, dtype=torch.float32) / half)
        angles = sigma.float()[:, None] * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


def _modulate(x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    return torch.addcmul(shift, x, factor)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, -1), sine)


class MDLMBlock(nn.Module):
    """Attention and MLP, each normed, modulated and gated by the conditioning (adaLN)."""

    def __init__(self, config: MDLMConfig):
        super().__init__()
        width = config.hidden_dim
        self.heads, self.dropout = config.n_heads, config.dropout
        self.norm1 = _Norm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = _Norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * width)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        conditioning: Tensor,
        attention_mask: Tensor | None = None,
        store: Store | None = None,
        where: Places | None = None,
        modulation: Modulation | None = None,
    ) -> Tensor:
        """x: (batch, length, width); rotary: as the model's `_table`; conditioning: (batch, cond_dim); mask: bool.

        store: takes the keys and values of x, (batch, heads, length, head width), and gives those that x attends to.
        where: rows and positions (n,) whose output alone is wanted, (n, width). modulation: what `modulation` makes of
        the conditioning, where that is known.
        """
        if modulation is None:
            modulation = self.modulation(conditioning)
        shift_attention, factor_attention, gate_attention, *after = modulation
        normed = _modulate(self.norm1(x), shift_attention, factor_attention)
        attended = self._attend(normed, rotary, attention_mask, store)
        if where is not None:
            x, attended = x[where], attended[where]
            # what is alike for all rows is of one
            gate_attention, *after = (
                part[0] if len(part) == 1 else part[where[0], 0] for part in (gate_attention, *after)
            )
        shift_mlp, factor_mlp, gate_mlp = after
        x = torch.addcmul(x, gate_attention, self._drop(linear(self.attn_out, attended)))
        mixed = self._mix(_modulate(self.norm2(x), shift_mlp, factor_mlp))
        return torch.addcmul(x, gate_mlp, self._drop(mixed))

    def modulation(self, conditioning: Tensor) -> Modulation:
        """What conditioning (batch, cond_dim) does in the block: shift, factor, gate of attention and of MLP, (batch,
        1, width) each.
        """
        shift, scale, gate, *mlp = self.adaLN_modulation(conditioning)[:, None].chunk(6, dim=-1)
        return shift, 1 + scale, gate, mlp[0], 1 + mlp[1], mlp[2]

    def _attend(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], attention_mask: Tensor | None, store: Store | None
    ) -> Tensor:
        """What the heads gather, (batch, length, width); `attn_out` is still to come."""
        batch, length, width = x.shape
        heads = linear(self.attn_qkv, x).view(batch, length, 3, self.heads, width // self.heads)
        turned = _rotate(heads[:, :, :2].float(), *rotary).to(x.dtype).transpose(1, 3)
        query, key, value = *turned.unbind(2), heads[:, :, 2].transpose(1, 2)  # (batch, heads, length, head width)
        if store is not None:
            key, value = store(key, value)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return out.transpose(1, 2).reshape(batch, length, width)

    def _mix(self, x: Tensor) -> Tensor:
        if watched(self.mlp):
            return self.mlp(x)
        up, activation, down = self.mlp
        return linear(down, activation(linear(up, x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training else x


class _OutputLayer(nn.Module):
    def __init__(self, config: MDLMConfig):
        super().__init__()
        self.norm_final = _Norm(config.hidden_dim)
        self.linear = nn.Linear(config.hidden_dim, config.vocab_size)
        self.adaLN_modulation = nn.Linear(config.cond_dim, 2 * config.hidden_dim)

    def modulation(self, conditioning: Tensor) -> Modulation:
        """Shift and factor (batch, width) each."""
        shift, scale = self.adaLN_modulation(conditioning).chunk(2, dim=-1)
        return shift, 1 + scale

    def states(self, x: Tensor, modulation: Modulation, rows: Tensor | None = None) -> Tensor:
        """What `linear` makes logits of. rows: of which each x (n, width) is; without them, x has the batch's."""
        alike = len(modulation[0]) == 1
        shift, factor = (part if alike else part[:, None] if rows is None else part[rows] for part in modulation)
        return _modulate(self.norm_final(x), shift, factor)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        return self.linear(self.states(x, self.modulation(conditioning)))


def _bare(block: nn.Module) -> bool:
    """Whether nothing is in the way of the block's own forward."""
    return type(block) is MDLMBlock and not any(map(watched, block.modules()))


@registered
class MDLM(MaskedDiffusion, GenerationMixin, PreTrainedModel):  # type: ignore[misc]  # generate is not transformers'
    """MDLM with its head. `model(input_ids).logits[b, p]` are raw scores of the token at position p.

    input_ids: (batch, length) int64, masked positions hold `config.mask_token_id`; attention_mask: (batch, length),
    0 on padding; sigma: (batch,) noise level, used when the config asks for time conditioning; logits: (batch, length,
    vocab_size). That unmasked tokens stay and the mask is never predicted (SUBS) is the sampler's business.
    """

    config_class = MDLMConfig
    config: MDLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    family = "mdlm"
    takes_cache = True
    predicts_mask = False
    commits_by_confidence = False
    official_keys = KEY_MAPPING
    counts_what_runs = True  # its forward numbers the blocks that run, whichever they are
    _no_split_modules = {"MDLMBlock"}  # noqa: RUF012 (transformers' own way)

    def __init__(self, config: MDLMConfig):
        super().__init__(config)
        self.vocab_embed = _Embedding(config.vocab_size, config.hidden_dim)
        self.sigma_map = _SigmaEmbedding(config.cond_dim)
        self.blocks = nn.ModuleList(MDLMBlock(config) for _ in range(config.n_blocks))
        self.output_layer = _OutputLayer(config)
        self.post_init()

    @property
    def takes_sigma(self) -> bool:  # type: ignore[override]
        """Whether the config asks for time conditioning."""
        return self.config.time_conditioning

    def _init_weights(self, module: nn.Module) -> None:
        """Modulations and the head begin at zero, so that every block begins as the identity (DiT)."""
        if isinstance(module, _Embedding):
            nn.init.normal_(module.embedding, std=0.02)
        if isinstance(module, MDLMBlock | _OutputLayer):
            zeros = (module.adaLN_modulation, *([module.linear] if isinstance(module, _OutputLayer) else []))
            for parameter in (parameter for part in zeros for parameter in part.parameters()):
                nn.init.zeros_(parameter)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        sigma: Tensor | None = None,
        logits_to_keep: Where | int = 0,
        states: bool = False,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        space: Workspace | None = None,
    ) -> Any:
        """One forward; see the class for shapes. logits_to_keep: a bool mask (batch, length), whose logits are (n,
        vocab_size), row by row; positions (k,) or (batch, k); or the last n positions; 0 is all. states: return what
        `self.states` does, at logits_to_keep, instead of logits.
        """
        stored: Any = {"past_key_values": past_key_values, "position_ids": position_ids}
        found = self.states(input_ids, attention_mask, logits_to_keep, sigma=sigma, space=space, **stored)
        return found if states else MaskedLMOutput(logits=self.head(found))

    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        where: Where | int | None = None,
        *,
        sigma: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        space: Workspace | None = None,
    ) -> Tensor:
        """What the head makes logits of: (batch, length, hidden_dim), or at `where` alone.

        past_key_values: stores keys and values as transformers' decoders do; attention still looks both ways.
        position_ids: (batch, length), those that follow what is stored when left out. space: of a model that nobody
        changes between the forwards that share it.
        """
        x = self.vocab_embed(input_ids)
        rotary = self._rotary(x, past_key_values, position_ids, space)
        bare = self._bare(space)
        conditioning, modulations = self._conditioning(x, sigma, space if bare else None)
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask.bool()[:, None, None, :]
        narrowed = self._narrows(where, bare)
        with quickly(narrowed and bare):
            for number, block in enumerate(self.blocks):
                # what is not needed is no argument, so that stand-ins and hooks see the same call as ever
                more: Any = {"modulation": modulations[number]} if modulations else {}
                if past_key_values is not None:
                    more["store"] = partial(past_key_values.update, layer_idx=number)
                if narrowed and number == len(self.blocks) - 1:
                    more["where"] = where
                x = block(x, rotary, conditioning, attention_mask, **more)
        last = modulations[-1] if modulations else self.output_layer.modulation(conditioning)
        if space is not None:
            space.narrowed = narrowed
        if not narrowed:
            return kept(self.output_layer.states(x, last), where)
        return self.output_layer.states(x, last, cast(Places, where)[0])

    def _bare(self, space: Workspace | None) -> bool:
        """Whether nothing is in the way of any part's own forward."""
        if space is not None and space.kept.get("bare"):
            return True
        ends = (*self.sigma_map.modules(), *self.output_layer.modules())
        bare = all(map(_bare, self.blocks)) and not any(map(watched, ends))
        if space is not None:
            space.kept["bare"] = bare
        return bare

    def _conditioning(
        self, x: Tensor, sigma: Tensor | None, space: Workspace | None
    ) -> tuple[Tensor, list[Modulation] | None]:
        """The conditioning (batch, cond_dim); all that is made of it, where that is known from an earlier forward."""
        if sigma is not None and self.config.time_conditioning:
            return F.silu(self.sigma_map(sigma, x.dtype)), None
        if space is None:
            return F.silu(self.sigma_map(torch.zeros(len(x), device=x.device), x.dtype)), None
        begun = "modulations" in space.kept
        conditioning, modulations, flops = space.keep("modulations", self._modulations)
        space.known_flops = flops * (len(x) - (not begun))
        return conditioning.expand(len(x), -1), modulations

    def _modulations(self) -> tuple[Tensor, list[Modulation], int]:
        """Without noise: the conditioning (1, cond_dim), what blocks and output make of it, and the FLOPs of that."""
        parts: Any = (*self.blocks, self.output_layer)
        maps = [self.sigma_map.mlp[0], self.sigma_map.mlp[2], *(part.adaLN_modulation for part in parts)]
        words = self.vocab_embed.embedding
        conditioning = F.silu(self.sigma_map(torch.zeros(1, device=words.device), words.dtype))
        flops = 2 * sum(part.in_features * part.out_features for part in maps)
        return conditioning, [part.modulation(conditioning) for part in parts], flops

    def _narrows(self, where: Where | int | None, bare: bool) -> bool:
        """Whether the last block would run the wanted positions alone, behind its keys and values."""
        wanted = isinstance(where, tuple) and not torch.is_grad_enabled()
        return wanted and len(self.blocks) > 0 and (bare or _bare(self.blocks[-1]))

    def spared(self, rows: int, keys: int) -> int:
        """FLOPs that this spares for every other position."""
        last: Any = self.blocks[-1]
        return 2 * sum(part.in_features * part.out_features for part in (last.attn_out, last.mlp[0], last.mlp[2]))

    @property
    def head(self) -> nn.Module:
        """States (..., hidden_dim) -> logits (..., vocab_size)."""
        return self.output_layer.linear

    def _rotary(
        self, x: Tensor, past: Cache | None, position_ids: Tensor | None, space: Workspace | None
    ) -> tuple[Tensor, Tensor]:
        """What turns the heads of x (rows, length, width), at its positions or at those that follow what is stored."""
        if position_ids is not None:
            return self._table(position_ids)
        begin = 0 if past is None else past.get_seq_length()
        if space is None:
            return self._table(following(x, begin))
        return space.keep((begin, x.shape[1]), lambda: self._table(following(x, begin)))

    def _table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Two (..., length, 1, 1 or heads, head width) of positions (..., length)."""
        heads = self.config.n_heads
        width = self.config.hidden_dim // heads
        rates = ROTARY_BASE ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
        angles = positions.float()[..., None, None, None] * rates
        cosine, sine = angles.cos(), angles.sin()  # the first half of a head is turned against the second
        return spread(torch.cat([cosine, cosine], -1), heads), spread(torch.cat([-sine, sine], -1), heads)
