"""BenchResult: what `skipwise bench` prints as its last line. The fields are described in docs/bench.md."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

FORMAT: Literal["skipwise-bench/1"] = "skipwise-bench/1"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Machine(_Frozen):
    """Where and how it was measured."""

    device: str = Field(description="name of the GPU, or of the processor")
    threads: int = Field(description="of torch, on the CPU")
    date: str = Field(description="UTC, ISO 8601")
    command: str = Field(description="that made it")
    versions: dict[str, str] = Field(description="of python, skipwise, torch, transformers, ...")


class Ceiling(_Frozen):
    """What this machine reaches when it does nothing else, measured just before the modes."""

    dtype: str = Field(description="of the products, that of the model's weights")
    matrix_flops: float = Field(gt=0, description="FLOP a second of the best of several square matrix products")
    matrix_size: int = Field(gt=0, description="rows and columns of that product")
    bandwidth: float = Field(gt=0, description="bytes a second, read and written both counted")
    bandwidth_by: Literal["copy", "read"] = Field(description="what reached it")


class Workload(_Frozen):
    """What is decoded, the same in every mode."""

    model: str = Field(description="as it was named")
    architecture: str = Field(description="class of the model")
    weights: Literal["trained", "random"] = Field(description="random ones say nothing of agreement")
    parameters: int = Field(description="numbers in the weights")
    weight_bytes: int = Field(description="bytes of the weights")
    batch: int = Field(description="rows decoded together")
    prompt_length: int = Field(description="tokens of a row's prompt")
    gen_length: int = Field(description="new tokens a row")
    block_length: int | None = Field(description="None: token by token, or a sampler without blocks")
    family: str = Field(description="of samplers; `autoregressive` for one token after the other")
    seed: int = Field(description="of prompts, noise and random weights")


class Interval(_Frozen):
    """The median of paired rounds; low and high are its 95% bootstrap interval, of fewer than 6 rounds the extremes."""

    value: float = Field(description="median")
    low: float = Field(description="lower end")
    high: float = Field(description="upper end")


class Row(_Frozen):
    """One way to decode."""

    mode: str = Field(description="its name")
    exact: bool = Field(description="whether it is meant to give the tokens of the first row")
    settings: dict[str, Any] = Field(description="given to `skipwise.generate` beside the workload")
    plan: str | None = Field(description="what the plan is, in words")
    seconds: float = Field(gt=0, description="median of the rounds, of the whole batch")
    seconds_to_exact: Interval = Field(description="seconds / the first row's in the same round; below 1: faster")
    first_seconds: float = Field(gt=0, description="of the first run, compilation included")
    tokens_per_second: float = Field(gt=0, description="new tokens of all rows, without the prompt's own forward")
    forwards: int = Field(gt=0, description="calls of a model")
    seconds_per_forward: float = Field(gt=0, description="seconds / forwards")
    forwards_per_token: float = Field(gt=0, description="forwards / new tokens a row")
    agreement: float = Field(ge=0, le=1, description="share of new tokens equal to the first row's, place by place")
    peak_bytes: int | None = Field(description="see `memory_is`; None where it cannot be measured")
    block_flops: int = Field(description="in the blocks alone, by formula, as they happened")
    all_in_flops: int = Field(description="head and attention included, by formula, as they happened")
    share_of_matrix_rate: float = Field(ge=0, description="FLOPs that were taken / seconds / the ceiling's matrix rate")
    share_of_bandwidth: float = Field(ge=0, description="weights read once a forward / seconds / the bandwidth")

    @property
    def share_of_ceiling(self) -> float:
        """The larger of the two shares: how near the bound that is nearer."""
        return max(self.share_of_matrix_rate, self.share_of_bandwidth)


class BenchResult(_Frozen):
    """One run of `skipwise bench`. The first row is exact decoding, which the others are compared with."""

    format: Literal["skipwise-bench/1"] = Field(default=FORMAT, description="of this object")
    memory_is: str = Field(description="what peak_bytes are")
    rounds: int = Field(description="in each of which every mode ran once")
    machine: Machine = Field(description="where and how it was measured")
    ceiling: Ceiling = Field(description="what this machine reaches at most")
    workload: Workload = Field(description="what was decoded")
    rows: tuple[Row, ...] = Field(min_length=1, description="one a mode, exact decoding first")

    @model_validator(mode="after")
    def _check(self) -> Self:
        first = self.rows[0]
        if not first.exact or first.agreement != 1:
            raise ValueError("the first row must be exact decoding, which agrees with itself")
        return self
