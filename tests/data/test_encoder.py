"""Tokenizers in their bounded process: the same tokens as transformers gives, and an end to hostile ones."""

import gc
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lorakit.data.encoder import Encoder, check_loads
from lorakit.errors import DataError, ModelError
from tests.tiny import LINES, tiny_clip_tokenizer, tiny_tokenizer

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def fast(tokenizer: Tokenizer, trainer: Any) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def gpt4() -> PreTrainedTokenizerFast:
    """LLaMA 3's and Qwen's way: a pattern, then bytes; its file asks for truncation, and adds a BOS."""
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(GPT4), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], initial_alphabet=alphabet)
    found = fast(made, trainer)
    found.add_tokens([AddedToken("<|mark|>", special=True), AddedToken("fox", lstrip=True, single_word=True)])
    found.backend_tokenizer.post_processor = processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 1)])
    found.backend_tokenizer.enable_truncation(7)
    found.backend_tokenizer.enable_padding(length=50)
    return found


def llama2() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    return fast(made, trainers.BpeTrainer(vocab_size=500, special_tokens=pieces))


def unigram() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    return fast(made, trainer)


def split_marks() -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.split_special_tokens = True
    return made


KINDS: dict[str, Callable[[], Any]] = {
    "bytes": tiny_tokenizer,
    "a pattern": gpt4,
    "sentencepiece": llama2,
    "unigram": unigram,
    "clip": tiny_clip_tokenizer,
    "special tokens split": split_marks,
}
ODD = [
    "",
    " ",
    "\n\n\t  ",
    "<|im_start|>user\n<|im_end|>",
    "a <|mark|>  fox, foxes\r\n",
    "café ﬁ ½ 한국어 🙂\u200d👩 \u200b\0x",
    "İ" * 9,
]


@pytest.mark.parametrize("kind", KINDS)
def test_gives_transformers_tokens_and_places(kind: str) -> None:
    tokenizer, draw = KINDS[kind](), random.Random(0)
    pieces = [*LINES, *ODD, *"aZ 9.,é한🙂\n"]
    texts = [*ODD, *LINES, *("".join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in range(200))]
    encoder = Encoder(tokenizer)
    for text in texts:
        expected = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens, places = encoder.encode(text)
        assert tokens.tolist() == expected["input_ids"], text
        assert list(map(tuple, places.tolist())) == expected["offset_mapping"], text


def replaced(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def hostile(part: str, value: Any) -> PreTrainedTokenizerFast:
    rules = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps({**rules, part: value})))
    made.name_or_path = "some/model"
    return made


SLOW = ("a" * 23 + "!") * 500
"""Each letter costs (a+)+$ millions of steps, just fewer than the library's own limit."""
SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
HOSTILE = {
    "a pattern that never ends": ("pre_tokenizer", SPLIT, SLOW, "took more than"),
    "a replacement that never ends": ("normalizer", replaced("(a+)+$", "b"), SLOW, "took more than"),
    "a pattern that panics": ("pre_tokenizer", SPLIT, "a" * 60 + "!", "retry-limit-in-match over"),
    "replacements that grow": (
        "normalizer",
        {"type": "Sequence", "normalizers": [replaced("a", "a" * 1000)] * 5},
        "a",
        "took more than",
    ),
}  # fmt: skip


@pytest.mark.fault(32)
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_one_is_stopped_and_the_next_text_is_encoded(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    part, value, text, told = HOSTILE[name]
    encoder = Encoder(hostile(part, value))
    with pytest.raises(ModelError, match=told) as caught:
        encoder.encode(text)
    assert caught.value.where == "some/model/tokenizer.json"
    assert len(encoder.encode("fine")[0])
    assert capfd.readouterr().err == ""


def test_half_a_surrogate_pair_is_the_datas_fault() -> None:
    with pytest.raises(DataError, match=r"half a surrogate pair, '\\ud83d'"):
        Encoder(tiny_tokenizer()).encode("a \ud83d b")


def saved(folder: Path, **changes: Any) -> Path:
    tiny_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.usefixtures("impatient")
def test_one_that_takes_too_long_to_load(tmp_path: Path) -> None:
    """Added tokens go through the normalizer as it is loaded."""
    tokens = json.loads(saved(tmp_path).read_text())["added_tokens"]
    added = {**tokens[0], "id": 5000, "content": SLOW, "normalized": True, "special": False}
    path = saved(tmp_path, normalizer=replaced("(a+)+$", "b"), added_tokens=[*tokens, added])
    with pytest.raises(ModelError, match="took more than") as caught:
        check_loads(path)
    assert caught.value.where == str(path)


SOUND = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}


def test_decoders_that_are_hostile_and_such_that_are_not(tmp_path: Path) -> None:
    growing = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    for bad in (replaced("(a+)+$", "b"), growing, {"type": "Sequence", "decoders": [SOUND, growing]}):
        with pytest.raises(ModelError, match="its decoder replaces"):
            check_loads(saved(tmp_path, decoder=bad))
    for sound in (SOUND, {"type": "Sequence", "decoders": [SOUND, {"type": "Fuse"}]}, None, {"type": "ByteLevel"}):
        check_loads(saved(tmp_path, decoder=sound))


def test_its_process_ends_with_it() -> None:
    before = {child.pid for child in psutil.Process().children()}
    encoder = Encoder(tiny_tokenizer())
    encoder.encode("a")
    assert len({child.pid for child in psutil.Process().children()} - before) == 1
    del encoder
    gc.collect()
    assert {child.pid for child in psutil.Process().children()} <= before
