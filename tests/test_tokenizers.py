"""Tokenizers beside official checkpoints: Dream's read natively, others by name, and what does not fit refused."""

import json
import unicodedata
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

import skipwise as sw
from skipwise.loading import chat_prompts, check_tokenizer, load_tokenizer
from skipwise.loading.source import Source
from skipwise.models.dream import DreamConfig, DreamModel
from skipwise.models.llada import LLaDAModelLM
from skipwise.models.mdlm import MDLM, MDLMConfig

# Qwen2's rule for the pieces that merges stay within
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "hello", "Hello", "world", "don't", "we'LL", "naïve", "e\u0301te\u0301", "Å", "A\u030a", "ﬁ", "straße", "İstanbul",
    "привет", "мир", "γειά", "שלום", "مرحبا", "नमस्ते", "สวัสดี", "こんにちは", "漢字", "안녕하세요", "각",
    "\u1100\u1161\u11a8",
    "🙂", "👩‍👩‍👧", "🇫🇷", "0", "42", "3.14159", "1,000,000", "٣٤", "x_1", "def f(x):\n\treturn x**2", "a+=b;", "{}[]",
    "http://a.b/c?d=e", "#!/bin/sh", "\\n", "\"q\"", "…", "—", "\u00a0", "\u200b", "\u3000", "\r\n", "\n\n\n", "\t\t",
    " ", "   ", "\x00", "\x7f", *SPECIAL, "<|mask|", "|im_end|>", "<|endoftext|><|mask|>",
]  # fmt: skip


@cache
def byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@cache
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """vocab.json and merges.txt of a byte-level BPE, trained on the words of the tests."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = list(byte_letters().values())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator([" ".join(WORDS), "\n".join(WORDS)] * 3, trainer)
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def write(folder: Path, ids: Any = None, **changes: Any) -> Path:
    """Dream's official layout of a tokenizer: the class is code of the repository."""
    vocab, merges = vocabulary()
    ids = ids or range(len(vocab), len(vocab) + len(SPECIAL))
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(i): {"content": content} | token for i, content in zip(ids, SPECIAL, strict=True)}
    config: dict[str, Any] = {
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL[1:]),
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "tokenizer_class": "DreamTokenizer",
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "errors": "replace",
        "model_max_length": 131072,
        "chat_template": TEMPLATE,
    }
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    content = {key: value for key, value in (config | changes).items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def read(folder: Path) -> Any:
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text('{"model_type": "Dream"}')
    return load_tokenizer(Source(folder.name, folder))


def fails(message: str, act: Callable[[], Any]) -> None:
    with pytest.raises(sw.UserError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def mixed_texts(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)

    def drawn(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator))

    texts = []
    for number in range(count):
        text = "".join(WORDS[drawn(len(WORDS))] + " " * (drawn(3) == 0) for _ in range(1 + drawn(12)))
        texts.append(unicodedata.normalize(("NFC", "NFD")[number % 2], text) if number % 3 else text)
    return texts


def plain_bpe(text: str) -> list[int]:
    """Token ids by the definition: special tokens apart, NFC, pieces, and in each piece the earliest merge first."""
    vocab, merges = vocabulary()
    rank = {merge: i for i, merge in enumerate(merges)}
    ids: list[int] = []
    for part in regex.split("(" + "|".join(map(regex.escape, SPECIAL)) + ")", text):
        if part in SPECIAL:
            ids.append(len(vocab) + SPECIAL.index(part))
            continue
        for piece in regex.findall(PIECES, unicodedata.normalize("NFC", part)):
            word = [byte_letters()[byte] for byte in piece.encode()]
            while pairs := [pair for pair in pairwise(word) if pair in rank]:
                best, merged, i = min(pairs, key=rank.__getitem__), [], 0
                while i < len(word):
                    both = tuple(word[i : i + 2]) == best
                    merged.append("".join(best) if both else word[i])
                    i += 1 + both
                word = merged
            ids += [vocab[token] for token in word]
    return ids


def test_dreams_tokenizer_is_qwen2s_over_its_files(tmp_path: Path) -> None:
    """The ids of 1,000 mixed texts are those of the definition and of transformers' Qwen2; decoding gives them back."""
    tokenizer = read(write(tmp_path / "dream"))
    vocab, merges = vocabulary()
    qwen = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges, bos_token="<|beginoftext|>", mask_token="<|mask|>")
    qwen.add_tokens([transformers.AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    renumbered = {qwen.convert_tokens_to_ids(token): len(vocab) + i for i, token in enumerate(SPECIAL)}
    texts = mixed_texts(1000)
    for text, ids, theirs in zip(texts, tokenizer(texts)["input_ids"], qwen(texts)["input_ids"], strict=True):
        assert ids == plain_bpe(text)
        assert ids == [renumbered.get(token, token) for token in theirs]
        assert tokenizer.decode(ids) == qwen.decode(theirs)
        apart = [unicodedata.normalize("NFC", part) for part in regex.split(r"(<\|\w+\|>)", text)]
        assert tokenizer.decode(ids) == "".join(apart)


def test_dreams_special_tokens_and_template(tmp_path: Path) -> None:
    tokenizer = read(write(tmp_path / "dream"))
    n = len(vocabulary()[0])
    assert (tokenizer.mask_token_id, tokenizer.bos_token_id) == (n + 4, n + 3)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == n
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 131072)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("hello")["input_ids"][0] != tokenizer.bos_token_id
    kept = tokenizer.decode(tokenizer("hi<|mask|>")["input_ids"], skip_special_tokens=True)
    assert kept == "hi"


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
def test_a_template_beside_the_tokenizer(file: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "dream", chat_template=None)
    assert read(folder).chat_template is None
    (folder / file).write_text("{{ 1 }}" if file.endswith("jinja") else json.dumps({"chat_template": "{{ 1 }}"}))
    assert read(folder).chat_template == "{{ 1 }}"


def test_without_pointer_to_code_and_with_legacy_added_tokens(tmp_path: Path) -> None:
    """An exported folder has no auto_map; old ones keep the added tokens in a file of their own."""
    n = len(vocabulary()[0])
    folder = write(tmp_path / "dream", auto_map=None)
    assert read(folder)("hello<|mask|>")["input_ids"] == plain_bpe("hello<|mask|>")
    write(folder, added_tokens_decoder=None, additional_special_tokens=None)
    (folder / "added_tokens.json").write_text(json.dumps({token: n + i for i, token in enumerate(SPECIAL)}))
    assert read(folder)("hello <|mask|>")["input_ids"] == plain_bpe("hello <|mask|>")


def test_holes_in_the_added_tokens_are_refused(tmp_path: Path) -> None:
    n = len(vocabulary()[0])
    folder = write(tmp_path / "dream", ids=[n, n + 1, n + 2, n + 5, n + 6])
    fails(rf"'<\|beginoftext\|>' is {n + 5} in its files and would be {n + 3}", lambda: read(folder))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "merges.txt").unlink(), "lacks merges.txt"),
        (lambda f: (f / "vocab.json").rename(f / "vocabulary.json"), "lacks vocab.json"),
        (lambda f: (f / "vocab.json").write_text("[1"), "its tokenizer cannot be read"),
        (lambda f: (f / "merges.txt").write_text("he zz\n"), "its tokenizer cannot be read"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json cannot be read"),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), "holds no JSON object"),
        (lambda f: write(f, errors="strict"), "errors='strict'"),
    ],
)
def test_damaged_files_are_one_line(break_it: Any, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "dream")
    break_it(folder)
    fails(message, lambda: read(folder))


