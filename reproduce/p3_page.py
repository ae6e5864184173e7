"""docs/results/p3.md from the Results in a folder; it computes no score of its own.

python reproduce/p3_page.py docs/results/p3 --page docs/results/p3.md
"""

from collections.abc import Sequence
from statistics import fmean

from p3_claims import beyond, claims
from p3_results import BEFORE, LORA, Found, Way, gain, read
from pages import filled, shown, table, write_page


def ways(found: Found, group: str) -> str:
    """Scores and costs of a group's ways, below those of ordinary LoRA."""
    head = ["way", "blocks trained", "subject similarity", "above LoRA's, in pairs", "prompt fidelity"]
    rows = [_row(found, way) for way in _with_lora(found, found.groups[group])]
    return table([*head, "step's peak, MiB", "seconds a step"], rows)


def _with_lora(found: Found, ways: Sequence[Way]) -> list[Way]:
    base = found.way(LORA)
    return [base, *(way for way in ways if way.name not in (BEFORE, LORA))]


def _row(found: Found, way: Way) -> list[str]:
    base = found.way(LORA)
    more = "-" if way.name == LORA else shown(gain(way, base))
    memory = f"{way.peak / 2**20:.1f}" + ("" if way.name == LORA else f" ({100 * (way.peak / base.peak - 1):+.0f}%)")
    return [way.name, way.trained, shown(way.similarity), more, shown(way.fidelity), memory, f"{way.seconds:.3f}"]


def crops(found: Found) -> str:
    """Errors of latents that are cropped, by noise level."""
    rows = []
    for level in sorted({row["t"] for row in found.crops["rows"]}):
        same = [row for row in found.crops["rows"] if row["t"] == level]
        means = (fmean(row[key] for row in same) for key in ("side", "error", "half_pixel"))
        rows.append([f"{level:.2f}", *(f"{mean:.2f}" for mean in means)])
    return table(["t", "crop's side, px", "error of latent crops", "error by half a latent pixel"], rows)


def facts(found: Found) -> str:
    """What all trainings have in common."""
    training = found.training
    return (
        f"{found.runs} runs of every way ({found.models} tiny-dit x {found.runs // found.models} seeds), each "
        f"{training['steps']} steps of batch 4 at learning rate {training['learning_rate']:g}, {training['draws']} "
        f"draws a picture; the model as it was has a similarity of {shown(found.way(BEFORE).similarity)}, the "
        f"subject's own pictures {found.itself:.3f} with each other"
    )


def page(found: Found) -> str:
    """The whole page."""
    parts = {group: ways(found, group) for group in found.groups}
    lists = {"claims": claims(found), "beyond": beyond(found)}
    parts |= {name: table(["claim", "here", "evidence"], rows) for name, rows in lists.items()}
    times = found.crops["times"]
    parts |= {"memory": found.tables, "crops": crops(found), "facts": facts(found), "ratio": f"{times['ratio']:.0f}"}
    return filled("p3.md.in", parts)


if __name__ == "__main__":
    write_page(__doc__, lambda folder: page(read(folder)))
