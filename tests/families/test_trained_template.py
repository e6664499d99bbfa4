"""The chat template that a recipe names goes with the adapter: into generation, merges and other formats."""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from lorakit.adapters.combine import combine
from lorakit.adapters.convert import convert
from lorakit.adapters.files import read_adapter
from lorakit.adapters.merging.merge import merge
from lorakit.adapters.merging.plan import plan_merge
from lorakit.commands.merge import Options, run
from lorakit.data.chat import Message
from lorakit.errors import ModelError
from lorakit.families.llama import task as llama
from lorakit.families.llama.generate import Settings, open_chat
from lorakit.families.llama.skeleton import open_language_model, skeleton
from lorakit.families.place import Place
from lorakit.numerics.order import Layout
from lorakit.recipe.schema import Adapter, ChatData, LlamaBase, LlamaSample
from lorakit.storage.bases import resolve
from tests.tiny import tiny_llama

PLACE = Place(torch.device("cpu"), torch.float32)
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base") / "base")


def adapter(base: Path, folder: Path, template: str | None) -> Path:
    """An adapter as a run leaves it, whose recipe names a file with ``template``."""
    folder.mkdir()
    chat = [*MESSAGES, {"role": "assistant", "content": "there"}]
    (folder / "chats.jsonl").write_text(f"{json.dumps({'messages': chat})}\n")
    source = folder / "own.jinja"
    source.write_text(template or "")
    named = str(source) if template else None
    table = {"train": [{"path": str(folder / "chats.jsonl")}], "held_out": 0, "max_tokens": 64, "chat_template": named}
    data, sample, layout = ChatData.model_validate(table), LlamaSample(), Layout(seed=0, batch_size=1)
    task = llama.load(LlamaBase(model=str(base)), Adapter(rank=2), data, sample, layout, PLACE, learning_rate=1e-3)
    source.unlink()
    task.save(folder, "run")
    return folder / "adapter"


def rendered(folder: Path, **more: Any) -> str:
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True, **more
    )
    assert isinstance(text, str)
    return text


def asked(base: Path, adapters: list[Path], **more: Any) -> str:
    """What a language model is asked, as text."""
    chat = open_chat(resolve(str(base)), [(path, 1.0) for path in adapters], PLACE, **more)
    return str(chat.renderer.tokenizer.decode(chat.renderer.prompt([Message("user", "hello")])))


def merged(base: Path, adapters: list[Path], out: Path) -> Path:
    location = resolve(str(base))
    merge(plan_merge(location, open_language_model(location), [(path, 1.0) for path in adapters], out))
    return out


def test_generation_asks_as_training_did(base: Path, tmp_path: Path) -> None:
    trained, plain = adapter(base, tmp_path / "a", TEMPLATE), adapter(base, tmp_path / "b", None)
    assert (trained / "chat_template.jinja").read_text() == TEMPLATE
    assert not (plain / "chat_template.jinja").exists()
    assert asked(base, [plain]) == rendered(base)
    assert asked(base, [plain, trained]) == rendered(base, chat_template=TEMPLATE) == "user: hello\n"
    assert asked(base, [trained], chat_template="chatml") == rendered(base)


def test_a_merged_model_has_it(base: Path, tmp_path: Path) -> None:
    trained, plain = adapter(base, tmp_path / "a", TEMPLATE), adapter(base, tmp_path / "b", None)
    assert rendered(merged(base, [trained], tmp_path / "one")) == "user: hello\n"
    assert rendered(merged(base, [plain], tmp_path / "other")) == rendered(base)


