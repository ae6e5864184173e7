"""The tokenizer of a model: the one beside its weights, or another that is named. No repository's code is run.

Dream's is code of its repository, a byte-level BPE with Qwen2's rules over vocab.json and merges.txt; it is read by
transformers' own Qwen2 tokenizer. Any other one that is code of its repository is refused.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from jinja2 import TemplateError
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from skipwise.errors import UserError
from skipwise.files import read_json
from skipwise.loading.checks import quiet, readable_errors
from skipwise.loading.gguf_file import GGUF
from skipwise.loading.source import Source, find_tokenizer

# A folder that has one of these has a tokenizer; those of VOCABULARIES hold its tokens.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
FILES = ("tokenizer_config.json", *VOCABULARIES)
DREAM = "DreamTokenizer"
DREAM_FILES = ("vocab.json", "merges.txt")
SPARE = 128  # numbers that may lie between a tokenizer's last token and a mask token that it does not know
OTHERWISE = "name another tokenizer: --tokenizer NAME|FOLDER, in Python tokenizer=."


def load_tokenizer(source: Source | None, named: Any = None) -> Any:
    """The tokenizer of a source, which pads on the left; None where there is none, or no source.

    named: another one in its place, by the name of a model, a folder or a hub id; a loaded one is handed back as it is.
    Raises UserError for one that is code of its repository, or whose files are missing or contradict one another.
    """
    if named is not None and not isinstance(named, str | Path):
        return named
    found = source if named is None else find_tokenizer(str(named))
    if found is None:
        return None
    try:
        with readable_errors(found):
            tokenizer = _read(found)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises no narrower one
        raise UserError(f"{found.name}: its tokenizer cannot be read: {' '.join(str(error).split())}.") from error
    if tokenizer is None and named is not None:
        raise UserError(f"{named} holds no tokenizer (none of {', '.join(FILES)}); give the folder of one.")
    if tokenizer is not None and source is not None and not (source.gguf or source.single):
        _name_mask(tokenizer, source.config.get("mask_token_id"))
    return tokenizer


def check_tokenizer(tokenizer: Any, config: Any, name: str) -> None:
    """Raise UserError unless the tokens of the tokenizer are those of the model `name` with this config.

    Every ordinary token needs a row of the embedding, and so do those that begin, end, pad and mask; an added one that
    no text holds, such as Gemma's for images in a model of text, does not. The mask token must be the model's; where
    the tokenizer has none, as GPT-2's for MDLM, the model's is right behind the tokenizer's own.
    """
    size = getattr(config.get_text_config(), "vocab_size", None) if hasattr(config, "get_text_config") else None
    if tokenizer is None or not isinstance(size, int):
        return
    ids = {"token": tokenizer.vocab_size - 1}
    ids |= {f"{what} token": getattr(tokenizer, f"{what}_token_id") for what in ("bos", "eos", "pad", "mask")}
    for what, number in ids.items():
        if number is not None and number >= size:
            raise UserError(f"The tokenizer of {name} has the {what} {number}, its model {size} tokens; {OTHERWISE}")
    mask = getattr(config, "mask_token_id", None)
    if mask is None:
        return
    if tokenizer.mask_token_id not in (None, mask):
        raise UserError(
            f"The tokenizer of {name} has the mask token {tokenizer.mask_token_id}, its model {mask}; {OTHERWISE}"
        )
    known, count = _known_token(tokenizer, mask), len(tokenizer)
    if known is None and not 0 <= mask - count < SPARE:
        raise UserError(
            f"The tokenizer of {name} has {count} tokens, and {mask}, the mask token of its model, is no special one "
            f"among them; {OTHERWISE}"
        )


def chat_prompts(tokenizer: Any, prompts: Sequence[str], system: str | None = None) -> Any:
    """Prompts as the tokenizer's chat template puts them to the model, up to where its answer begins.

    system: what the model is told before each. Returns input_ids and attention_mask, (prompts, tokens), padded on the
    left. Raises UserError when the tokenizer has no template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("The tokenizer has no chat template; leave out --chat, or " + OTHERWISE)
    before = [{"role": "system", "content": system}] if system else []
    chats = [[*before, {"role": "user", "content": prompt}] for prompt in prompts]
    try:
        return tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
    except TemplateError as error:
        raise UserError(f"The tokenizer's chat template cannot be filled: {error}.") from error


