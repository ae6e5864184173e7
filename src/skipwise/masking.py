"""`with subject_masked(model, blocks, tokens):` image queries of some blocks do not see the subject's text tokens.

What paper 3 selects blocks by (DiT-BlockSkip, arXiv 2603.20755), for any model that attends through torch's scaled dot
product attention. No order of tokens is known here: a block is first run with the text changed, its attention answered
with zeros, so that the change reaches keys and queries on direct paths only. The keys that move when the subject's
tokens change are the subject's; queries that move when the whole text changes are the text's. So text before the image
(FLUX), behind it (SD3) and true cross attention (SANA, PixArt, Wan) need no table.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from skipwise.blocks import Contract, bind, find_contract, module_list
from skipwise.errors import UserError, unknown
from skipwise.wrapping import block_lists

TEXT = "encoder_hidden_states"  # diffusers' name for the text among a block's arguments
Queries = Literal["image", "all"]
Tokens = Sequence[int] | Sequence[Sequence[int]]  # positions in the text stream: of all rows, or of each row
Forward = Callable[..., Any]

_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_NO_KERNEL = ("No available kernel", "No viable backend")  # what torch says when the one it may use takes no mask
_BACKEND = (
    "masks need torch's own attention that takes a mask: with diffusers, call model.set_attention_backend('native') "
    "(or model.set_default_attn_processor()) first."
)


@dataclass(frozen=True)
class Hidden:
    """What one attention call of a block does not see: these queries, these keys.

    rows: (batch, queries), columns: (batch, keys), both bool.
    """

    rows: Tensor
    columns: Tensor

    @property
    def pairs(self) -> Tensor:
        """(batch, 1, queries, keys), bool: the head's place is for all heads."""
        return (self.rows[:, :, None] & self.columns[:, None])[:, None]


@dataclass(frozen=True)
class Place:
    """Where a block gets the text: tokens `start` to `start + length` - 1 of an argument (batch, tokens, width)."""

    argument: str
    start: int
    length: int


@contextmanager
def subject_masked(
    model: nn.Module,
    blocks: Mapping[str, Sequence[int]],
    tokens: Tokens,
    text: str = TEXT,
    queries: Queries = "image",
    example: Mapping[str, Any] | None = None,
) -> Iterator["Masking"]:
    """Inside the `with`, queries of these blocks do not see the subject's text tokens; the model is put back after.

    blocks: stack name -> block numbers. tokens: positions of the subject in the text stream, the same for all rows of a
    batch, or one list a row; none changes nothing. text: the blocks' parameter that takes the text. queries: "image"
    masks the image's queries; in joint attention (FLUX, SD3, Qwen) the other text tokens still see the subject and
    carry a little of it to the image in later blocks; "all" masks every query but the subject's own, so that nothing
    is left of it. Blocks that take one concatenation of text and image (FLUX.2, Chroma, AuraFlow) are masked where the
    stack before them takes the two apart. example: as in `skipwise.skip`.
    What was masked in the last forward is in `.hidden` of what this yields. A forward raises UserError for positions
    that are not in the text, for a block that takes no text, and for attention that cannot be masked.
    """
    if queries not in get_args(Queries):
        raise unknown("queries", queries, get_args(Queries))
    rows = _rows(tokens)
    _check_blocks(model, blocks)
    masking = Masking(model, rows, text, queries)
    if not any(rows):
        yield masking
        return
    with ExitStack() as hooks:
        masking.watch(find_contract(model, example), hooks)
        new = {
            block: masking.masked(f"{stack}.{number}", block)
            for stack, numbers in blocks.items()
            for number, block in enumerate(module_list(model, stack))
            if number in numbers
        }
        hooks.enter_context(forwards(new))
        yield masking


