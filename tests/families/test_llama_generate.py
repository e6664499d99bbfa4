"""Generation against transformers' own, with adapters, and from a GGUF file."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.adapters.convert import convert
from lorakit.adapters.files import read_adapter
from lorakit.adapters.inject import adapter_state, inject
from lorakit.adapters.write import write_peft
from lorakit.data.chat import Message
from lorakit.errors import ModelError, NonFiniteError, RecipeError
from lorakit.families.llama.base import GROUPS, find_base
from lorakit.families.llama.generate import Settings, choose, open_chat
from lorakit.families.llama.library import load_model, load_tokenizer
from lorakit.families.place import Place
from lorakit.recipe.schema import Adapter, LlamaBase
from lorakit.storage.bases import resolve
from tests.tiny import tiny_llama

PLACE = Place(torch.device("cpu"), torch.float32)
QUESTION = [Message("user", "What does the function sorted do?")]
GREEDY = Settings(temperature=0, max_new_tokens=24)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base"), seed=4)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(base)
    injection = inject(model, Adapter(rank=4, alpha=8), GROUPS, seed=0)
    draw = torch.Generator().manual_seed(5)
    state = {key: torch.randn(value.shape, generator=draw) for key, value in adapter_state(model).items()}
    folder = tmp_path_factory.mktemp("adapter")
    write_peft(folder, state, injection, base_name=str(base), task="CAUSAL_LM")
    return folder


def test_greedy_answers_equal_transformers_generate(base):
    chat = open_chat(resolve(str(base)), (), PLACE)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    for prompt in (QUESTION, "The quick brown"):
        ids = torch.tensor([chat.renderer.prompt(prompt)])
        if not isinstance(prompt, str):
            rows = [{"role": "user", "content": QUESTION[0].content}]
            assert ids.tolist()[0] == tokenizer.apply_chat_template(rows, add_generation_prompt=True)["input_ids"]
        out = model.generate(ids, do_sample=False, max_new_tokens=24, attention_mask=torch.ones_like(ids))
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        answer = chat.answer(prompt, GREEDY)
        assert len(answer) > 20
        assert answer == expected
        assert "".join(chat.stream(prompt, GREEDY)) == answer


def test_the_end_of_an_answer_may_be_part_of_a_character(base):
    """Bytes that are not yet a character are told at the end as transformers tells them."""
    chat = open_chat(resolve(str(base)), (), PLACE)
    bytes_of_a_flag = chat.renderer.tokenizer("🇨🇭", add_special_tokens=False)["input_ids"][:-1]
    assert len(bytes_of_a_flag) > 4

    class Speller:
        rows, limit, ends = 1, 512, frozenset()

        def start(self, row, prompt):  # noqa: ARG002
            self.left = iter(bytes_of_a_flag)
            return self.step([0])[0]

        def step(self, tokens):  # noqa: ARG002
            return torch.nn.functional.one_hot(torch.tensor([next(self.left)]), 400).float()

    chat.decoder = Speller()
    expected = chat.renderer.tokenizer.decode(bytes_of_a_flag)
    answer = chat.answer(QUESTION, Settings(temperature=0, max_new_tokens=len(bytes_of_a_flag)))
    assert answer == expected
    assert answer.endswith("\N{REPLACEMENT CHARACTER}")


def test_answers_do_not_depend_on_what_is_answered_beside(base, adapter):
    chat = open_chat(resolve(str(base)), [(adapter, 1.0)], PLACE)
    prompts = [f"The quick {'brown ' * number}" for number in range(1, 20)]
    for settings in (GREEDY, Settings(temperature=1.0, top_p=0.9, seed=3, max_new_tokens=24)):
        together = [""] * len(prompts)
        numbers = []
        for number, piece in chat.answers(prompts, settings):
            together[number] += piece
            numbers.append(number)
        assert numbers == sorted(numbers)
        assert together == [chat.answer(prompt, settings) for prompt in prompts]
        assert len(set(together)) > 10


def test_answers_follow_the_seed(base):
    chat = open_chat(resolve(str(base)), (), PLACE)
    answers = [chat.answer(QUESTION, Settings(temperature=1.0, seed=seed, max_new_tokens=16)) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_adapters_change_answers_by_their_weight(base, adapter):
    location = resolve(str(base))
    plain = open_chat(location, (), PLACE).answer(QUESTION, GREEDY)
    assert open_chat(location, [(adapter, 0.0)], PLACE).answer(QUESTION, GREEDY) == plain
    once = open_chat(location, [(adapter, 1.0)], PLACE).answer(QUESTION, GREEDY)
    assert once != plain
    assert open_chat(location, [(adapter, 0.5), (adapter, 0.5)], PLACE).answer(QUESTION, GREEDY) == once


def test_the_answer_stops_at_the_chats_end(base, tmp_path, monkeypatch):
    """Whether it is the tokenizer's, or another one of the model's own."""
    folder, tokenizer = shutil.copytree(base, tmp_path / "base"), AutoTokenizer.from_pretrained(base)
    letter, other = (tokenizer(text)["input_ids"][0] for text in "ab")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [other]}))
    chat = open_chat(resolve(str(folder)), (), PLACE)
    for end in (tokenizer.eos_token_id, other):
        tokens = iter([letter, letter, end])
        monkeypatch.setattr("lorakit.families.llama.generate.choose", lambda *_, left=tokens: next(left, letter))
        assert chat.answer(QUESTION, GREEDY) == "aa"


def test_a_prompt_without_room_is_refused(base):
    chat = open_chat(resolve(str(base)), (), PLACE)
    with pytest.raises(ModelError, match="the model takes"):
        chat.answer("word " * 600, GREEDY)


def test_choice_obeys_its_limits():
    logits = torch.tensor([3.0, 2.0, 1.0, -1.0])
    probabilities = logits.softmax(-1)
    draw = torch.Generator().manual_seed(0)

    def chosen(**settings):
        return {choose(logits, Settings(**settings), draw) for _ in range(300)}

    assert chosen(temperature=0) == {0}
    assert chosen(temperature=1) == {0, 1, 2, 3}
    assert chosen(temperature=1, top_p=float(probabilities[:2].sum()) - 0.01) == {0, 1}
    assert chosen(temperature=1, top_p=0.0) == {0}
    assert chosen(temperature=1, min_p=float(probabilities[2] / probabilities[0]) + 0.01) == {0, 1}
    counts = np.bincount([choose(logits, Settings(temperature=2), draw) for _ in range(4000)], minlength=4) / 4000
    assert np.allclose(counts, (logits / 2).softmax(-1), atol=0.03)
    with pytest.raises(NonFiniteError):
        choose(torch.tensor([float("nan"), 1.0]), Settings(), draw)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_temperature_near_0_takes_the_likeliest(temperature: float) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 100
    assert choose(logits, Settings(temperature=temperature), torch.Generator()) == int(logits.argmax())


def write_gguf(path, base):
    """The tiny model as a float32 GGUF file: q and k rows in llama.cpp's order, byte-level BPE."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    bpe = tokenizer.backend_tokenizer
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if piece in tokenizer.all_special_tokens else 1 for piece in pieces])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]])
    for name in ("bos", "eos", "pad"):
        getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{name}_token_id"))
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_file_unpacks_once_to_a_folder_of_the_same_model(base, tmp_path, monkeypatch, dtype):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "tiny.gguf", base)
    location, folder = find_base(LlamaBase(model=str(file)), dtype)
    assert (location.path, folder.name, folder.layout) == (file, location.name, "transformers")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model = load_model(folder, Place(torch.device("cpu"), dtype), "none", attention="sdpa")
    text = "What does sorted do?<|im_end|> x"
    tokens = torch.tensor([load_tokenizer(folder)(text)["input_ids"]])
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokens.tolist()[0] == tokenizer(text)["input_ids"]
    assert load_tokenizer(folder).chat_template == tokenizer.chat_template
    state = plain.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
    written = {path: path.stat().st_mtime_ns for path in folder.path.iterdir()}
    again = find_base(LlamaBase(model=str(file)), dtype)
    assert again == (location, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.path.iterdir()} == written
    with pytest.raises(RecipeError, match="GGUF"):
        find_base(LlamaBase(model=str(file), quantization="nf4"), dtype)


def test_formats_and_weights_add_up_and_fuse(base, adapter, tmp_path):
    location = resolve(str(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    saved = read_adapter(adapter, {"model": model})
    convert(saved, tmp_path / "a.gguf", "gguf", models={"model": model}, base_name="")
    once = open_chat(location, [(adapter, 1.0)], PLACE)
    halves = [(adapter, 0.5), (tmp_path / "a.gguf", 0.5)]
    tokens = once.renderer.prompt(QUESTION)
    expected = once.decoder.start(0, tokens)
    for adapters, fuse in ((halves, False), (halves, True), ([(adapter, 1.0)], True)):
        chat = open_chat(location, adapters, PLACE, fuse=fuse)
        torch.testing.assert_close(chat.decoder.start(0, tokens), expected, rtol=1e-3, atol=1e-3)
