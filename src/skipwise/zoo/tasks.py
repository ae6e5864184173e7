"""Generated tasks with exact answers, on which the zoo's models are trained and skipping is measured.

Every prompt has 9 characters, one token each, and ends in `=`; an answer has as many tokens as the task needs and no
padding (padded answers flatter a diffusion model, which can fill the padding first).
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "calibration", "test"]

# A prompt's split is a property of its text (crc32 modulo 16), so no two splits can share a prompt.
_SPLIT_OF_BUCKET: dict[int, Split] = {0: "test", 1: "calibration"}


@dataclass(frozen=True)
class Task:
    """A task: `answer_length` tokens are to be produced after a prompt of 9 tokens."""

    name: str
    answer_length: int
    example: Callable[[random.Random], tuple[str, str]]


def _addition(rng: random.Random) -> tuple[str, str]:
    """`a123+456=` -> `9750`: a three-digit sum in four digits, least significant first, as carries run."""
    a, b = rng.randrange(1000), rng.randrange(1000)
    return f"a{a:03d}+{b:03d}=", f"{a + b:04d}"[::-1]


def _chain(rng: random.Random) -> tuple[str, str]:
    """`c7+5*3-1=` -> `265`: three operations modulo 10 from left to right, with every intermediate result."""
    value = rng.randrange(10)
    prompt, answer = f"c{value}", ""
    for _ in range(3):
        operation, operand = rng.choice("+-*"), rng.randrange(10)
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[operation] % 10
        prompt += f"{operation}{operand}"
        answer += str(value)
    return prompt + "=", answer


def _digits(rng: random.Random) -> str:
    return f"{rng.randrange(10**7):07d}"


def _sort(rng: random.Random) -> tuple[str, str]:
    """`s3141592=` -> `1123459`: seven digits in ascending order."""
    digits = _digits(rng)
    return f"s{digits}=", "".join(sorted(digits))


def _reverse(rng: random.Random) -> tuple[str, str]:
    """`r3141592=` -> `2951413`: seven digits backwards."""
    digits = _digits(rng)
    return f"r{digits}=", digits[::-1]


TASKS = {
    task.name: task
    for task in (
        Task("addition", 4, _addition),
        Task("chain", 3, _chain),
        Task("sort", 7, _sort),
        Task("reverse", 7, _reverse),
    )
}

PROMPT_LENGTH = 9
MAX_LENGTH = PROMPT_LENGTH + max(task.answer_length for task in TASKS.values())


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to, by the crc32 of its text: 1/16 test, 1/16 calibration, the rest training."""
    return _SPLIT_OF_BUCKET.get(zlib.crc32(prompt.encode()) % 16, "train")


def examples(task: str, split: Split, seed: int) -> Iterator[tuple[str, str]]:
    """An endless stream of (prompt, answer) of one task from one split, the same for the same seed."""
    rng = random.Random(f"{task}/{split}/{seed}")
    generate = TASKS[task].example
    while True:
        prompt, answer = generate(rng)
        if split_of(prompt) == split:
            yield prompt, answer


def distinct_examples(task: str, split: Split, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` different (prompt, answer) pairs of a task, in the order of the stream."""
    found: dict[str, str] = {}
    for prompt, answer in examples(task, split, seed):
        found.setdefault(prompt, answer)
        if len(found) == count:
            return list(found.items())
    raise AssertionError("the stream is endless")
