#!/usr/bin/env bash
# transformers' GGUF reader takes Gemma3's kinds of layers by position (every sixth is full attention), whatever
# gemma3.attention.sliding_window_pattern in the file says, and of Qwen3 takes head_dim as 128, whatever
# qwen3.attention.key_length says.
#
# Versions: torch 2.13.0, transformers 5.23.0, gguf 0.19.0 (Python 3.11).
# Input: the headers of two GGUF files of four layers; the one lists kinds of layers as booleans, as llama.cpp reads
# them, the other a key length of 64.
# Seen:
#   gemma3, in the file full, sliding, full, sliding: read as sliding, sliding, sliding, sliding
#   qwen3, in the file 64: read as 128
# Why it matters: whoever checks a pruned GGUF with transformers compares with another model than llama.cpp runs.
# Exits non-zero when any of these lines changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate
cd "$work"
cat > run.py <<'PY'
import gguf
import numpy as np
import transformers as T


def header(name: str, arch: str):
    writer = gguf.GGUFWriter(name, arch)
    writer.add_block_count(4)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(64)
    writer.add_value_length(64)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(64)
    return writer


def config(writer, name: str):
    writer.add_tensor("token_embd.weight", np.zeros((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return T.AutoConfig.from_pretrained(".", gguf_file=name)


writer = header("gemma3.gguf", "gemma3")
writer.add_sliding_window(16)
writer.add_sliding_window_pattern([False, True, False, True])
kinds = [kind.partition("_")[0] for kind in config(writer, "gemma3.gguf").layer_types]
print("gemma3, in the file full, sliding, full, sliding: read as", ", ".join(kinds))
size = config(header("qwen3.gguf", "qwen3"), "qwen3.gguf").head_dim
print("qwen3, in the file 64: read as", size)
assert (kinds, size) == (["sliding"] * 4, 128), "changed"
PY
"$work/venv/bin/python" run.py
