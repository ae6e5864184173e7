"""Dream: a masked diffusion language model initialised from Qwen2.5, native, from the official checkpoints.

Source: Ye et al., "Dream 7B" (arXiv 2508.15487). Dream is Qwen2 with bidirectional attention, trained to predict
position p from the state at p - 1, as its autoregressive parent does. That shift is part of this model's face: whoever
uses it sees logits for position p at index p.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import Cache, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from skipwise.errors import UserError
from skipwise.models.bidirectional import Bidirectional, Where, kept
from skipwise.models.native import OfficialConfig, registered
from skipwise.models.official import Layout

OFFICIAL_VOCABULARY, END_OF_TURN = 152064, 151645
OFFICIAL_ROPE = 10000.0  # what the official code takes where the config does not say; Dream-7B's says 1e6

ONLY_SUPPORTED = {"use_sliding_window": False, "hidden_act": "silu", "use_mrope": False}
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
# keys that the official config.json and Qwen2's share
SHARED = (
    *NEEDED,
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_dropout",
    "mask_token_id",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)

LAYOUT = Layout(
    family="Dream",
    architectures=("DreamModel",),
    needed=NEEDED,
    used=(*SHARED, "rope_theta", "rope_scaling"),
    only=ONLY_SUPPORTED,
    idle=("sliding_window", "max_window_layers"),  # of sliding windows
)

# rope_type -> what else rope_scaling may say: the types of Qwen2 that turn a position the same way in every sequence
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
}

KEY_MAPPING: dict[str, str] = {}  # the names are Qwen2's own


class DreamConfig(OfficialConfig, Qwen2Config):
    """A `Qwen2Config` whose attention looks both ways (`is_causal` False), with Dream's mask token."""

    model_type = "Dream"
    mask_token_id: int | None = 151666
    eot_token_id: int | None = None  # ends a turn; the official files know it by number only
    is_causal: bool = False
    use_cache: bool = False
    layout: ClassVar[Layout] = LAYOUT
    only: ClassVar[Mapping[str, Any]] = ONLY_SUPPORTED

    @classmethod
    def is_official(cls, config: Mapping[str, Any]) -> bool:
        """The official code knows no rope_parameters; all other keys are the same."""
        return "rope_parameters" not in config

    @classmethod
    def from_official(cls, official: dict[str, Any]) -> "DreamConfig":
        """Translate the dictionary of an official config.json.

        Raises UserError naming the key, its value and the supported one for what this module does not implement.
        """
        stored = LAYOUT.check(official)
        settings = {key: official[key] for key in SHARED if key in official}
        if settings["vocab_size"] == OFFICIAL_VOCABULARY:
            settings["eot_token_id"] = END_OF_TURN
        rope = _rope(official.get("rope_scaling")) | {"rope_theta": float(official.get("rope_theta") or OFFICIAL_ROPE)}
        return cls(architectures=["DreamModel"], rope_parameters=rope, **settings, **stored)

    def to_official(self) -> dict[str, Any]:
        """The official config.json that `from_official` reads back to this config."""
        official = {key: getattr(self, key) for key in SHARED}
        official |= {key: value for key, value in ONLY_SUPPORTED.items() if value is not None}
        rope = dict(cast(dict, self.rope_parameters))
        official |= {"rope_theta": rope.pop("rope_theta")}
        official |= {"rope_scaling": None if rope["rope_type"] == "default" else rope}
        return {"model_type": "Dream", "architectures": ["DreamModel"], **official}


