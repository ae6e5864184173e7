"""What turns a causal decoder of transformers into a masked diffusion model: attention that looks both ways."""

from typing import Any


class Bidirectional:
    """Mix in before a `...ForCausalLM` class whose config says `is_causal = False`."""

    is_masked_diffusion = True

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        for layer in self.model.layers:  # type: ignore[attr-defined]
            layer.self_attn.is_causal = False  # the SDPA kernels read this flag when there is no padding mask
