"""What a language model takes: token ids. A vision-language model is given the text alone, where it runs on that.

Whether it does, and what it needs besides (`beside.py`), is found by trying: the first call that runs.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from skipwise.errors import UserError
from skipwise.examples.beside import OTHERS, PICTURES, STATES, Call, Maker, parts_of
from skipwise.examples.shapes import shapes_only
from skipwise.examples.signature import dtype_of, no_example, parameters_of
from skipwise.examples.size import TINY, Size
from skipwise.examples.tensors import Tensors
from skipwise.twins import twin
from skipwise.wrapping import block_lists, class_of

FEW = 8  # words, where a config does not say how many there are
TEXTS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Way:
    """How a language model of one class is called.

    beside: what it is given besides text; pictures: see `Call`; codebooks: rows for each text, one a codebook.
    """

    beside: tuple[str, ...] = ()
    pictures: tuple[int, ...] = ()
    codebooks: int = 1


TEXT_ALONE = Way()
_MAKERS: dict[str, Maker] = OTHERS | PICTURES | STATES
_known: dict[tuple[type, str], tuple[Way, Way]] = {}  # by class and config: the least that runs, that runs all blocks


def language_inputs(model: nn.Module, size: Size, new: Tensors, whole: bool = False) -> dict[str, Any]:
    """Keyword arguments for one forward of a model that takes token ids: the least that runs.

    whole: that runs all blocks of each list that it runs. Raises NoExampleError for what needs more than is known.
    """
    kwargs = _arguments(model, _way_of(model, whole), size, new)
    lacking = [name for name, p in parameters_of(model).items() if p.default is p.empty and name not in kwargs]
    if lacking:
        raise no_example(model, f"its forward cannot do without {', '.join(lacking)}")
    return kwargs


def check_text_alone(model: nn.Module, done: str, whole: bool = False) -> None:
    """Raise UserError for a language model that does not run on text alone; `done` is what cannot be done with it.

    whole: or one some of whose blocks do not.
    """
    way = _way_of(model, whole)
    needed = "a row for each of its codebooks" if way.codebooks > 1 else ", ".join(way.beside)
    if needed:
        raise UserError(
            f"{type(model).__name__} cannot be {done} text alone: its forward needs {needed}. Run it yourself, with "
            "all that it takes, in `with sw.skip(model, plan)`."
        )


def _way_of(model: nn.Module, whole: bool) -> Way:
    if not any(True for _ in _others(model)):
        return TEXT_ALONE
    key = class_of(model), repr(getattr(getattr(model, "config", None), "to_dict", dict)())
    if key not in _known:
        _known[key] = _find_ways(twin(model))
    return _known[key][whole]


def _find_ways(model: nn.Module) -> tuple[Way, Way]:
    """(The first way that runs, the first that runs all blocks); text alone when none does."""
    least = None
    for way in (TEXT_ALONE, *_others(model)):
        left_out = _left_out(model, way)
        least = way if least is None and left_out is not None else least
        if left_out is False:
            return least or way, way
    return least or TEXT_ALONE, least or TEXT_ALONE


def _others(model: nn.Module) -> Iterator[Way]:
    """Ways besides text alone that the forward's names allow, in the order in which they are tried."""
    accepted, config = parameters_of(model), getattr(model, "config", None)
    if accepted.keys().isdisjoint(TEXTS):  # a model of images
        return
    codebooks = getattr(config, "num_codebooks", None)
    if type(codebooks) is int and codebooks > 1:
        yield Way(codebooks=codebooks)
    foreign = accepted.keys() - ({"attention_mask"} if "input_ids" in accepted else set())  # a mask of the text
    few, many, states = (
        tuple(name for name in makers if name in foreign) for makers in (OTHERS, OTHERS | PICTURES, STATES)
    )
    tiles = next((n for part in parts_of(config) if (n := getattr(part, "max_num_tiles", None))), 1)
    if few:
        yield Way(few)
    if many:
        yield from (Way(many, pictures) for pictures in ((), (1,), (1, tiles)))
    if states:
        yield Way(states)


def _left_out(model: nn.Module, way: Way) -> bool | None:
    """Whether a call leaves out some of the blocks of a list; None when it does not run."""
    new = Tensors(TINY.batch, next(model.parameters()).device, dtype_of(model))
    ran: set[nn.Module] = set()
    lists = block_lists(model).values()
    with ExitStack() as hooks, shapes_only() if new.device.type == "meta" else torch.no_grad():
        for block in (block for blocks in lists for block in blocks):
            hooks.callback(block.register_forward_pre_hook(lambda module, _: ran.add(module)).remove)
        try:
            model(**_arguments(model, way, TINY, new))
        except Exception:  # models complain each in its own way
            return None
    return any(0 < len(ran & set(blocks)) < len(blocks) for blocks in lists)


def _arguments(model: nn.Module, way: Way, size: Size, new: Tensors) -> dict[str, Any]:
    """A prompt, and for an encoder-decoder, of another length, the canvas; and what is beside."""
    accepted, config = parameters_of(model), getattr(model, "config", None)
    call = Call(config, size, new, way.pictures)
    text_config = getattr(config, "get_text_config", lambda: config)()
    words = getattr(text_config, "vocab_size", None) or call.setting("vocab_size") or FEW
    rows = Tensors(new.batch * way.codebooks, new.device, new.dtype)
    texts = [name for name in TEXTS if name in accepted]
    if getattr(config, "use_decoder_only_language_model", False):  # the other text is of those with an encoder
        texts = texts[:1]
    lengths = (size.text, size.tokens) if len(texts) > 1 else (size.tokens,)
    kwargs: dict[str, Any] = {name: rows.tokens(length, words) for name, length in zip(texts, lengths, strict=True)}
    kwargs |= {name: value for name in way.beside if (value := _MAKERS[name](call)) is not None}
    if way.beside and call.places:
        kwargs["input_ids"] = torch.cat([_places_of_pictures(call), kwargs["input_ids"]], dim=1)
    kwargs |= {"use_cache": False} if "use_cache" in accepted else {}
    return on_meta(model, kwargs) if new.device.type == "meta" else kwargs


def _places_of_pictures(call: Call) -> Tensor:
    token = call.setting("image_token_id", "image_token_index", "video_token_id", "video_token_index") or 0
    return call.new.full(token, call.places, dtype=torch.long)


def on_meta(model: nn.Module, example: Mapping[str, Any]) -> dict[str, Any]:
    """A real example for the model on the meta device: states on meta, what a forward may read is kept."""
    moved = tree_map_only(
        Tensor,
        lambda tensor: tensor.to("meta") if tensor.is_floating_point() and tensor.ndim > 2 else tensor,
        dict(example),
    )
    ids = moved.get("input_ids")
    if ids is not None and "position_ids" in inspect.signature(class_of(model).forward).parameters:
        # transformers reads the positions, to see whether sequences are packed
        moved.setdefault("position_ids", torch.arange(ids.shape[1])[None])
    return moved
