#!/usr/bin/env bash
# ctranslate2's converter, given checkpoints as transformers 5 saves them, drops Llama-3's rope scaling and Gemma's
# rope_theta without a word; Llama's rope_theta and linear scaling are read.
#
# Versions: torch 2.13.0, transformers 5.23.0, ctranslate2 4.8.5 (Python 3.11).
# Input: whole tiny random checkpoints and a word-level tokenizer, converted to float32; logits of 24 tokens.
# Seen:
#   llama, rope_theta 500: agrees
#   llama, linear scaling by 4: agrees
#   llama, llama3 scaling by 8: differs
#   gemma, rope_theta 10000: agrees
#   gemma, rope_theta 500: differs
# Why it matters: Llama 3.1 and later all have this scaling; the converted model drifts from the first tokens on.
# Exits non-zero when any of these lines changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 ctranslate2==4.8.5
cd "$work"
cat > run.py <<'PY'
import ctranslate2
import numpy as np
import torch
import transformers as T
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models

T.logging.set_verbosity_error()
common = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
common |= dict(num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
plain = {"rope_type": "default", "rope_theta": 500.0}
llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
configs = {
    "llama, rope_theta 500": T.LlamaConfig(**common, rope_parameters=plain),
    "llama, linear scaling by 4": T.LlamaConfig(**common, rope_parameters=plain | {"rope_type": "linear", "factor": 4.0}),
    "llama, llama3 scaling by 8": T.LlamaConfig(**common, rope_parameters=plain | llama3 | {"rope_type": "llama3"}),
    "gemma, rope_theta 10000": T.GemmaConfig(**common, rope_parameters=plain | {"rope_theta": 10000.0}),
    "gemma, rope_theta 500": T.GemmaConfig(**common, rope_parameters=plain),
}
words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0"))
tokenizer = T.PreTrainedTokenizerFast(
    tokenizer_object=words, bos_token="t1", eos_token="t2", unk_token="t0", pad_token="t0"
)
ids = torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(1))
found = []
for number, (name, config) in enumerate(configs.items()):
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p.mean() if p.ndim == 1 else 0) + 0.15 * torch.randn_like(p))
        expected = model(ids, use_cache=False).logits.numpy()
    model.save_pretrained(f"m{number}")
    tokenizer.save_pretrained(f"m{number}")
    TransformersConverter(f"m{number}").convert(f"c{number}")
    generator = ctranslate2.Generator(f"c{number}", device="cpu", compute_type="float32")
    got = np.array(generator.forward_batch([[f"t{i}" for i in ids[0].tolist()]]))
    difference = np.abs(got[..., :64] - expected).max()
    found.append(f"{name}: " + ("agrees" if difference < 1e-3 * np.abs(expected).max() else "differs"))
print("\n".join(found))
assert [line.rpartition(" ")[2] for line in found] == ["agrees", "agrees", "differs", "agrees", "differs"], "changed"
PY
"$work/venv/bin/python" run.py
