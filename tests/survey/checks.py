"""What is asked of every class: does `skip` remove, does the export equal it, does it generate, can it be analysed."""

import random
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import skipwise as sw
from skipwise.blocks import Contract, find_contract
from skipwise.errors import UserError
from skipwise.examples import Size, example_inputs
from skipwise.exporting import export
from skipwise.models import kind_of
from skipwise.plan import Plan
from skipwise.skipping import skip
from tests.survey.classes import NotTinyError, build
from tests.survey.oracle import bypassed, output, removed

RIGHT, NOT_ASKED = "right", "n/a"
REFUSED, WRONG = "refused: ", "WRONG: "


@dataclass
class Found:
    """One class: "right", "n/a", "refused: reason" or "WRONG: what happens" for each thing that was asked."""

    skip: str = NOT_ASKED
    export: str = NOT_ASKED
    generate: str = NOT_ASKED
    analyse: str = NOT_ASKED
    kind: str = NOT_ASKED
    stacks: str = ""


def tried(name: str) -> dict[str, str]:
    """Everything about one class; {"untried": reason} for one that cannot be built tiny."""
    try:
        return survey(build(name))
    except NotTinyError as error:
        return {"untried": str(error)}


def survey(model: nn.Module) -> dict[str, str]:
    """Everything about one model."""
    found = Found(kind=str(kind_of(model)))
    inputs: dict[str, Any] = {}
    contract: list[Contract] = []

    def contracted() -> str:
        inputs.update(example_inputs(model, Size(batch=2), whole=True))
        contract.append(find_contract(model))
        return RIGHT

    found.skip = _asked(contracted)
    if contract:
        (known,) = contract
        found.stacks = ", ".join(f"{name}: {stack.length}" for name, stack in known.stacks.items())
        found.skip = _asked(lambda: check_skip(model, known, inputs))
        found.export = _asked(lambda: check_export(model, known, inputs))
        if found.kind in ("autoregressive", "masked diffusion", "block diffusion"):
            found.generate = _asked_of_text(model, inputs, lambda: check_generate(model, known))
        if found.kind != "image or video diffusion":
            found.analyse = _asked_of_text(model, inputs, lambda: check_analysis(model))
    return asdict(found)


def _asked(check: Callable[[], str]) -> str:
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return check()
    except UserError as error:
        text = str(error)
        return (REFUSED if "\n" not in text else WRONG + "a refusal of several lines: ") + " ".join(text.split())
    except Exception as error:
        return f"{WRONG}{type(error).__name__}: {' '.join(str(error).split())[:300]}"


TEXT = ("input_ids", "decoder_input_ids", "use_cache")


def _asked_of_text(model: nn.Module, inputs: dict[str, Any], check: Callable[[], str]) -> str:
    """Not asked of a class that itself does not run on rows of text and nothing else; such must be refused."""
    verdict = _asked(check)
    text = {name: value[:2] if torch.is_tensor(value) else value for name, value in inputs.items() if name in TEXT}
    try:
        output(model, text)
    except Exception:
        return NOT_ASKED if verdict.startswith(REFUSED) else f"{WRONG}runs on text alone, which the class does not"
    return verdict


def skip_sets(length: int) -> list[set[int]]:
    """The first block, one inside, the last, and two that are apart."""
    return [set(numbers) for numbers in dict.fromkeys([(0,), (1,), (length - 1,), (0, length - 2)])]


def static(contract: Contract, stack: str, numbers: set[int]) -> Plan:
    return Plan.static(contract.shape, {stack: sorted(numbers)})


def check_skip(model: nn.Module, contract: Contract, inputs: dict[str, Any]) -> str:
    """`skip` against blocks that are deleted, and against blocks that hand on what they were given."""
    whole = output(model, inputs)
    if not whole.isfinite().all():
        raise AssertionError("the tiny model itself gives numbers that are not finite")
    if not torch.equal(whole, output(model, inputs)):
        raise AssertionError("the tiny model itself gives another output at every call")
    effects, reasons = 0, []
    for stack in contract.stacks:
        for numbers in skip_sets(contract.stacks[stack].length):
            verdict = _compare(model, contract, inputs, stack, numbers)
            if verdict.startswith(REFUSED):
                reasons.append(verdict)
            elif verdict.startswith(WRONG):
                return verdict
            else:
                effects += verdict != "no effect"
    if not torch.equal(whole, output(model, inputs)):
        return f"{WRONG}the model is another one after the plan"
    if not effects:
        return reasons[0] if reasons else f"{WRONG}no skipped block changes anything, so that nothing is tested"
    return RIGHT


def _compare(model: nn.Module, contract: Contract, inputs: dict[str, Any], stack: str, numbers: set[int]) -> str:
    whole = output(model, inputs)
    try:
        with skip(model, static(contract, stack, numbers)):
            under = output(model, inputs)
    except UserError as error:
        return REFUSED + " ".join(str(error).split())
    oracles = {}
    for name, make in (("removed", _of_removed), ("bypassed", _of_bypassed)):
        try:
            oracles[name] = make(model, stack, numbers, inputs, *contract.stacks[stack].coupled)
        except Exception as error:
            oracles[name] = f"{type(error).__name__}: {error}"
    equal = {name: isinstance(value, torch.Tensor) and torch.equal(value, under) for name, value in oracles.items()}
    if not any(equal.values()):
        return f"{WRONG}{stack} without {sorted(numbers)}: {_apart(under, oracles)}"
    differs = [name for name, same in equal.items() if not same and isinstance(oracles[name], torch.Tensor)]
    if differs and not contract.stacks[stack].in_place:
        return f"{WRONG}{stack} without {sorted(numbers)} differs from blocks {differs[0]}: {_apart(under, oracles)}"
    return "no effect" if torch.equal(under, whole) else RIGHT


