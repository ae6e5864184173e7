#!/usr/bin/env bash
# mlx-lm takes the kinds of layers of Gemma3 and Cohere2 by position, not from layer_types in config.json.
#
# Versions: torch 2.13.0, transformers 5.23.0, mlx 0.32.4, mlx-cpu 0.32.4, mlx-lm 0.32.2 (Python 3.11).
# Input: tiny random checkpoints of six layers, saved by transformers, whose layer_types are those left of eight layers
# in rhythm (three with windows, one full) when layers 1 and 2 are taken out. rope_theta stands on top of config.json,
# as mlx-lm wants it.
# Seen: both load without a word, and their logits differ from transformers' from the second token on. SmolLM3, whose
# no_rope_layers is as irregular, agrees.
#   gemma3_text: differs from token 1 on
#   cohere2: differs from token 1 on
#   smollm3: agrees
# Why it matters: a checkpoint with layers taken out runs, and is another model than the one that was evaluated.
# Exits non-zero when any of these lines changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
cd "$work"
cat > run.py <<'PY'
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
import transformers as T
from mlx_lm.utils import load_model

T.logging.set_verbosity_error()
mx.set_default_device(mx.cpu)
S, F = "sliding_attention", "full_attention"
common = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4)
common |= dict(num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
mixed = dict(sliding_window=8, layer_types=[S, F, S, S, S, F])
plain = {"rope_type": "default", "rope_theta": 10000.0}
configs = {
    "gemma3_text": T.Gemma3TextConfig(
        **common, **mixed, query_pre_attn_scalar=16, rope_parameters={S: plain, F: plain | {"rope_theta": 1e6}}
    ),
    "cohere2": T.Cohere2Config(**common, **mixed, rope_parameters=plain | {"rope_theta": 50000.0}),
    "smollm3": T.SmolLM3Config(**common, no_rope_layers=[1, 0, 1, 1, 1, 0], rope_parameters=plain | {"rope_theta": 2e6}),
}
ids = torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(1))
found = []
for name, config in configs.items():
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p.mean() if p.ndim == 1 else 0) + 0.15 * torch.randn_like(p))
        expected = model(ids, use_cache=False).logits.numpy()
    model.save_pretrained(name)
    path = Path(name, "config.json")
    content = json.loads(path.read_text())
    ropes = content["rope_parameters"]
    content["rope_theta"] = ropes.get(F, ropes)["rope_theta"]
    path.write_text(json.dumps(content))
    other, _ = load_model(Path(name))
    got = np.array(other(mx.array(ids.numpy())).astype(mx.float32))
    wrong = np.nonzero(np.abs(got - expected).max(-1)[0] > 1e-3 * np.abs(expected).max())[0]
    found.append(f"{name}: " + (f"differs from token {wrong[0]} on" if len(wrong) else "agrees"))
print("\n".join(found))
assert found == ["gemma3_text: differs from token 1 on", "cohere2: differs from token 1 on", "smollm3: agrees"], "changed"
PY
"$work/venv/bin/python" run.py