@pytest.mark.parametrize("mapped", [{"AutoTokenizer": ["tokenization_x.NovelTokenizer", None]}, None])
def test_other_tokenizers_that_are_code_are_refused(mapped: Any, tmp_path: Path) -> None:
    """Named by their class, with the way out; the file is never run, and its rules are not guessed."""
    folder = write(tmp_path / "novel", tokenizer_class="NovelTokenizer", auto_map=mapped)
    (folder / "tokenization_x.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    fails(r"code of its repository \(NovelTokenizer\).*--tokenizer NAME\|FOLDER", lambda: read(folder))
    assert not (tmp_path / "was_run").exists()


def test_settings_without_a_vocabulary_are_refused(tmp_path: Path) -> None:
    """transformers would build a tokenizer that reads every text as nothing."""
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    fails("none of tokenizer.json, .*copy those files too", lambda: read(tmp_path))


def dream_folder(folder: Path, mask: int | None = None, rows: int = 8) -> Path:
    """A tiny Dream as published: official config, weights, tokenizer in code of the repository."""
    write(folder)
    n = len(vocabulary()[0])
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"pad_token_id": n, "bos_token_id": n, "eos_token_id": n, "mask_token_id": mask or n + 4}
    config = DreamConfig(vocab_size=n + rows, num_key_value_heads=1, **sizes, **tokens)
    weights = {key: tensor.contiguous() for key, tensor in DreamModel(config).state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    code = {"auto_map": {"AutoModel": "modeling_dream.DreamModel"}}
    (folder / "config.json").write_text(json.dumps(config.to_official() | code))
    return folder


def test_an_official_dream_folder_loads(tmp_path: Path) -> None:
    model, tokenizer = sw.load(str(dream_folder(tmp_path / "dream")))
    assert tokenizer.mask_token_id == model.config.mask_token_id
    ids = tokenizer("hello <|mask|>", return_tensors="pt")["input_ids"]
    assert ids[0, -1] == model.config.mask_token_id
    assert sw.generate(model, ids, gen_length=0).sequences[0, -1] != model.config.mask_token_id


def test_the_tokens_must_be_the_models(tmp_path: Path) -> None:
    n = len(vocabulary()[0])
    fails(f"mask token {n + 4}, its model {n + 6}", lambda: sw.load(str(dream_folder(tmp_path / "a", mask=n + 6))))
    small = dream_folder(tmp_path / "b", rows=2)
    fails(f"the bos token {n + 3}, its model {n + 2} tokens", lambda: sw.load(str(small)))
    (words := tmp_path / "words").mkdir()
    write(words)
    fails(f"the token {n - 1}, its model 22 tokens; name another", lambda: sw.load("tiny-dllm", tokenizer=str(words)))


def test_a_mask_token_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    """MDLM's is right behind GPT-2's tokens; any other place says that the tokenizer is another model's."""
    n = len(vocabulary()[0])
    tokenizer = read(write(tmp_path / "words", mask_token=None))
    config = MDLMConfig(vocab_size=n + 6, hidden_dim=8, cond_dim=4, n_blocks=1, n_heads=1)
    check_tokenizer(tokenizer, config, "mdlm")
    config.vocab_size, config.mask_token_id = 10 * n, 9 * n
    fails("is no special one among them", lambda: check_tokenizer(tokenizer, config, "llada"))
    config.mask_token_id = tokenizer("a")["input_ids"][0]  # an ordinary token
    fails("is no special one among them", lambda: check_tokenizer(tokenizer, config, "llada"))


def test_the_mask_token_is_known_by_its_number(tmp_path: Path) -> None:
    """As in LLaDA's files, whose tokenizer holds the token and does not call it its mask."""
    folder = write(tmp_path / "llada", mask_token=None, tokenizer_class="Qwen2Tokenizer", auto_map=None)
    n = len(vocabulary()[0])
    (folder / "config.json").write_text(json.dumps({"model_type": "llada", "mask_token_id": n + 4}))
    assert read(folder).mask_token == "<|mask|>"


def test_an_added_token_beyond_the_model_is_of_no_harm(tmp_path: Path) -> None:
    """Gemma's text models have a token for images in their tokenizer and no row for it."""
    n = len(vocabulary()[0])
    tokenizer = read(write(tmp_path / "words", mask_token=None))
    check_tokenizer(tokenizer, transformers.Qwen2Config(vocab_size=n + 4), "text")
    fails(f"the bos token {n + 3}", lambda: check_tokenizer(tokenizer, transformers.Qwen2Config(vocab_size=n), "text"))


def test_another_tokenizer_by_name_folder_or_object(tmp_path: Path) -> None:
    """For a model that comes without one, and in the place of one that is code."""
    n = len(vocabulary()[0])
    folder, words = tmp_path / "model", write(tmp_path / "words")
    mdlm = MDLM(MDLMConfig(vocab_size=n + 5, hidden_dim=8, cond_dim=4, n_blocks=1, n_heads=1))
    folder.mkdir()
    save_file(mdlm.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(mdlm.config.to_official()))
    assert sw.load(str(folder))[1] is None
    _, named = sw.load(str(folder), tokenizer=str(words))
    assert named("hello")["input_ids"] == plain_bpe("hello")
    _, given = sw.load(str(folder), tokenizer=named)
    assert given is named
    _, embedded = sw.load("tiny-ar2dllm", tokenizer="tiny-dllm")
    assert embedded.get_vocab() == sw.load("tiny-dllm")[1].get_vocab()
    fails("Unknown model 'tiny-dlm'", lambda: sw.load("tiny-dllm", tokenizer="tiny-dlm"))
    fails("holds no tokenizer", lambda: sw.load("tiny-dllm", tokenizer=str(folder)))
    fails("is a file; name the folder", lambda: sw.load("tiny-dllm", tokenizer=str(words / "vocab.json")))


def test_chat_prompts(tmp_path: Path) -> None:
    tokenizer = read(write(tmp_path / "dream"))
    inputs = chat_prompts(tokenizer, ["hi", "hello world"], system="be brief")
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    texts = tokenizer.batch_decode(inputs["input_ids"])
    assert texts[1] == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n"
    )
    assert int(inputs["attention_mask"][0, 0]) == 0
    tokenizer.chat_template = None
    fails("no chat template", lambda: chat_prompts(tokenizer, ["hi"]))