@contextmanager
def forwards(new: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Modules run these functions in the place of their forward; what they had is put back, also on an exception."""
    before: dict[nn.Module, Forward | None] = {module: module.__dict__.get("forward") for module in new}
    try:
        for module, function in new.items():
            module.__dict__["forward"] = function
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def _rows(tokens: Tokens) -> list[list[int]]:
    """One list for all rows, or a list for each."""
    if len(tokens) and isinstance(tokens[0], Sequence):
        return [[int(token) for token in row] for row in tokens]  # type: ignore[union-attr]
    return [[int(token) for token in tokens]]  # type: ignore[arg-type]


def _check_blocks(model: nn.Module, blocks: Mapping[str, Sequence[int]]) -> None:
    lists = block_lists(model)
    for stack, numbers in blocks.items():
        if stack not in lists:
            raise unknown("stack", stack, lists)
        outside = [number for number in numbers if not 0 <= number < len(lists[stack])]
        if outside:
            raise UserError(f"Block {outside[0]} is not in {stack}, which has blocks 0 to {len(lists[stack]) - 1}.")


@dataclass
class Masking:
    """What `subject_masked` is masking. hidden: block name (`transformer_blocks.3`) -> what each of its attention calls
    did not see in the last forward, None for a call that the subject does not reach.
    """

    model: nn.Module
    rows: list[list[int]]
    text: str
    queries: Queries
    hidden: dict[str, list[Hidden | None]] = field(default_factory=dict)
    joined: dict[str, Place] = field(default_factory=dict)  # stacks that take a concatenation
    given: dict[str, Any] = field(default_factory=dict)  # the model's arguments in this forward
    first: nn.Module = field(default_factory=nn.Identity)  # the model's first block

    def watch(self, contract: Contract, hooks: ExitStack) -> None:
        """Note, in every forward, what the model is given, and where the text is in stacks that take a concatenation of
        what the one before puts out.
        """

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.given.clear()
            self.given.update(bind(inspect.signature(type(module).forward), module, args, kwargs))

        hooks.callback(self.given.clear)
        hooks.callback(self.model.register_forward_pre_hook(note, with_kwargs=True).remove)
        self.first = module_list(self.model, next(iter(contract.stacks)))[0]
        for before, after in pairwise(contract.stacks.values()):
            place = next((stream.output for stream in before.streams if stream.argument == self.text), None)
            if place is not None:
                self._watch_border(module_list(self.model, before.name)[-1], place, after.name, hooks)

    def _watch_border(self, last: nn.Module, place: int, stack: str, hooks: ExitStack) -> None:
        words: list[Tensor] = []

        def note(module: nn.Module, args: tuple, result: Any) -> None:
            words[:] = [result[place]]

        def compare(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            arguments = bind(inspect.signature(type(module).forward), module, args, kwargs)
            if words and arguments.get(self.text) is None and (found := _find(words[0], arguments)):
                self.joined[stack] = found
            words.clear()  # they are held no longer than they are needed

        first = module_list(self.model, stack)[0]
        hooks.callback(last.register_forward_hook(note).remove)
        hooks.callback(first.register_forward_pre_hook(compare, with_kwargs=True).remove)

    def masked(self, name: str, block: nn.Module) -> Forward:
        """The block's forward with the subject masked."""
        forward, signature = block.forward, inspect.signature(type(block).forward)

        def run(*args: Any, **kwargs: Any) -> Any:
            found = self._find_hidden(name, block, forward, bind(signature, block, args, kwargs))
            self.hidden[name] = found
            calls = iter(found)
            with _Attention(lambda call: _attend(call, next(calls))):
                return forward(*args, **kwargs)

        return run

    def _find_hidden(
        self, name: str, block: nn.Module, forward: Forward, arguments: dict[str, Any]
    ) -> list[Hidden | None]:
        """What each attention call of the block must not see, by running it with the text changed."""
        what = f"{name} ({type(block).__name__})"
        place = self._place(name, what, arguments)
        subject = self._chosen(arguments[place.argument], place, self._added(what, place))
        plain, moved = _probe(forward, arguments), _probe(forward, _changed(arguments, place, subject))
        other = moved
        if self.queries == "image":
            other = _probe(forward, _changed(arguments, place, torch.ones_like(subject)))
        found = []
        for before, after, texts in zip(plain, moved, other, strict=True):
            columns = _differ(before.key, after.key, what)
            seen = bool(columns.any())
            if seen and not torch.equal(columns.sum(1), subject.sum(1)):
                raise UserError(
                    f"{what}: {columns.sum(1).tolist()} keys depend on {subject.sum(1).tolist()} tokens of the text; "
                    "this attention mixes tokens before it compares them and cannot be masked."
                )
            found.append(Hidden(~_differ(before.query, texts.query, what), columns) if seen else None)
        if not any(found):
            raise UserError(f"{what}: no attention that reads `{place.argument}` was caught; {_BACKEND}")
        return found

    def _place(self, name: str, what: str, arguments: Mapping[str, Any]) -> Place:
        own = arguments.get(self.text)
        if isinstance(own, Tensor):
            return Place(self.text, 0, own.shape[1])
        stack = name.rpartition(".")[0]
        if stack not in self.joined:
            taken = ", ".join(key for key, value in arguments.items() if isinstance(value, Tensor))
            raise UserError(
                f"{what} takes no `{self.text}`, and no stack before it shows where the text is in what it takes "
                f"({taken}); leave {stack} out, or name the parameter that takes the text with text=."
            )
        return self.joined[stack]

    def _added(self, what: str, place: Place) -> int:
        """How many tokens the model puts before the text it is given (AuraFlow's registers, Wan's picture)."""
        given = self.given.get(self.text)
        if not isinstance(given, Tensor) or given.ndim != 3 or given.shape[1] == place.length:
            return 0
        whole = Place(self.text, 0, given.shape[1])
        every = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
        before, after = (self._first_text(a) for a in (self.given, _changed(self.given, whole, every)))
        moved = (before != after).any(2).any(0).nonzero()[:, 0].tolist() if before is not None else []
        if not moved or moved != list(range(moved[0], moved[0] + whole.length)):
            raise UserError(
                f"{what} takes a text of {place.length} tokens, the model {whole.length}, and which is which does not "
                "show; this model cannot be masked."
            )
        return moved[0]

    def _first_text(self, arguments: Mapping[str, Any]) -> Any:
        """The text as the first block takes it, (batch, tokens, width); the model is not run further."""
        found: list[Any] = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            found.append(bind(inspect.signature(type(self.first).forward), self.first, args, kwargs).get(self.text))
            raise _EnoughError

        with torch.no_grad(), suppress(_EnoughError), forwards({self.first: stop}):
            self.model.forward(**arguments)
        return found[0]

    def _chosen(self, states: Tensor, place: Place, added: int) -> Tensor:
        """(batch, text length), bool: the subject's tokens."""
        rows = self.rows * len(states) if len(self.rows) == 1 else self.rows
        if len(rows) != len(states):
            raise UserError(f"There are tokens for {len(rows)} rows, but the batch has {len(states)}.")
        chosen = torch.zeros(len(states), place.length, dtype=torch.bool)
        for row, tokens in enumerate(rows):
            outside = [token for token in tokens if not 0 <= token < place.length - added]
            if outside:
                last = place.length - added - 1
                raise UserError(f"Token {outside[0]} is not in the text, which has tokens 0 to {last}.")
            chosen[row, [token + added for token in tokens]] = True
        return chosen.to(states.device)


def _find(words: Tensor, arguments: Mapping[str, Any]) -> Place | None:
    """Where these words (batch, length, width) are, at the beginning or at the end of one of the arguments."""
    length = words.shape[1]
    for name, whole in arguments.items():
        if isinstance(whole, Tensor) and whole.ndim == 3 and whole.shape[1] > length:
            for start in (0, whole.shape[1] - length):
                if torch.equal(whole[:, start : start + length], words):
                    return Place(name, start, length)
    return None


class _EnoughError(Exception):
    """Enough of the forward has run."""


@dataclass(frozen=True)
class _Call:
    query: Tensor
    key: Tensor


class _Attention(TorchFunctionMode):
    """Hands every scaled dot product attention to `answer`, with its arguments by name."""

    def __init__(self, answer: Callable[[dict[str, Any]], Tensor]):
        super().__init__()
        self.answer = answer

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run anything else as it is."""
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        return self.answer(dict(zip(_POSITIONAL, args, strict=False)) | (kwargs or {}))


def _probe(forward: Forward, arguments: Mapping[str, Any]) -> list[_Call]:
    """Queries and keys of a block's attention calls, all of which are answered with zeros."""
    calls: list[_Call] = []

    def note(call: dict[str, Any]) -> Tensor:
        query, key, value = (call[name] for name in ("query", "key", "value"))
        calls.append(_Call(query, key))
        return query.new_zeros(*query.shape[:-1], value.shape[-1])

    with torch.no_grad(), _Attention(note):
        forward(**arguments)
    return calls


def _changed(arguments: Mapping[str, Any], place: Place, tokens: Tensor) -> dict[str, Any]:
    """The arguments with other states in these tokens of the text; tokens: (batch, text length), bool."""
    states = arguments[place.argument]
    noise = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(0)).to(states)
    # as large as what it replaces, so that no rounding hides it; not constant, which a norm would take away
    noise = noise / noise.abs().max() * states.detach().abs().amax().clamp_min(1)
    changed, stop = states.clone(), place.start + place.length
    text = states[:, place.start : stop]
    # `- text`, so that a text that was changed so before (masks may be nested) changes again
    changed[:, place.start : stop] = (noise - text).where(tokens[:, :, None], text)
    return {**arguments, place.argument: changed}


def _differ(before: Tensor, after: Tensor, what: str) -> Tensor:
    """(batch, tokens), bool: where states (batch, heads, tokens, width) are not the same."""
    if before.ndim != 4 or before.shape != after.shape:
        raise UserError(f"{what}: its attention takes {tuple(before.shape)}, not (batch, heads, tokens, width).")
    return (before != after).any(3).any(1)


def _attend(call: dict[str, Any], hidden: Hidden | None) -> Tensor:
    if hidden is not None:
        call = call | {"attn_mask": _mask(call, hidden.pairs), "is_causal": False}
    try:
        return F.scaled_dot_product_attention(**call)
    except RuntimeError as error:
        if hidden is None or not any(said in str(error) for said in _NO_KERNEL):
            raise
        raise UserError(f"The attention backend in force takes no mask; {_BACKEND}") from error


def _mask(call: Mapping[str, Any], pairs: Tensor) -> Tensor:
    """What the call's own mask lets through and `pairs` does not hide."""
    own = call.get("attn_mask")
    if call.get("is_causal"):
        own = torch.ones_like(pairs[0, 0]).tril()
    if own is None:
        return ~pairs
    return own & ~pairs if own.dtype == torch.bool else torch.where(pairs, -torch.inf, own)
