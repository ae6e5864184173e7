#!/usr/bin/env bash
# Gemma4's config in transformers makes the last layer full attention whatever layer_types says; Gemma3's leaves the same
# list as it is. A checkpoint whose last block was taken out then loads with a warning and is another model.
#
# Versions: torch 2.13.0, transformers 5.23.0 (Python 3.11).
# Input: a tiny random Gemma4 text model of six layers (sliding, sliding, full, twice) with one head size for all, its
# last layer taken out of the list of modules, out of layer_types and out of num_hidden_layers; saved and loaded again.
# Seen:
#   Gemma3: layer_types of the loaded model end in sliding_attention
#   Gemma3: logits before saving and after loading agree
#   Gemma4: layer_types of the loaded model end in full_attention
#   Gemma4: logits before saving and after loading differ
# Why it matters: taking out the last block is the commonest depth pruning.
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

S, F = "sliding_attention", "full_attention"
common = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4)
common |= dict(num_key_value_heads=2, head_dim=16, sliding_window=4, layer_types=[S, S, F] * 2)
configs = {
    "Gemma3": T.Gemma3TextConfig(**common),
    "Gemma4": T.Gemma4TextConfig(**common, global_head_dim=16, hidden_size_per_layer_input=0, num_kv_shared_layers=0),
}
ids = torch.arange(3, 27)[None]
found = []
for name, config in configs.items():
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p.mean() if p.ndim == 1 else 0) + 0.15 * torch.randn_like(p))
    model.model.layers = model.model.layers[:5]
    model.config.layer_types = model.config.layer_types[:5]
    model.config.num_hidden_layers = 5
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
    model.save_pretrained(name)
    loaded = T.AutoModelForCausalLM.from_pretrained(name).eval()
    with torch.no_grad():
        after = loaded(ids, use_cache=False).logits
    found.append(f"{name}: layer_types of the loaded model end in {loaded.config.layer_types[-1]}")
    found.append(f"{name}: logits before saving and after loading {'agree' if torch.equal(before, after) else 'differ'}")
print("\n".join(found))
assert found == [
    "Gemma3: layer_types of the loaded model end in sliding_attention",
    "Gemma3: logits before saving and after loading agree",
    "Gemma4: layer_types of the loaded model end in full_attention",
    "Gemma4: logits before saving and after loading differ",
], "changed"
PY
"$work/venv/bin/python" run.py
