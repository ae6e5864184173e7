"""What a forward predicts, before its logits are made: they are made and read a few positions at a time.

A sampler wants a token, its probability, a margin of some positions; logits of all of them would be the largest tensor
of the whole generation (64 positions of LLaDA's vocabulary are 32 MB in float32).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # of logits in float32 that are held at once
RUN, MANY = 256, 2**18  # numbers that `largest` looks at as one; and of how many on that pays

Reader = Callable[[Tensor, slice], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Prediction:
    """states: (n, width), what `head` makes logits (n, vocabulary) of; or (rows, length, width) of all positions.

    heads: logits of the model that one position takes, 2 under guidance.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor]
    vocabulary: int
    heads: int = 1

    @property
    def fits(self) -> bool:
        """Whether all logits fit into one chunk."""
        return self.states.ndim == 2 and len(list(self.chunks())) == 1

    def made(self) -> "Prediction":
        """With logits that are made now and kept, to be read more than once."""
        return replace(self, states=self.logits(), head=torch.clone, heads=1)

    def logits(self) -> Tensor:
        """All of them, (n, vocabulary) or (rows, length, vocabulary)."""
        return self.head(self.states)

    def guided(self, guide: Callable[[Tensor, Tensor], Tensor]) -> "Prediction":
        """guide(logits, logits without the prompt) of a prediction whose second half of rows went without."""
        pairs = self.states.unflatten(0, (2, -1)).transpose(0, 1)  # (n, 2, width)
        return Prediction(pairs, lambda pair: guide(*self.head(pair).unbind(1)), self.vocabulary, 2)

    def chunks(self, size: int | None = None) -> Iterator[slice]:
        """Parts of n positions whose logits take at most `size` bytes, by default CHUNK_BYTES."""
        n = len(self.states)
        most = max(1, (size or CHUNK_BYTES) // (4 * self.vocabulary * self.heads))
        return (slice(start, min(start + most, n)) for start in range(0, max(n, 1), most))

    def read(self, reader: Reader) -> tuple[Tensor, ...]:
        """reader(logits (m, vocabulary), which of the n positions they are) -> tensors (m, ...): those of all n.

        The reader may write into the logits, which nobody else sees.
        """
        parts = [reader(self.head(self.states[part]), part) for part in self.chunks()]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))


def largest(values: Tensor) -> Tensor:
    """values.argmax(-1) of (n, words): (n,), the first where several are largest.

    On a CPU, where torch goes for it number by number, the largest of every run of words is found first, which is six
    times as fast.
    """
    if not values.is_cpu or values.ndim != 2 or values.numel() < MANY or values.shape[1] < RUN:
        return values.argmax(-1)
    whole = values.shape[1] // RUN * RUN
    runs = values[:, :whole].unflatten(1, (-1, RUN))
    top, run = runs.amax(-1).max(-1, keepdim=True)
    inside = runs.gather(1, run[..., None].expand(-1, -1, RUN))[:, 0].argmax(-1)
    found = run[:, 0] * RUN + inside
    if whole == values.shape[1]:
        return found
    last, at = values[:, whole:].max(-1)
    return torch.where(torch.stack([top[:, 0], last], 1).argmax(1).bool(), at + whole, found)


def probabilities_of(logits: Tensor) -> Tensor:
    """logits.softmax(-1), which may take the logits' place: on a CPU half of its time would go into new memory."""
    return torch.softmax(logits, -1, out=logits) if logits.is_cpu else logits.softmax(-1)
