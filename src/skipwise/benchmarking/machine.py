"""The machine that something was measured on."""

import platform
import sys
from datetime import UTC, datetime

import torch

from skipwise.benchmarking.result import Machine
from skipwise.versions import told_of_processor, versions


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
    return told_of_processor("model name") or platform.processor() or platform.machine()