def test_a_chat_with_a_masked_model(tmp_path: Path) -> None:
    """The documented two lines: the template's tensors go to `generate` as they are."""
    tokenizer = read(write(tmp_path / "words"))
    n = len(vocabulary()[0])
    model = LLaDAModelLM.from_dims(width=16, layers=2, heads=2, mlp=16, vocab=n + 5)
    messages = [{"role": "user", "content": "hello"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    out = sw.generate(model, **inputs, gen_length=4)
    assert out.sequences.shape == (1, inputs["input_ids"].shape[1] + 4)


def test_every_command_that_reads_texts_takes_a_tokenizer() -> None:
    """All commands that take a model and a dtype load it, but those that look at its shape alone."""
    import typer

    from skipwise import cli

    top = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    commands = top | {f"schedule {name}": command for name, command in top["schedule"].commands.items()}
    names = {name: {part for p in command.params for part in p.opts} for name, command in commands.items()}
    loading = {name for name, options in names.items() if "--dtype" in options} - {"inspect"}
    assert loading >= {"generate", "analyze", "plan", "eval", "judge", "bench", "heal", "schedule front"}
    assert {name for name, options in names.items() if "--tokenizer" in options} == loading | {"demo"}


def test_generate_takes_another_tokenizer_and_a_chat(skipwise: Any, tmp_path: Path) -> None:
    folder = dream_folder(tmp_path / "dream")
    length = ("--gen-length", 4)
    assert "<|im_start|>" not in skipwise("generate", folder, "hello", *length)[1]
    code, out, _ = skipwise("generate", folder, "hello", "--chat", "--system", "be brief", *length)
    assert code == 0
    assert not out.startswith("hello")  # the answer alone
    model, tokenizer = sw.load(str(folder))
    inputs = chat_prompts(tokenizer, ["hello"], "be brief")
    answer = sw.generate(model, **inputs, gen_length=4).sequences[0, inputs["input_ids"].shape[1] :]
    assert out.startswith(tokenizer.decode(answer, skip_special_tokens=True).splitlines()[0])
    code, _, err = skipwise("generate", "tiny-dllm", "s1=", "--chat", *length)
    assert (code, err.count("\n")) == (2, 1)
    assert "no chat template; leave out --chat" in err
    assert "--system is for a chat" in skipwise("generate", "tiny-dllm", "s1=", "--system", "x", *length)[2]
    code, _, err = skipwise("generate", "tiny-dllm", "s1=", "--tokenizer", folder, *length)
    assert (code, err.count("\n")) == (2, 1)
    assert "name another tokenizer" in err


@pytest.mark.parametrize("command", ["plan", "eval", "judge", "bench", "heal", "importance", "search", "front", "demo"])
def test_every_command_passes_its_tokenizer_on(skipwise: Any, command: str, tmp_path: Path, monkeypatch: Any) -> None:
    """A name that nothing is known by is told by each of them."""
    monkeypatch.chdir(tmp_path)
    model, words = sw.load("tiny-dllm")
    analysis = sw.analyze(model, words, [("s3141592=", "1123459")], noise_levels=1)
    sw.make_plan(analysis, skip=1).save("plan.json")
    analysis.save("analysis")
    lines = {
        "plan": ("plan", "analysis", "--method", "greedy", "--skip", 1, "--model", "tiny-dllm"),
        "eval": ("eval", "tiny-dllm"),
        "judge": ("judge", "tiny-dllm"),
        "bench": ("bench", "tiny-dllm"),
        "heal": ("heal", "plan.json", "tiny-dllm"),
        "importance": ("schedule", "importance", "tiny-dllm", "--plan", "plan.json"),
        "search": ("schedule", "search", "tiny-dllm", "--light", "plan.json", "--task", "sort", "--engine", "inline"),
        "front": ("schedule", "front", "tiny-dllm"),
        "demo": ("demo", "--model", "tiny-dllm"),
    }
    code, _, err = skipwise(*lines[command], "--tokenizer", "tiny-dlm")
    assert (code, err.count("\n")) == (2, 1), err
    assert "Unknown model 'tiny-dlm'. Did you mean 'tiny-dllm'" in err


def test_a_search_knows_its_tokenizer(tmp_path: Path) -> None:
    """Its name says nothing: what the files hold is part of what a stored trial depends on."""
    from skipwise.evaluation.tasks import ExactMatch
    from skipwise.scheduling.trials import Work

    tasks = (ExactMatch("sort", "calibration", 1, 0, 8),)
    assert "tokenizer" not in Work("tiny-dllm", tasks).identity()
    folder = write(tmp_path / "words")
    before = Work("tiny-dllm", tasks, tokenizer=str(folder)).identity()
    write(folder, chat_template="{{ 2 }}")
    assert Work("tiny-dllm", tasks, tokenizer=str(folder)).identity() != before
    assert Work("tiny-dllm", tasks, tokenizer="tiny-ar").open().tokenizer.get_vocab()["<mask>"]
