"""Estimated memory of fine-tunings as tables: for the terminal, and in Markdown."""

from collections.abc import Mapping

from rich import box
from rich.table import Table

from skipwise.finetuning.memory.estimate import MemoryEstimate
from skipwise.finetuning.memory.fitting import describe_blocks
from skipwise.finetuning.peak import PARTS, Bytes
from skipwise.sizes import GIB

STAGES = {"training": "a training step", "making": "making of residuals", "encoding": "encoding of pictures"}


def memory_table(estimate: MemoryEstimate) -> Table:
    """One row a part and one column a stage; stages follow each other, so the peak is the highest of their totals."""
    settings = estimate.settings
    title = (
        f"{estimate.model}: LoRA of rank {settings.rank} on {estimate.trained} blocks "
        f"({describe_blocks(estimate.train)}), {settings.pixels} px, batch {settings.batch}; estimated peak, GiB"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column("part")
    stages: dict[str, Bytes] = {name: getattr(estimate, name) for name in STAGES}
    for name, words in STAGES.items():
        if stages[name].total:
            table.add_column(words, justify="right")
    shown = [amount for amount in stages.values() if amount.total]
    for number, part in enumerate(PARTS):
        table.add_row(part, *(_gib(amount.by_part[number]) for amount in shown))
    table.add_section()
    table.add_row("all", *(_gib(amount.total) for amount in shown))
    return table


def memory_notes(estimate: MemoryEstimate) -> list[str]:
    """What stands below the table."""
    notes = []
    if estimate.record:
        notes.append(f"stored residuals: {estimate.record / 2**20:.2f} MiB a draw, on disk or in host memory")
    if estimate.text_encoders:
        sizes = ", ".join(f"{name} {_gib(size)}" for name, size in estimate.text_encoders.items())
        notes.append(f"text encoders run once, on the host, before the training: {sizes} GiB")
    return notes


def markdown(rows: Mapping[str, MemoryEstimate], baseline: str, second: str) -> str:
    """A row an estimate; reductions against two of the rows, in per cent of the training's peak."""
    lines = [
        "| variant | blocks | px | training | weights | LoRA + optimiser | gradients + activations | making "
        f"| against {baseline} | against {second} |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        parts = row.training.as_dict()
        state, work = parts["lora"] + parts["optimiser"], parts["gradients"] + parts["activations"]
        against = [1 - row.training.total / rows[other].training.total for other in (baseline, second)]
        lines.append(
            f"| {name} | {row.trained} | {row.settings.pixels} | {_gib(row.training.total)} | {_gib(parts['weights'])} "
            f"| {_gib(state)} | {_gib(work)} | {_gib(row.making.total)} "
            f"| {' | '.join(f'{100 * saved:+.1f}%'.replace('+', '-') if saved > 0 else '-' for saved in against)} |"
        )
    return "\n".join(lines) + "\n"


def _gib(amount: int) -> str:
    return f"{amount / GIB:.2f}"
