#!/usr/bin/env bash
# A StableDiffusion3Pipeline that was loaded without its T5, as diffusers' documentation advises for small memories, and saved,
# cannot be loaded again in the ordinary way: the nulls in model_index.json are taken for parts that are missing.
#
# Versions: torch 2.13.0, transformers 5.23.0, diffusers 0.42.1, accelerate 1.15.0 (Python 3.11).
# Input: a tiny random SD3 pipeline made with text_encoder_3=None and tokenizer_3=None, saved to a folder.
# Seen:
#   model_index.json: text_encoder_3 is [null, null]
#   from_pretrained(folder): ValueError
#   from_pretrained(folder, text_encoder_3=None, tokenizer_3=None): loads
# Why it matters: a folder saved to save memory looks broken to every tool that opens it.
# Exits non-zero when any of these lines changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 diffusers==0.42.1 accelerate==1.15.0
cd "$work"
cat > run.py <<'PY'
import json

import diffusers
import tokenizers
import transformers as T

words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0, "dog": 1}, unk_token="<|endoftext|>"))
words.save("tokenizer.json")
tokenizer = T.PreTrainedTokenizerFast(tokenizer_file="tokenizer.json", unk_token="<|endoftext|>", pad_token="<|endoftext|>")
text = T.CLIPTextConfig(
    vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, projection_dim=16,
    max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=0,
)
denoiser = diffusers.SD3Transformer2DModel(
    sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=8,
)
vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
pipeline = diffusers.StableDiffusion3Pipeline(
    transformer=denoiser, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae,
    text_encoder=T.CLIPTextModelWithProjection(text), tokenizer=tokenizer,
    text_encoder_2=T.CLIPTextModelWithProjection(text), tokenizer_2=tokenizer,
    text_encoder_3=None, tokenizer_3=None,
)
pipeline.save_pretrained("folder")
found = [f"model_index.json: text_encoder_3 is {json.dumps(json.load(open('folder/model_index.json'))['text_encoder_3'])}"]
absent = dict(text_encoder_3=None, tokenizer_3=None)
for shown, given in (("folder", {}), ("folder, text_encoder_3=None, tokenizer_3=None", absent)):
    try:
        diffusers.StableDiffusion3Pipeline.from_pretrained("folder", **given)
        what = "loads"
    except ValueError as error:
        print(error)
        what = "ValueError"
    found.append(f"from_pretrained({shown}): {what}")
print("\n".join(found))
assert found == [
    "model_index.json: text_encoder_3 is [null, null]",
    "from_pretrained(folder): ValueError",
    "from_pretrained(folder, text_encoder_3=None, tokenizer_3=None): loads",
], "changed"
PY
"$work/venv/bin/python" run.py