def _rope(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """transformers' rope_parameters, but for rope_theta, of what a config.json calls rope_scaling.

    Raises UserError for a type that is not among ROPE_TYPES, and for what belongs to no type or is missing.
    """
    given = {key: value for key, value in (scaling or {}).items() if value is not None}
    kind = given.pop("type", "default")
    kind = given.pop("rope_type", kind)
    if kind not in ROPE_TYPES:
        raise UserError(
            f"Dream config has rope_scaling of the type {kind!r}; skipwise implements {', '.join(ROPE_TYPES)}, which "
            "do not depend on the length of the sequence."
        )
    other = [key for key in given if key not in ROPE_TYPES[kind]]
    if other:
        raise UserError(
            f"Dream config's rope_scaling has {other[0]}={given[other[0]]!r}; of the type {kind!r} are "
            f"{', '.join(ROPE_TYPES[kind]) or 'no other keys'}."
        )
    needed = ROPE_TYPES[kind] if kind == "llama3" else ROPE_TYPES[kind][:1]
    for key in needed:
        number = given.get(key)
        if not isinstance(number, int | float) or not (number >= 1 or key.endswith("freq_factor")):
            raise UserError(f"Dream config's rope_scaling of the type {kind!r} has {key}={number!r}; give a number.")
    return {"rope_type": kind, **given}


@registered
class DreamModel(Bidirectional, Qwen2ForCausalLM):  # type: ignore[misc]  # generate is not transformers'
    """Dream with its language-model head. `model(input_ids).logits[b, p]` predicts the token *at* position p.

    input_ids: (batch, length) int64, masked positions hold `config.mask_token_id`; attention_mask: (batch, length),
    0 on left padding; logits: (batch, length, vocab_size).
    """

    config_class = DreamConfig
    config: DreamConfig
    family = "dream"
    shift = 1

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        logits_to_keep: Any = 0,
        states: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The logits of position p are made from the state at p - 1; a row's first token keeps its own.

        logits_to_keep: positions to predict, as an index (positions,), as one for each row (batch, positions), or as a
        bool mask (batch, length), whose logits are (n, vocab_size), row by row; or the last n of them; 0 is all.
        Rotary positions count the padding too: attention sees differences of positions only, so that a left-padded
        row gives what it gives alone. With past_key_values, positions are those of the window that runs, whose first
        one keeps its own state.
        states: return what `self.states` does, at logits_to_keep, instead of logits.
        """
        if states:
            return self.states(cast(Tensor, input_ids), attention_mask, logits_to_keep, **kwargs)
        outputs = self.model(input_ids, attention_mask=attention_mask, **kwargs)
        found = outputs.last_hidden_state
        present = _present(attention_mask, found, kwargs.get("past_key_values"), kwargs.get("position_ids"))
        where = _before(_positions(logits_to_keep, found), present, found)
        logits = self.lm_head(kept(found, where))
        return CausalLMOutputWithPast(
            logits=cast(Any, logits), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, where: Where | int | None = None, **others: Any
    ) -> Tensor:
        """What the head makes logits of: (batch, length, width), or at `where` alone; the shift is in it."""
        if where is None and attention_mask is None:
            states = self._run(input_ids, None, None, **others)
            return torch.cat([states[:, :1], states[:, :-1]], 1)  # not by index, at which torch's compiler fails
        asked = where if isinstance(where, tuple) else _positions(0 if where is None else where, input_ids)
        present = _present(attention_mask, input_ids, others.get("past_key_values"), others.get("position_ids"))
        before = _before(asked, present, input_ids)
        return self._run(input_ids, attention_mask, before, **others)


def _present(
    attention_mask: Tensor | None, states: Tensor, past: Cache | None, position_ids: Tensor | None
) -> Tensor | None:
    """The mask (batch, positions) of the positions that run: with a past, those named or else those that follow it."""
    if attention_mask is None:
        return None
    mask = attention_mask.reshape(len(states), -1)
    if past is not None and position_ids is not None:
        return mask.gather(1, position_ids.expand(len(mask), -1))
    begin = 0 if past is None else past.get_seq_length()
    return mask[:, begin : begin + states.shape[1]]


def _positions(logits_to_keep: int | Tensor, inputs: Tensor) -> Tensor:
    """(batch, positions), or a mask (batch, length) as it is."""
    batch, length = inputs.shape[:2]
    if not isinstance(logits_to_keep, Tensor):
        logits_to_keep = torch.arange(length - (logits_to_keep or length), length, device=inputs.device)
    if logits_to_keep.ndim == 1 and logits_to_keep.dtype != torch.bool:
        return logits_to_keep.expand(batch, -1)
    if logits_to_keep.ndim != 2:
        raise UserError("Dream takes logits_to_keep as a number, an index of positions, or a mask of all positions.")
    return logits_to_keep


def _before(where: Where, present: Tensor | None, inputs: Tensor) -> Where:
    """Where the states are that predict what is at `where` (see `kept`): one to the left of each position."""
    first = torch.zeros(len(inputs), 1, dtype=torch.long, device=inputs.device)
    if present is not None:  # left of a row's first token there is only padding
        first = present.int().argmax(1, keepdim=True)
    if isinstance(where, Tensor) and where.dtype != torch.bool:
        return (where - 1).maximum(first)
    rows, positions = where if isinstance(where, tuple) else where.nonzero(as_tuple=True)
    return rows, (positions - 1).maximum(first[rows, 0])
