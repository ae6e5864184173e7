#!/usr/bin/env bash
# transformers 5 writes rope_theta and rope scaling into rope_parameters alone; mlx-lm reads them there for Qwen3 and not
# for Llama, Qwen2, Gemma, Cohere, Mixtral, Olmo2 or Falcon-H1, which silently take their class's default.
#
# Versions: torch 2.13.0, transformers 5.23.0, mlx 0.32.4, mlx-cpu 0.32.4, mlx-lm 0.32.2 (Python 3.11).
# Input: whole tiny random checkpoints with a rope_theta of 500, as transformers saves them, and the same with rope_theta
# copied to the top of config.json (transformers' own logits are the same for both).
# Seen:
#   llama: as saved differs, with rope_theta on top agrees
#   qwen2: as saved differs, with rope_theta on top agrees
#   gemma: as saved differs, with rope_theta on top agrees
#   cohere: as saved differs, with rope_theta on top agrees
#   mixtral: as saved differs, with rope_theta on top agrees
#   olmo2: as saved differs, with rope_theta on top agrees
#   falcon_h1: as saved differs, with rope_theta on top agrees
#   qwen3: as saved agrees, with rope_theta on top agrees
# Why it matters: any tool that loads and saves a checkpoint (pruning, merging, casting) changes what mlx-lm computes.
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
common = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
common |= dict(num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
common |= dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
experts = dict(num_local_experts=4, num_experts_per_tok=2)
mamba = dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8)
configs = {
    "llama": T.LlamaConfig(**common),
    "qwen2": T.Qwen2Config(**common),
    "gemma": T.GemmaConfig(**common),
    "cohere": T.CohereConfig(**common),
    "mixtral": T.MixtralConfig(**common, **experts),
    "olmo2": T.Olmo2Config(**common),
    "falcon_h1": T.FalconH1Config(**common, **mamba),
    "qwen3": T.Qwen3Config(**common),
}
ids = torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(1))


def agrees(folder: str, expected: np.ndarray) -> str:
    other, _ = load_model(Path(folder))
    got = np.array(other(mx.array(ids.numpy())).astype(mx.float32))
    return "agrees" if np.abs(got - expected).max() < 1e-3 * np.abs(expected).max() else "differs"


found = []
for name, config in configs.items():
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p.mean() if p.ndim == 1 else 0) + 0.15 * torch.randn_like(p))
        expected = model(ids, use_cache=False).logits.numpy()
    model.save_pretrained(name)
    as_saved = agrees(name, expected)
    path = Path(name, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 500.0}))
    with torch.no_grad():
        again = T.AutoModelForCausalLM.from_pretrained(name).eval()(ids, use_cache=False).logits.numpy()
    assert np.array_equal(again, expected)
    found.append(f"{name}: as saved {as_saved}, with rope_theta on top {agrees(name, expected)}")
print("\n".join(found))
differs = [f"{name}: as saved differs, with rope_theta on top agrees" for name in list(configs)[:-1]]
assert found == [*differs, "qwen3: as saved agrees, with rope_theta on top agrees"], "changed"
PY
"$work/venv/bin/python" run.py
