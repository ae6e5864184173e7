"""Models and tokenizers from what people have: embedded names, folders, hub ids, GGUF files.

Never remote code, never pickle. Every key of a checkpoint is used and every parameter filled, or one line says which
did not fit.
"""

from skipwise.loading.checks import (
    check_keys,
    check_no_single_file,
    check_plain,
    check_weights,
    quantisation,
    quiet,
    readable_errors,
)
from skipwise.loading.classes import DTYPES, NATIVE, build_skeleton
from skipwise.loading.devices import dtype_name, read_device, read_dtype
from skipwise.loading.load import load, load_random, load_skeleton
from skipwise.loading.source import Source, embedded_names, find, find_tokenizer, pipeline_folder
from skipwise.loading.tokenizers import chat_prompts, check_tokenizer, load_tokenizer

__all__ = [
    "DTYPES",
    "NATIVE",
    "Source",
    "build_skeleton",
    "chat_prompts",
    "check_keys",
    "check_no_single_file",
    "check_plain",
    "check_tokenizer",
    "check_weights",
    "dtype_name",
    "embedded_names",
    "find",
    "find_tokenizer",
    "load",
    "load_random",
    "load_skeleton",
    "load_tokenizer",
    "pipeline_folder",
    "quantisation",
    "quiet",
    "read_device",
    "read_dtype",
    "readable_errors",
]
