"""Pictures by the stock pipeline with the adapter: all blocks of the ordinary model run."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from skipwise.files import write_bytes_atomically
from skipwise.finetuning.lora import load_lora
from skipwise.finetuning.pipelines import load_pipeline


def draw_pictures(
    name: str,
    adapter: str | Path | None,
    prompts: Sequence[str],
    output: str | Path,
    *,
    side: int,
    seed: int = 0,
    dtype: str = "bfloat16",
    device: str | None = None,
    **call: Any,
) -> list[Path]:
    """Draw one picture of `side` pixels for each prompt and write `output`/0.png, 1.png, ...; returns the paths.

    adapter: the folder of a saved LoRA, None for the model as it is. On a GPU, what does not run waits in host memory.
    call: further arguments of the pipeline, such as num_inference_steps.
    """
    if not prompts:
        return []  # a whole pipeline is much to load for nothing
    pipeline = load_pipeline(name, dtype=dtype)
    if adapter is not None:
        load_lora(pipeline, adapter)
    if device not in (None, "cpu"):
        pipeline.enable_model_cpu_offload(device=device)
    pipeline.set_progress_bar_config(disable=True)
    paths = []
    for number, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed)
        image = pipeline(prompt, height=side, width=side, generator=generator, **call).images[0]
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        paths.append(write_bytes_atomically(Path(output) / f"{number}.png", buffer.getvalue()))
    return paths