def test_of_two_the_first_is_taken_with_a_warning(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    both = [adapter(base, tmp_path / "a", TEMPLATE), adapter(base, tmp_path / "b", f"{TEMPLATE}!")]
    with caplog.at_level(logging.WARNING):
        assert rendered(merged(base, both, tmp_path / "out")) == "user: hello\n"
    assert "2 different chat templates" in caplog.text


def test_other_formats_carry_it(base: Path, tmp_path: Path) -> None:
    models = skeleton(resolve(str(base)))
    path = adapter(base, tmp_path / "a", TEMPLATE)
    for to, name in (("gguf", "a.gguf"), ("peft", "b")):
        convert(read_adapter(path, models), tmp_path / name, to, models=models, base_name=str(base))  # type: ignore[arg-type]
        path = tmp_path / name
    assert (path / "chat_template.jinja").read_text() == TEMPLATE


def test_several_as_one_adapter_carry_the_first_ones(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = [adapter(base, tmp_path / "a", TEMPLATE), adapter(base, tmp_path / "b", f"{TEMPLATE}!")]
    with caplog.at_level(logging.WARNING):
        told = combine([(read_adapter(path), 0.5) for path in both])
    convert(told, tmp_path / "out", "peft", models=skeleton(resolve(str(base))), base_name=str(base))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert "2 different chat templates" in caplog.text


def with_tokens(base: Path, path: Path, *tokens: str) -> Path:
    """The adapter's folder with the base's tokenizer and more tokens beside it, as TRL and others leave it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def roomy(tmp_path: Path) -> Path:
    """A base with more embeddings than tokens, as Qwen's and LLaMA 3's have."""
    folder = tiny_llama(tmp_path / "roomy")
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(448)
    model.save_pretrained(folder)
    return folder


def test_tokens_of_the_adapters_own_come_along(roomy: Path, tmp_path: Path) -> None:
    trained = with_tokens(roomy, adapter(roomy, tmp_path / "a", TEMPLATE.replace("user", "<|user|>")), "<|user|>")
    plain = with_tokens(roomy, adapter(roomy, tmp_path / "b", None))
    text = "<|user|>hello"
    expected = AutoTokenizer.from_pretrained(trained)(text)["input_ids"]
    assert expected[0] == 400
    chat = open_chat(resolve(str(roomy)), [(plain, 1.0), (trained, 1.0)], PLACE)
    assert chat.renderer.prompt(text) == expected
    out = merged(roomy, [plain, trained], tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out)(text)["input_ids"] == expected
    assert asked(out, []) == asked(roomy, [trained])
    for one in (plain, adapter(roomy, tmp_path / "c", None)):
        chat = open_chat(resolve(str(roomy)), [(one, 1.0)], PLACE)
        assert chat.renderer.prompt(text) == AutoTokenizer.from_pretrained(roomy)(text)["input_ids"] != expected


def test_tokens_that_do_not_go_together_are_refused(base: Path, roomy: Path, tmp_path: Path) -> None:
    one, other = (with_tokens(roomy, adapter(roomy, tmp_path / name, None), f"<{name}>") for name in "ab")
    with pytest.raises(ModelError, match="the adapters add different tokens"):
        open_chat(resolve(str(roomy)), [(one, 1.0), (other, 1.0)], PLACE)
    with pytest.raises(ModelError, match="the adapters add different tokens"):
        merged(roomy, [one, other], tmp_path / "out")
    narrow = with_tokens(base, adapter(base, tmp_path / "c", None), "<c>")
    with pytest.raises(ModelError, match="goes up to token 400, the model has 400 embeddings"):
        open_chat(resolve(str(base)), [(narrow, 1.0)], PLACE)
    with pytest.raises(ModelError, match="goes up to token 400, the model has 400 embeddings"):
        merged(base, [narrow], tmp_path / "out")
    rules = json.loads((one / "tokenizer.json").read_text())
    rules["added_tokens"][0]["id"] = 7
    (one / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(ModelError, match="is token 7, of the base token 0"):
        merged(roomy, [one], tmp_path / "out")
    (one / "tokenizer.json").write_text("[]")
    with pytest.raises(ModelError, match="not readable as a tokenizer"):
        merged(roomy, [one], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for", "unexpected 'end of template'"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute"),
        ("nothing", "leaves an assistant"),
    ],
)
def test_a_template_that_will_not_do_is_the_adapters_fault(
    base: Path, tmp_path: Path, template: str, told: str
) -> None:
    trained = adapter(base, tmp_path / "a", TEMPLATE)
    (trained / "chat_template.jinja").write_text(template)
    chat = open_chat(resolve(str(base)), [(trained, 1.0)], PLACE)
    with pytest.raises(ModelError, match=told) as caught:
        chat.answer([Message("user", "hello")], Settings(max_new_tokens=1))
    assert str(trained) in caught.value.where
    options = Options(verify=False)
    with pytest.raises(ModelError, match=told) as caught:
        run(str(base), [str(trained)], tmp_path / "out", options)
    assert str(trained) in caught.value.where
    assert not (tmp_path / "out").exists()
    other = open_chat(resolve(str(base)), [(trained, 1.0)], PLACE, chat_template="chatml")
    greedy = Settings(temperature=0, max_new_tokens=8)
    assert chat.answer("raw", greedy) == other.answer("raw", greedy) != ""


def test_the_receipt_names_it(base: Path, tmp_path: Path) -> None:
    trained = adapter(base, tmp_path / "a", TEMPLATE)
    receipt = (merged(base, [trained], tmp_path / "one") / "merge_receipt.json").read_text()
    assert hashlib.sha256(TEMPLATE.encode()).hexdigest() in receipt


def test_a_link_out_of_the_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    trained = adapter(base, tmp_path / "a", TEMPLATE)
    (tmp_path / "secret").write_text("a password")
    (trained / "chat_template.jinja").unlink()
    (trained / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="a link out of"):
        read_adapter(trained)


def test_a_template_that_is_no_text_is_refused(base: Path, tmp_path: Path) -> None:
    trained = adapter(base, tmp_path / "a", TEMPLATE)
    (trained / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"chat_template\.jinja: not readable as text"):
        read_adapter(trained)


def test_a_padding_token_without_an_embedding_is_left_out(base: Path, tmp_path: Path) -> None:
    """Old trainers added one to LLaMA 2's tokenizer, and saved no embedding for it."""
    padded = with_tokens(base, adapter(base, tmp_path / "padded", None), "[PAD]")
    config = padded / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": "[PAD]"}))
    text = "What is [PAD]?"
    expected = AutoTokenizer.from_pretrained(base)(text)["input_ids"]
    chat = open_chat(resolve(str(base)), [(padded, 1.0)], PLACE)
    assert chat.renderer.prompt(text) == expected
    out = merged(base, [padded], tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out)(text)["input_ids"] == expected


def test_a_bases_own_special_token_without_an_embedding_is_left_out(base: Path, tmp_path: Path) -> None:
    """As Gemma 3's token for pictures in its models of text alone."""
    folder = shutil.copytree(base, tmp_path / "base")
    with_tokens(base, folder, "<image_soft_token>")
    text = "See <image_soft_token>."
    chat = open_chat(resolve(str(folder)), [], PLACE)
    assert chat.renderer.prompt(text) == AutoTokenizer.from_pretrained(base)(text)["input_ids"]
    template = AutoTokenizer.from_pretrained(folder)
    template.chat_template += "{# 꾸 #}<image_soft_token>"
    template.save_pretrained(folder)
    with pytest.raises(ModelError, match="goes up to token 400"):
        open_chat(resolve(str(folder)), [], PLACE)
