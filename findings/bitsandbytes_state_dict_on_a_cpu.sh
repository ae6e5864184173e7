#!/usr/bin/env bash
# Asking a model for its state_dict changes what it computes, when bitsandbytes has quantised it to 4 bits and it has run on
# a CPU. The first forward packs the weights for the CPU's kernel; state_dict unpacks them again, and rounds their scales.
#
# Versions: torch 2.13.0, transformers 5.23.0, bitsandbytes 0.50.2, accelerate 1.15.0 (Python 3.11).
# Input: a tiny random Qwen2 of width 64, loaded with BitsAndBytesConfig(load_in_4bit=True); the same tokens three times.
# Seen (on CPUs with the packed kernel; without it, the second line says "equal" and nothing changes):
#   second forward: equal
#   forward after model.state_dict(): differs
# Why it matters: counting bytes, hashing or saving a checkpoint in the middle of a measurement changes the measurement.
# Exits non-zero when any of these lines changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 bitsandbytes==0.50.2 accelerate==1.15.0
cd "$work"
cat > run.py <<'PY'
import torch
import transformers as T

torch.manual_seed(0)
shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, vocab_size=96)
T.Qwen2ForCausalLM(T.Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=2)).save_pretrained("plain")
quantise = T.BitsAndBytesConfig(load_in_4bit=True)
model = T.AutoModelForCausalLM.from_pretrained("plain", quantization_config=quantise).eval()
ids = torch.arange(3, 27)[None]


def logits():
    with torch.no_grad():
        return model(ids).logits


first, second = logits(), logits()
model.state_dict()
third = logits()
found = [
    f"second forward: {'equal' if torch.equal(first, second) else 'differs'}",
    f"forward after model.state_dict(): {'equal' if torch.equal(first, third) else 'differs'}",
]
print("\n".join(found))
assert found == ["second forward: equal", "forward after model.state_dict(): differs"], "changed"
PY
"$work/venv/bin/python" run.py
