"""The machine that something was measured on."""

import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from skipwise.benchmarking.result import Machine
from skipwise.versions import versions


def machine(device: torch.device) -> Machine:
    """This machine, now."""
    cuda = device.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name(device) if cuda else processor(),
        threads=torch.get_num_threads(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=" ".join(sys.argv),
        versions=versions() | ({"cuda": str(torch.version.cuda)} if cuda else {}),
    )


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
