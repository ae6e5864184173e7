"""docs/models.md, made of docs/results/models.json."""

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

ASKED = ("skip", "export", "generate", "analyse")
RIGHT, NOT_ASKED = "right", "n/a"
LONGEST = 150  # letters of a reason in the table; the JSON has all

INTRODUCTION = """# Models

Every class of the installed {versions} that is a language model, a text encoder or a diffusion
transformer, built tiny with random weights and tried. `make models` makes this page anew;
[results/models.json](results/models.json) has every reason in full.

| group | classes tried | all right | some refused | wrong | could not be built tiny |
| --- | --- | --- | --- | --- | --- |
{summary}

- **skip**: blocks skipped with `skip` against the same blocks deleted by hand from their list, and against blocks that
  hand on what they are given: bit for bit, for every list of blocks (the first, one inside, the last, two apart).
- **export**: the exported checkpoint, opened by its class's own `from_pretrained`, against `skip`: bit for bit, for
  every such plan that is not refused.
- **generate**: `sw.generate` under a plan, with its cache, against the model with blocks deleted, without one (of a
  diffusion model, the same sampler): the same tokens; a class that itself writes otherwise with its cache, as it does.
- **analyse**: `sw.analyze` runs, and all that it measures is finite.

`n/a` is not asked of that kind of model, nor of one that does not run on text alone. A refusal is one line
with its reason; nothing is changed or written then.
"""


def versions() -> dict[str, str]:
    """Of the libraries whose classes are tried."""
    return {name: version(name).partition("+")[0] for name in ("torch", "transformers", "diffusers")}


def page(results: Mapping[str, Any]) -> str:
    """The page that these results make."""
    said = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    summary = "\n".join(_summary(name, rows) for name, rows in results["classes"].items())
    text = INTRODUCTION.format(versions=said, summary=summary)
    head = f"| class | kind | {' | '.join(ASKED)} |\n|{' --- |' * (2 + len(ASKED))}\n"
    for group, rows in results["classes"].items():
        text += f"\n## {group[0].upper()}{group[1:]}\n\n{head}"
        text += "".join(f"{_line(name, row)}\n" for name, row in sorted(rows.items()) if "untried" not in row)
        untried = {name: row["untried"] for name, row in sorted(rows.items()) if "untried" in row}
        if untried:
            text += "\nNot built tiny: " + "; ".join(f"{name} ({_short(why)})" for name, why in untried.items()) + ".\n"
    return text


def verdict(row: Mapping[str, str]) -> str:
    """ "right", "refused", "wrong" or "untried": the worst of what was asked."""
    if "untried" in row:
        return "untried"
    answers = [row[asked] for asked in ASKED if row[asked] != NOT_ASKED]
    if any(answer.startswith("WRONG") for answer in answers):
        return "wrong"
    return "right" if all(answer == RIGHT for answer in answers) else "refused"


def _summary(group: str, rows: Mapping[str, Any]) -> str:
    count = Counter(verdict(row) for row in rows.values())
    tried = len(rows) - count["untried"]
    share = f"{count['right']} ({count['right'] / tried:.0%})" if tried else "0"
    return f"| {group} | {tried} | {share} | {count['refused']} | {count['wrong']} | {count['untried']} |"


def _line(name: str, row: Mapping[str, str]) -> str:
    return f"| {name} | {row['kind']} | " + " | ".join(_short(row[asked].replace(name, "it")) for asked in ASKED) + " |"


def _short(text: str) -> str:
    text = text.replace("|", "/").replace("; use the plan with `skip` instead.", ".")
    text = text.replace("; skip other blocks, or use the plan with `skip`.", ".").partition(" From Python, `sw.skip`")[
        0
    ]
    return text if len(text) <= LONGEST else text[: LONGEST - 3].rstrip() + "..."
