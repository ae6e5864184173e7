"""Llama's and Qwen2's decoders for decoding: their forward in fewer operations, its last block only where it is needed.

transformers writes a norm as six operations and a rotation as five, each a call of a kernel and a pass over memory; at
the size of a denoising step of a small model these are a third of the time. Here the same numbers, to the rounding of
float32, take fewer. In half precision, where one rounding more or less can decide on a token, what rounds is
transformers' own. Behind its keys and values, the last block runs the positions whose states are wanted and no others.

What is not plainly transformers' own (a hook, an adapter, a quantised or replaced part) is called as it is; a hook
that only looks on (`Onlooker`) sees every layer's stream without that.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from skipwise.models.hooks import Onlooker, watched
from skipwise.models.linear import product
from skipwise.models.workspace import Workspace

Rotary = tuple[Tensor, Tensor]  # cosine and sine, (1 or rows, length, head width) each
Places = tuple[Tensor, Tensor]  # rows (n,) and positions (n,)

TRUNKS = (llama.LlamaModel, qwen2.Qwen2Model)
LAYERS = (llama.LlamaDecoderLayer, qwen2.Qwen2DecoderLayer)
NORMS = (llama.LlamaRMSNorm, qwen2.Qwen2RMSNorm)
ATTENTIONS = (llama.LlamaAttention, qwen2.Qwen2Attention)
MLPS = (llama.LlamaMLP, qwen2.Qwen2MLP)
ROTARIES = (llama.LlamaRotaryEmbedding, qwen2.Qwen2RotaryEmbedding)
WIDE = (torch.float32, torch.float64)
SPREAD = 2**16  # numbers of a rotary table that fits into a core's cache beside what it turns


class Shared(NamedTuple):
    """What all layers of a forward share. numbers: of the positions; table and rotary: what turns heads there, as
    transformers' layers take it and as `signed` gives it; mask: of the keys; past: what is stored.
    """

    numbers: Tensor
    table: Rotary
    rotary: Rotary
    mask: Tensor | None
    past: Cache | None


class Parts(NamedTuple):
    """A layer, taken apart: a look into its modules at every use would take as long as a kernel does."""

    first_norm: Any
    second_norm: Any
    attention: Any
    activation: Any
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear


def is_lean(trunk: Any, mask: Tensor | None) -> bool:
    """Whether `run` does what a call of this decoder does, now and with this mask."""
    config = trunk.config if type(trunk) in TRUNKS and not watched(trunk) else None
    if config is None or config._attn_implementation != "sdpa" or _slides(config):
        return False
    device = trunk.norm.weight.device.type
    plainly = not (torch.is_grad_enabled() or trunk.training or torch.is_autocast_enabled(device))
    return plainly and (mask is None or mask.shape[1:-1] == (1, 1))


def run(
    trunk: Any,
    input_ids: Tensor,
    mask: Tensor | None = None,
    past: Cache | None = None,
    where: Places | None = None,
    numbers: Tensor | None = None,
    space: Workspace | None = None,
) -> Tensor:
    """The decoder's last states (rows, length, width); at `where` alone, (n, width).

    mask: of the keys, bool (rows, 1, 1, keys); None where nothing is padding. past: as the decoder takes it; numbers:
    its position_ids (1 or rows, length), which go on from the past when left out. A decoder that looks back alone takes
    no mask, no past and no `where`. space: of a decoder that nobody changes between the forwards that share it.
    """
    space = Workspace() if space is None else space
    parts = space.kept.get("parts") or [_parts(layer) for layer in trunk.layers]
    if None not in parts:  # what is called may do anything
        space.kept["parts"] = parts
    x = trunk.embed_tokens(input_ids)
    shared = Shared(*_positions(trunk, x, numbers, past, space), mask, past)
    with quickly(None not in parts and not any(layer._forward_hooks for layer in trunk.layers)):
        x = _through(list(zip(trunk.layers, parts, strict=True)), x, shared, where)
    space.narrowed = where is not None and x.ndim == 2
    if where is not None and not space.narrowed:
        x = x[where]
    return _norm(trunk.norm, x) if _is(trunk.norm, NORMS) else trunk.norm(x)


def _positions(
    trunk: Any, x: Tensor, numbers: Tensor | None, past: Cache | None, space: Workspace
) -> tuple[Tensor, Rotary, Rotary]:
    """As `_turning`, of `numbers` or else of the positions that follow the past, which are kept."""
    if numbers is not None:
        return _turning(trunk, x, numbers)
    begin = 0 if past is None else past.get_seq_length()
    if not _is(trunk.rotary_emb, ROTARIES) or trunk.rotary_emb.rope_type != "default":
        return _turning(trunk, x, following(x, begin))  # others may depend on what they have seen
    return space.keep((begin, x.shape[1]), lambda: _turning(trunk, x, following(x, begin)))


def following(x: Tensor, begin: int) -> Tensor:
    """(1, length): the numbers from `begin` on of x (rows, length, width)."""
    return torch.arange(begin, begin + x.shape[1], device=x.device)[None]


def _turning(trunk: Any, x: Tensor, numbers: Tensor) -> tuple[Tensor, Rotary, Rotary]:
    """Positions, and what turns heads there: as transformers' layers take it and as `signed` gives it."""
    table = trunk.rotary_emb(x, numbers)
    return numbers, table, signed(table, trunk.config.num_attention_heads)


def _slides(config: Any) -> bool:
    """Whether some layers look no further than a window."""
    return "sliding_attention" in (getattr(config, "layer_types", None) or ())


