"""How fast decoding is on this machine, beside what the machine can do: the ceiling, the modes, the result."""

from skipwise.benchmarking.result import BenchResult
from skipwise.benchmarking.run import bench
from skipwise.benchmarking.work import BenchSettings

__all__ = ["BenchResult", "BenchSettings", "bench"]
