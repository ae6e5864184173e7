#!/usr/bin/env bash
# from_pretrained(key_mapping=) renames a checkpoint's keys, and save_pretrained renames them back by turning the patterns
# round. A group that captures nothing, (?:...), leaves its "?" at the front of every key, and the saved folder then loads
# with random weights: the keys fit neither by the mapping nor without it.
#
# Versions: torch 2.13.0, transformers 5.23.0, safetensors 0.8.0 (Python 3.11).
# Input: a tiny random Llama, its keys renamed to outer.* in the file, loaded with {"^(?:outer\.)?model\.": "model."}.
# Seen:
#   loaded with the mapping: every weight as it was
#   first saved key: ?model.embed_tokens.weight
#   the saved folder loaded again: 38 weights missing
# Why it matters: key_mapping is how a checkpoint of another layout is read without remote code; load, save, load loses it.
# Exits non-zero when any of these lines changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
cd "$work"
cat > run.py <<'PY'
import torch
import transformers as T
from safetensors.torch import load_file, save_file

torch.manual_seed(0)
config = T.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
model = T.LlamaForCausalLM(config)
model.save_pretrained("source")
weights = load_file("source/model.safetensors")
save_file({k.replace("model.", "outer.model."): v for k, v in weights.items()}, "source/model.safetensors", {"format": "pt"})
mapping = {r"^(?:outer\.)?model\.": "model."}
loaded = T.LlamaForCausalLM.from_pretrained("source", key_mapping=mapping)
same = all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
loaded.save_pretrained("saved")
keys = sorted(load_file("saved/model.safetensors"))
_, report = T.LlamaForCausalLM.from_pretrained("saved", output_loading_info=True)
found = [
    f"loaded with the mapping: {'every weight as it was' if same else 'other weights'}",
    f"first saved key: {next(key for key in keys if 'embed' in key)}",
    f"the saved folder loaded again: {len(report['missing_keys'])} weights missing",
]
print("\n".join(found))
assert found == [
    "loaded with the mapping: every weight as it was",
    "first saved key: ?model.embed_tokens.weight",
    "the saved folder loaded again: 38 weights missing",
], "changed"
PY
"$work/venv/bin/python" run.py