def quickly(alone: bool) -> Any:
    """Inference mode, where nobody can take hold of a tensor inside, to find it of no use in training later on.

    It makes every operation some tenths of a microsecond cheaper than `no_grad` does.
    """
    return torch.inference_mode() if alone and not torch.compiler.is_compiling() else nullcontext()


def _through(layers: list[tuple[Any, "Parts | None"]], x: Tensor, shared: "Shared", where: Places | None) -> Tensor:
    """The stream behind the last of the layers."""
    named = {"attention_mask": shared.mask, "position_ids": shared.numbers, "past_key_values": shared.past}
    for i, (layer, parts) in enumerate(layers):
        if parts is not None:
            narrow = i == len(layers) - 1 and not layer._forward_hooks
            before, x = x, _block(parts, x, shared, where if narrow else None)
            for look in layer._forward_hooks.values():
                look(layer, (before,), {}, x)
        else:
            x = layer(x, position_embeddings=shared.table, use_cache=False, **named)
    return x


def spared(trunk: Any, rows: int, keys: int) -> int:
    """FLOPs that the last block is spared for every unwanted position of `rows`, each of which would see `keys`."""
    attention, mlp = trunk.layers[-1].self_attn, trunk.layers[-1].mlp
    parts = [attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if rows == 1:
        parts.append(attention.q_proj)
    scores = 4 * keys * attention.o_proj.in_features if rows == 1 else 0
    return scores + 2 * sum(part.weight.numel() for part in parts)


def _is(module: Any, kinds: tuple[type, ...]) -> bool:
    return type(module) in kinds and not watched(module)


def _looked_on(layer: Any) -> bool:
    """Whether all that is on the layer are onlookers."""
    own = layer._forward_pre_hooks or "forward" in layer.__dict__
    return not own and all(type(hook) is Onlooker for hook in layer._forward_hooks.values())


def _parts(layer: Any) -> Parts | None:
    """The parts of a layer that is what transformers built, through and through; None of any other."""
    if type(layer) not in LAYERS or (watched(layer) and not _looked_on(layer)):
        return None
    of = layer._modules
    attention, mlp, norms = of["self_attn"], of["mlp"], (of["input_layernorm"], of["post_attention_layernorm"])
    if not (_is(attention, ATTENTIONS) and _is(mlp, MLPS) and _is(norms[0], NORMS) and _is(norms[1], NORMS)):
        return None
    heads, mixing = attention._modules, mlp._modules
    linears: list[Any] = [heads[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    linears += [mixing[name] for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(_is(module, (nn.Linear,)) for module in linears):
        return None
    return Parts(*norms, attention, mixing["act_fn"], *linears)


def _block(parts: Parts, x: Tensor, shared: Shared, where: Places | None) -> Tensor:
    """What the layer makes of its stream (rows, length, width); at `where` alone, (n, width)."""
    attended = _attend(parts, _norm(parts.first_norm, x), shared, where)
    x = attended.add_(x if where is None else x[where])
    normed = _norm(parts.second_norm, x)
    hidden = parts.activation(_linear(parts.gate, normed)).mul_(_linear(parts.up, normed))
    return _linear(parts.down, hidden).add_(x)


def _attend(parts: Parts, x: Tensor, shared: Shared, where: Places | None) -> Tensor:
    attention, width, asking, turns = parts.attention, parts.attention.head_dim, x, shared.rotary
    alone = len(x) == 1  # rows of a batch may ask for unequally many positions
    if where is not None and alone:
        asking, turns = x[:, where[1]], (turns[0][:, where[1]], turns[1][:, where[1]])
    query = _rotated(_linear(parts.query, asking).unflatten(-1, (-1, width)), turns)
    key = _rotated(_linear(parts.key, x).unflatten(-1, (-1, width)), shared.rotary)
    value = _linear(parts.value, x).unflatten(-1, (-1, width)).transpose(1, 2)
    if shared.past is not None:
        key, value = shared.past.update(key, value, attention.layer_idx)
    mixed, _ = sdpa_attention_forward(attention, query, key, value, shared.mask, scaling=attention.scaling)
    mixed = mixed.flatten(2)
    if where is not None:
        mixed = mixed[0] if alone else mixed[where]
    return _linear(parts.out, mixed)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    held: Any = module._parameters
    return product(x, held["weight"], held["bias"])


def _norm(module: Any, x: Tensor) -> Tensor:
    if x.dtype in WIDE:
        return F.rms_norm(x, x.shape[-1:], module._parameters["weight"], module.variance_epsilon)
    return module(x)


def _rotated(x: Tensor, rotary: Rotary) -> Tensor:
    """x (rows, length, heads, head width) turned by its positions, as attention takes it: (rows, heads, length, ...)"""
    heads = x.shape[2]
    cosine, sine = (table[:, :, :heads] for table in rotary)
    other = x.roll(x.shape[-1] // 2, -1)
    turned = torch.addcmul(x * cosine, other, sine) if x.dtype in WIDE else x * cosine + other * sine
    return turned.transpose(1, 2)


def signed(table: Rotary, heads: int = 1) -> Rotary:
    """The table (..., length, 1 or heads, head width) for halves that are swapped, where transformers negates one."""
    cosine, sine = (values[..., None, :] for values in table)
    half = sine.shape[-1] // 2
    return spread(cosine, heads), spread(torch.cat([-sine[..., :half], sine[..., half:]], -1), heads)


def spread(table: Tensor, heads: int) -> Tensor:
    """A small table (..., 1, head width) written out for every head, (..., heads, head width).

    A product with it then takes half the time that one takes which repeats it as it goes.
    """
    return table.repeat_interleave(heads, -2) if table.numel() * heads <= SPREAD else table