def _read(source: Source) -> Any:
    """The tokenizer whose files are there; None where there are none."""
    settings: dict[str, Any] = {"padding_side": "left"}
    if source.single or (source.gguf and not GGUF.open(source).is_language_model):
        return None
    if source.gguf:
        return transformers.AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf, **settings)
    if not any((source.folder / name).exists() for name in FILES):
        return None
    remote = _remote_class(source.folder)
    with quiet():
        if remote == DREAM:
            tokenizer = _read_dream(source, settings)
        elif remote:
            raise UserError(f"{source.name}: its tokenizer is code of its repository ({remote}); {OTHERWISE}")
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, **settings)
    _check_vocabulary(tokenizer, source)
    template = source.folder / "chat_template.json"
    if template.exists() and not tokenizer.chat_template:
        tokenizer.chat_template = _json(template).get("chat_template")
    return tokenizer


def _remote_class(folder: Path) -> str | None:
    """The class that a folder's tokenizer has in its repository's code; None when transformers reads it by itself."""
    config = _json(folder / "tokenizer_config.json")
    name, mapped = config.get("tokenizer_class"), config.get("auto_map") or ()
    references = mapped.get("AutoTokenizer") if isinstance(mapped, dict) else mapped
    reference = next((str(found) for found in reversed(references or ()) if found), None)
    if name and name != DREAM and tokenizer_class_from_name(name) is not None:
        return None
    if reference:
        return reference.rpartition(".")[2]
    # without a class that it knows, transformers takes tokenizer.json as it is, and other files without their rules
    return name if name and not (folder / "tokenizer.json").exists() else None


def _read_dream(source: Source, settings: dict[str, Any]) -> Any:
    """Dream's tokenizer: Qwen2's over its files, with the added tokens and the template of tokenizer_config.json."""
    config = _json(source.folder / "tokenizer_config.json")
    for name in DREAM_FILES:
        if not (source.folder / name).exists():
            raise UserError(f"{source.name} lacks {name}, which its {DREAM} reads; copy it there, or {OTHERWISE}")
    if config.get("errors", "replace") != "replace":
        raise UserError(f"{source.name}: its {DREAM} has errors={config['errors']!r}; only 'replace' is implemented.")
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(source.folder, **settings)
    added = config.get("added_tokens_decoder")
    if added is None:
        wanted = _json(source.folder / "added_tokens.json")
    else:
        wanted = {token["content"]: int(number) for number, token in added.items()}
    found = tokenizer.get_vocab()
    for token, number in (_json(source.folder / DREAM_FILES[0]) | wanted).items():
        if found.get(token) != number:  # transformers numbers added tokens anew where there is a hole before them
            raise UserError(
                f"{source.name}: the token {token!r} is {number} in its files and would be {found.get(token)} here; "
                f"the tokens must be numbered without a hole. Or {OTHERWISE}"
            )
    return tokenizer


def _check_vocabulary(tokenizer: Any, source: Source) -> None:
    """Raise UserError for a tokenizer that knows special tokens alone: transformers builds one of settings alone."""
    there = any((source.folder / name).exists() for name in VOCABULARIES) or any(source.folder.glob("*.tiktoken"))
    if not there and tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
        raise UserError(
            f"{source.name} has a tokenizer_config.json but none of {', '.join(VOCABULARIES)}; copy those files too, "
            f"or {OTHERWISE}"
        )


def _name_mask(tokenizer: Any, mask: int | None) -> None:
    """Tell a tokenizer that has the model's mask token among its special ones, as LLaDA's has, which one that is."""
    if mask is not None and tokenizer.mask_token is None and (token := _known_token(tokenizer, mask)):
        tokenizer.mask_token = token


def _known_token(tokenizer: Any, number: int) -> str | None:
    """The added or special token of this number, if there is one."""
    token = tokenizer.convert_ids_to_tokens(number) if number < len(tokenizer) else None
    return token if token in tokenizer.get_added_vocab() or token in tokenizer.all_special_tokens else None


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty when there is no file."""
    if not path.exists():
        return {}
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; copy the file again.")
    return content