def _of_removed(model: nn.Module, stack: str, numbers: set[int], inputs: dict[str, Any], *coupled: str) -> torch.Tensor:
    return output(removed(model, stack, numbers, *coupled), inputs)


def _of_bypassed(
    model: nn.Module, stack: str, numbers: set[int], inputs: dict[str, Any], *coupled: str
) -> torch.Tensor:
    with bypassed(model, stack, numbers, *coupled):
        return output(model, inputs)


def _apart(under: torch.Tensor, oracles: dict[str, Any]) -> str:
    said = []
    for name, value in oracles.items():
        if isinstance(value, torch.Tensor) and value.shape == under.shape:
            value = f"{float((value - under).norm() / value.norm()):.2e}"
        said.append(f"{name} {value}")
    return "; ".join(said)


def check_export(model: nn.Module, contract: Contract, inputs: dict[str, Any]) -> str:
    """An export, opened by its class's own from_pretrained, against `skip` of the source, opened so too."""
    stack = contract.main_stack
    length, reasons, rights = contract.stacks[stack].length, [], 0
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        model.save_pretrained(source)
        opened = type(model).from_pretrained(source).eval()  # tables that no checkpoint holds are then their class's
        plans = [static(contract, stack, numbers) for numbers in skip_sets(length)[1:]]
        plans.append(Plan.static(contract.shape, {name: [1] for name in contract.stacks}))
        for number, plan in enumerate(plans):
            target = Path(folder) / str(number)
            try:
                export(plan, source, target)
            except UserError as error:
                if target.exists():
                    return f"{WRONG}a refused export left a folder behind"
                reasons.append(REFUSED + " ".join(str(error).replace(str(folder), "").split()))
                continue
            reopened = type(model).from_pretrained(target).eval()
            with skip(opened, plan):
                under = output(opened, inputs)
            if not torch.equal(output(reopened, inputs), under):
                return f"{WRONG}the export without {plan.phases[0].skip} is not what `skip` gives"
            rights += 1
    return RIGHT if rights else reasons[0]


NEW = 6  # tokens
FAR = 1e-3  # how far apart logits are, relative to their size, when it is no matter of rounding


def check_generate(model: nn.Module, contract: Contract) -> str:
    """`sw.generate` under a plan, with its cache, against the model with blocks deleted, without one."""
    stack = contract.main_stack
    length = contract.stacks[stack].length
    ids = torch.randint(4, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    if kind_of(model) == "masked diffusion":

        def sequences(one: nn.Module, plan: Plan | None = None) -> torch.Tensor:
            return sw.generate(one, ids, plan=plan, gen_length=8, steps=4).sequences
    else:

        def sequences(one: nn.Module, plan: Plan | None = None) -> torch.Tensor:
            return sw.generate(one, ids, plan=plan, gen_length=NEW, stop_at_eos=False).sequences

    for numbers in ({0}, {1}, {0, length - 2}):
        plan = static(contract, stack, numbers)
        under = sequences(model, plan)
        if kind_of(model) == "masked diffusion":
            right = _same(under, sequences(removed(model, stack, numbers)))
        elif contract.stacks[stack].in_place:  # with blocks deleted it is another model
            with bypassed(model, stack, numbers):
                right = _same(under, greedy(model, ids))
        else:
            right = _as_deleted(model, removed(model, stack, numbers), ids, under)
        if not right:
            return f"{WRONG}{stack} without {sorted(numbers)}: other tokens than without blocks and cache"
    return RIGHT


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _as_deleted(model: nn.Module, short: nn.Module, ids: torch.Tensor, under: torch.Tensor) -> bool:
    """Whether these are the deleted model's tokens; with its cache, if the class, whole, writes otherwise with one."""
    if _same(under, greedy(short, ids)):
        return True
    return _writes_otherwise(model) and _same(under, greedy(short, ids, True))


def _writes_otherwise(model: nn.Module) -> bool:
    """Whether this class, whole, has other logits with its cache than without, by far more than rounding."""
    ids = torch.randint(4, 60, (64, 7), generator=torch.Generator().manual_seed(2))
    cached, plain = (decoded(model, ids, use_cache).logits for use_cache in (True, False))
    return any(float((one - other).norm() / other.norm()) > FAR for one, other in zip(cached, plain, strict=True))


def greedy(model: nn.Module, ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
    """The tokens that transformers decodes, by default without a KV cache."""
    sequences: torch.Tensor = decoded(model, ids, use_cache).sequences
    return sequences


def decoded(model: Any, ids: torch.Tensor, use_cache: bool) -> Any:
    """Greedy decoding by transformers, with the logits of each step."""
    pad = model.generation_config.pad_token_id
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=0 if pad is None else pad,
            output_logits=True,
            return_dict_in_generate=True,
        )


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [4 + ord(letter) % 56 for letter in text]}


def check_analysis(model: nn.Module) -> str:
    """An analysis runs, and all that it measures is finite."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=16)) for _ in range(4)]
    analysis = sw.analyze(model, Letters(), texts, max_steps=2)
    bad = [name for name, tensor in analysis.tensors.items() if not tensor.isfinite().all()]
    return f"{WRONG}{bad[0]} is not finite" if bad else RIGHT
