#!/usr/bin/env bash
# Called step by step with a cache and without position_ids, Bamba, and MiniMax whose first layer is linear attention,
# count positions from 0 at every step; other models of transformers go on from the cache's length. generate() passes
# position_ids and is right.
#
# Versions: torch 2.13.0, transformers 5.23.0 (Python 3.11).
# Input: tiny random models; six tokens at once, then six one by one, against one forward of all twelve.
# Seen:
#   Llama: agrees; with position_ids agrees
#   Bamba: differs; with position_ids agrees
#   MiniMax, first layer full: agrees; with position_ids agrees
#   MiniMax, first layer linear: differs; with position_ids agrees
# Why it matters: MiniMax-Text-01 begins with a linear layer, and loops that decode by hand (speculative decoding,
# evaluation with a prefix cache, pruning studies) give other logits without a word. Taking block 0 out of a MiniMax
# that begins with full attention moves a right model into this case.
# Exits non-zero when any of these lines changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$work"
cat > run.py <<'PY'
import torch
import transformers as T

T.logging.set_verbosity_error()
common = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
common |= dict(num_key_value_heads=2)
mamba = dict(mamba_n_heads=4, mamba_d_head=16, mamba_expand=2, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8)
L, F = "linear_attention", "full_attention"
configs = {
    "Llama": T.LlamaConfig(**common),
    "Bamba": T.BambaConfig(**common, **mamba, attn_layer_indices=[1, 3]),
    "MiniMax, first layer full": T.MiniMaxConfig(**common, head_dim=8, num_local_experts=2, layer_types=[F, L, F, L]),
    "MiniMax, first layer linear": T.MiniMaxConfig(**common, head_dim=8, num_local_experts=2, layer_types=[L, L, L, F]),
}
ids = torch.arange(3, 15)[None]


@torch.no_grad()
def compared(model, with_positions: bool) -> str:
    result, parts = None, []
    for start, end in [(0, 6), *((i, i + 1) for i in range(6, 12))]:
        more = {"position_ids": torch.arange(start, end)[None]} if with_positions else {}
        past = result.past_key_values if result else None
        result = model(ids[:, start:end], past_key_values=past, use_cache=True, **more)
        parts.append(result.logits)
    expected = model(ids, use_cache=False).logits
    return "agrees" if torch.allclose(torch.cat(parts, 1), expected, atol=1e-4, rtol=1e-4) else "differs"


found = []
for name, config in configs.items():
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p.mean() if p.ndim == 1 else 0) + 0.15 * torch.randn_like(p))
    found.append(f"{name}: {compared(model, False)}; with position_ids {compared(model, True)}")
print("\n".join(found))
assert found == [
    "Llama: agrees; with position_ids agrees",
    "Bamba: differs; with position_ids agrees",
    "MiniMax, first layer full: agrees; with position_ids agrees",
    "MiniMax, first layer linear: differs; with position_ids agrees",
], "changed"
PY
"$work/venv/bin/python" run.py
