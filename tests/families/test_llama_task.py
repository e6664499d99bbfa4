"""The whole task on a tiny model: what the loop sees, and what PEFT makes of the saved adapter."""

import json
import math
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.adapters.inject import adapter_parameters
from lorakit.errors import ModelError, RecipeError
from lorakit.families.llama import generate
from lorakit.families.llama import task as llama
from lorakit.families.llama.plan import plan as plan_llama
from lorakit.families.place import Place
from lorakit.numerics.order import Layout
from lorakit.recipe.schema import Adapter, ChatData, LlamaAdapter, LlamaBase, LlamaSample
from lorakit.storage.bases import resolve
from tests.families.test_llama_plan import another
from tests.tiny import tiny_llama, tiny_sd

PLACE = Place(torch.device("cpu"), torch.float32)
WORDS = ["sorted", "reversed", "len", "sum", "min", "max", "abs", "all", "any", "zip", "map", "hash", "next", "iter"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("llama")
    tiny_llama(root / "base")
    rows = [
        {"conversations": [{"from": "human", "value": f"What does {w} do?"}, {"from": "gpt", "value": f"It is {w}."}]}
        for w in WORDS
    ]
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def load(folder, *, layout=None, place=PLACE, adapter=None, base=None, system="Be brief.", **data):
    return llama.load(
        LlamaBase(model=str(folder / "base"), **(base or {})),
        adapter or Adapter(rank=4),
        ChatData(train=[{"path": str(folder / "chats.jsonl")}], held_out=0.2, max_tokens=128, **data),
        LlamaSample(prompts=["What does len do?", "두 번째?"], max_new_tokens=6, system=system),
        layout or Layout(0, 4),
        place,
        learning_rate=2e-2,
    )


def mean_loss(task, split, batches):
    stream = task.batches(split, 0)
    chosen = [next(stream) for _ in range(batches)] if batches else list(stream)
    return sum(task.loss(b) for b in chosen) / sum(b.count for b in chosen)


def test_training_lowers_the_loss_of_rows_that_only_the_adapter_learns(folder):
    task = load(folder)
    before = {name: p.clone() for name, p in task.model.named_parameters() if not p.requires_grad}
    ((parameters, rate),) = task.parameter_groups()
    assert rate == 2e-2
    assert {id(p) for p in parameters} == {id(p) for p in task.model.parameters() if p.requires_grad}
    optimizer, stream = torch.optim.AdamW(parameters, lr=rate), task.batches("train", 0)
    with torch.no_grad():
        first = mean_loss(task, "held_out", 0).item()
    for _ in range(30):
        batch = next(stream)
        (task.loss(batch) / batch.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        last = mean_loss(task, "held_out", 0).item()
    assert last < first - 1
    assert task.metrics(last)["perplexity"] == pytest.approx(math.exp(last))
    for name, parameter in task.model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (tiny_llama, "attention_dropout"),
        (another("qwen3", head_dim=16), "attention_dropout"),
        (another("seed_oss", head_dim=16), "residual_dropout"),
    ],
    ids=["llama", "qwen3", "seed_oss"],
)
def test_a_base_that_drops_attention_out_learns_without_that(folder, tmp_path, make, field):
    config = make(tmp_path / "base") / "config.json"
    shutil.copy(folder / "chats.jsonl", tmp_path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: 0.5}))
    task = load(tmp_path)
    assert task.model.plain is (make is tiny_llama)
    batch, losses = next(task.batches("train", 0)), set()
    for training in (True, False):
        task.model.train(training)
        losses.add(task.loss(batch).item())
    assert len(losses) == 1


@pytest.mark.parametrize(("dropout", "sharing"), [(0.0, True), (0.1, False)])
def test_what_chats_begin_with_is_shared_only_where_nothing_is_dropped(folder, dropout, sharing):
    """Each chat has dropout masks of its own."""
    task = load(folder, adapter=Adapter(rank=4, dropout=dropout))
    shared, _ = next(task.batches("train", 0)).documents
    assert (shared > 0) is sharing


@pytest.mark.filterwarnings("default")  # dynamo's own
def test_compiled_blocks_give_the_same_loss_and_gradient(folder):
    """What inductor makes of the graphs is PyTorch's own matter."""
    task, found = load(folder), []
    batch = next(task.batches("train", 0))
    for _ in range(2):
        task.model.zero_grad()
        loss = task.loss(batch)
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in task.model.parameters() if p.requires_grad])))
        task.model.compile(backend="aot_eager")
    assert any(m._compiled_call_impl is not None for m in task.model.modules())
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    (_, plain), (_, compiled) = found
    assert (compiled - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_and_accumulation_give_the_same_gradient(folder, packing):
    def gradient(layouts):
        total = 0
        for layout, micro in layouts:
            task = load(folder, layout=layout, packing=packing)
            stream = task.batches("train", 0)
            for _ in range(micro):
                task.loss(next(stream)).backward()
            ((parameters, _),) = task.parameter_groups()
            total = total + torch.cat([p.grad.flatten() for p in parameters])
        return total

    whole = gradient([(Layout(0, 8), 1)])
    assert whole.abs().max() > 0
    for layouts in ([(Layout(0, 8, 8), 8)], [(Layout(0, 8, 1, rank, 2), 1) for rank in range(2)]):
        assert torch.allclose(gradient(layouts), whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_saved_adapter_is_what_peft_loads(folder, tmp_path):
    task = load(folder, adapter=Adapter(rank=4, alpha=8, targets="attention+mlp"))
    draw = torch.Generator().manual_seed(1)
    state = {k: torch.randn(v.shape, generator=draw) for k, v in task.adapter_state().items()}
    task.load_adapter_state(state)
    task.save(tmp_path, "name")
    plain = AutoModelForCausalLM.from_pretrained(folder / "base")
    peft = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    batch = next(task.batches("train", 0))
    examples = {example.where: example for example in task.chats.train}
    total = torch.zeros(())
    for name in batch.ids:
        tokens = torch.from_numpy(examples[name].tokens.astype("int64"))
        learned = torch.from_numpy(examples[name].labels)
        scores = peft(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
        total = total - scores.gather(1, tokens[1:, None])[learned[1:]].sum()
    assert task.loss(batch).item() == pytest.approx(total.item(), rel=1e-4)


def test_state_goes_round_and_a_wrong_one_is_refused(folder):
    task = load(folder)
    state = {key: value + 1 for key, value in task.adapter_state().items()}
    task.load_adapter_state(state)
    assert all(torch.equal(task.adapter_state()[key], value) for key, value in state.items())
    state.pop(next(iter(state)))
    with pytest.raises(ModelError, match="missing"):
        task.load_adapter_state(state)


def test_plain_text_is_sampled_as_it_is_learned(folder, tmp_path):
    """A base without a chat template is what most texts are trained on."""
    folder = shutil.copytree(folder, tmp_path / "texts")
    (folder / "base/chat_template.jinja").unlink()
    (folder / "chats.jsonl").write_text("".join(json.dumps({"text": f"It is {w}."}) + "\n" for w in WORDS))
    with pytest.raises(RecipeError, match="no system message"):
        load(folder)
    task = load(folder, system=None)
    task.model.eval()
    task.sample(tmp_path)
    (first, _) = (json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines())
    chat = generate.open_chat(resolve(str(folder / "base")), [], PLACE, chat_template=None, fuse=False)
    assert first["answer"] == chat.answer(first["prompt"], generate.Settings(max_new_tokens=6, temperature=0))
    assert task.generate_options == ("--raw",)


def test_sample_answers_are_repeatable_and_leave_the_model_training(folder, tmp_path):
    task = load(folder)
    task.model.train()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        task.sample(tmp_path / name)
    rows = [json.loads(line) for line in (tmp_path / "a" / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["What does len do?", "두 번째?"]
    assert (tmp_path / "a" / "answers.jsonl").read_bytes() == (tmp_path / "b" / "answers.jsonl").read_bytes()
    assert "**두 번째?**" in (tmp_path / "a" / "answers.md").read_text()
    assert task.model.lm.training
    assert math.isfinite(mean_loss(task, "train", 1).item())


def test_hashes_follow_the_data_and_the_base(folder, tmp_path):
    task = load(folder)
    assert task.fingerprint.digest == load(folder).fingerprint.digest
    other = load(folder, chat_template="chatml", on_bad="skip", layout=Layout(1, 4))
    assert task.fingerprint.digest != other.fingerprint.digest
    assert task.steps_per_epoch == len(task.chats.train) / 4
    other = tiny_llama(tmp_path / "base", seed=1)
    (tmp_path / "chats.jsonl").write_bytes((folder / "chats.jsonl").read_bytes())
    assert load(tmp_path).base_id.split()[1] != task.base_id.split()[1]
    assert other.name in task.base_id


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_bases_train(folder, quantization):
    task = load(folder, base={"quantization": quantization})
    kinds = {type(m).__name__ for m in task.model.modules()}
    assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantization] in kinds
    loss = mean_loss(task, "train", 1)
    loss.backward()
    gradients = [p.grad for p in adapter_parameters(task.model.lm).values()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert max(g.abs().max() for g in gradients) > 0
    assert loss.item() == pytest.approx(mean_loss(load(folder), "train", 1).item(), rel=0.1)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_an_adapter_answers_over_the_weights_that_it_was_trained_over(folder, tmp_path, quantization):
    task = load(folder, base={"quantization": quantization})
    with torch.no_grad():
        for parameter in adapter_parameters(task.model.lm).values():
            parameter.normal_(std=0.3)
    task.save(tmp_path, "run")
    tokens = torch.tensor([[1, 5, 9, 3]])
    task.model.eval()
    task.model.lm.set_attn_implementation("eager")
    expected = task.model.lm(tokens).logits
    base, adapters = resolve(str(folder / "base")), [(tmp_path / "adapter", 1.0)]
    chat = generate.open_chat(base, adapters, PLACE, quantization=quantization)
    found = chat.decoder.start(0, tokens[0].tolist())
    torch.testing.assert_close(found, expected[0, -1], atol=1e-4, rtol=1e-4)
    plain = generate.open_chat(base, adapters, PLACE).decoder.start(0, tokens[0].tolist())
    assert (plain - found).abs().max() > 1e-3, "the quantized base is another one"
    assert task.generate_options == ("--quantization", quantization)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_an_answer_in_between_does_not_end_the_training_of_a_quantized_base(folder, quantization):
    def gradients(answer_first):
        task = load(folder, base={"quantization": quantization})
        if answer_first:
            task.model.eval()
            with torch.inference_mode():
                task.model.lm(torch.tensor([[1, 2, 3]]))
        task.model.train()
        mean_loss(task, "train", 1).backward()
        return [p.grad for p in adapter_parameters(task.model.lm).values()]

    for before, after in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(after, before)


def test_bfloat16_base_keeps_a_float32_adapter(folder):
    task = load(folder, place=Place(torch.device("cpu"), torch.bfloat16, gradient_checkpointing=True))
    task.model.train()
    loss = mean_loss(task, "train", 1)
    loss.backward()
    assert loss.dtype == torch.float32
    assert {p.dtype for p in adapter_parameters(task.model.lm).values()} == {torch.float32}
    assert loss.item() == pytest.approx(mean_loss(load(folder), "train", 1).item(), rel=0.02)


def test_what_cannot_be_trained_is_said(folder, tmp_path):
    with pytest.raises(RecipeError, match="more than the 512 tokens"):
        llama.load(
            LlamaBase(model=str(folder / "base")), Adapter(), ChatData(train=[{"path": str(folder / "chats.jsonl")}]),
            LlamaSample(), Layout(0, 4), PLACE, learning_rate=1e-3,
        )  # fmt: skip
    with pytest.raises(RecipeError, match="lm_head"):
        load(folder, adapter=Adapter(rank=4, targets=["lm_head", "q_proj"]))
    tiny_sd(tmp_path / "base")
    (tmp_path / "chats.jsonl").write_bytes((folder / "chats.jsonl").read_bytes())
    with pytest.raises(ModelError, match="Stable Diffusion"):
        load(tmp_path)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(folder, tmp_path):
    tiny_llama(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens([f"extra{n}" for n in range(9)])
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "chats.jsonl").write_bytes((folder / "chats.jsonl").read_bytes())
    with pytest.raises(ModelError, match="embeddings"):
        load(tmp_path)


def test_the_plan_counts_what_loading_makes(folder):
    adapter = LlamaAdapter(rank=4, dora=True, targets="attention+mlp", layers=[1], rank_pattern={"down_proj": 2})
    data = ChatData(train=[{"path": str(folder / "chats.jsonl")}], held_out=0.2, max_tokens=128)
    plan = plan_llama(LlamaBase(model=str(folder / "base")), adapter, data, LlamaSample(), Layout(0, 4), PLACE)
    task = load(folder, adapter=adapter)
    trainable = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    assert plan.trainable_parameters == trainable
    assert plan.total_parameters == sum(p.numel() for p in task.model.parameters()) - trainable
    assert [m.name for m in plan.modules] == [t.name for t in task._loaded.injection.targets]
    assert plan.memory["base weights"] == plan.total_parameters * 4
    assert plan.memory["adapter"] == trainable * 4
    assert plan.chats.fingerprint().digest == task.fingerprint.digest
    assert 0 < plan.chats.label_share < 1
    base = LlamaBase(model=str(folder / "base"), quantization="nf4")
    small = plan_llama(base, adapter, data, LlamaSample(), Layout(0, 4), PLACE)
    assert small.memory["base weights"] < plan.memory["base weights"]
