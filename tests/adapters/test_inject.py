"""LoRA put into real tiny models, compared with PEFT's own API and with the paper's formula in plain PyTorch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPTextModel, LlamaForCausalLM

from lorakit.adapters.delta import Delta
from lorakit.adapters.inject import (
    adapter_state,
    apply,
    fold,
    inject,
    load_adapter_state,
    lora_layers,
    set_scale,
)
from lorakit.adapters.outline import Outline
from lorakit.adapters.targets import Target, injection
from lorakit.errors import ModelError, RecipeError
from lorakit.recipe.schema import Adapter, LlamaAdapter
from tests.tiny import tiny_llama, tiny_sd

LLAMA = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "attention+mlp": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
UNET = {"attention": ("to_q", "to_k", "to_v", "to_out.0")}
TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder)


def disturb(model: nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    """Give every adapter tensor some value, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    state = {key: torch.randn(t.shape, generator=generator) * 0.3 + t for key, t in adapter_state(model).items()}
    load_adapter_state(model, state)
    return state


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_only_lora_is_trainable_and_float32(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    injection = inject(model, Adapter(rank=4, alpha=8), LLAMA, seed=0)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * len(injection.targets) == 2 * 2 * 4
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
    assert sum(p.numel() for p in trainable.values()) == sum(t.rank * (t.inputs + t.outputs) for t in injection.targets)
    assert model.model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_same_model_as_peft_itself(model: LlamaForCausalLM, folder: Path) -> None:
    adapter = Adapter(rank=4, alpha=6, rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"layers.1.*": 3})
    inject(model, adapter, LLAMA, seed=3)
    state = disturb(model)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        rank_pattern={"v_proj": 2},
        alpha_pattern={r"layers\.1\..*": 3},
    )
    other = get_peft_model(LlamaForCausalLM.from_pretrained(folder), config)
    names = dict(other.named_parameters())
    with torch.no_grad():
        for key, tensor in state.items():
            names[f"base_model.model.{key.removesuffix('.weight')}.default.weight"].copy_(tensor)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_formula(dora: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    inject(model, Adapter(rank=2, alpha=3, dora=dora, targets=["0"]), {}, seed=0)
    state = {key: tensor.double() for key, tensor in disturb(model).items()}
    layer = model[0].base_layer
    x = torch.randn(7, 6, dtype=torch.float64)
    weight = layer.weight.double() + 1.5 * state["0.lora_B.weight"] @ state["0.lora_A.weight"]
    if dora:
        weight = weight * (state["0.lora_magnitude_vector"] / weight.norm(dim=1))[:, None]
    expected = x @ weight.T + layer.bias.double()
    torch.testing.assert_close(model[0](x.float()).double(), expected, rtol=1e-5, atol=1e-5)


def test_initial_values(model: LlamaForCausalLM) -> None:
    state_before = torch.random.get_rng_state()
    before = logits(model)
    inject(model, Adapter(rank=8, dora=True), LLAMA, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state_before)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    state = adapter_state(model)
    a = torch.cat([t.flatten() for key, t in state.items() if key.endswith("lora_A.weight")])
    assert abs(a.std().item() * 8 - 1) < 0.05
    assert abs(a.mean().item()) < 0.01
    assert all(not t.any() for key, t in state.items() if key.endswith("lora_B.weight"))
    layer = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    norms = layer.get_base_layer().weight.double().norm(dim=1)
    torch.testing.assert_close(state["model.layers.0.self_attn.q_proj.lora_magnitude_vector"].double(), norms)


def test_seed_decides_alone(folder: Path) -> None:
    states = []
    for seed, noise in ((1, 10), (1, 20), (2, 10)):
        torch.manual_seed(noise)
        model = LlamaForCausalLM.from_pretrained(folder)
        inject(model, Adapter(rank=4, init="kaiming"), LLAMA, seed=seed)
        states.append(adapter_state(model)["model.layers.1.self_attn.o_proj.lora_A.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert states[0].abs().max() <= 32**-0.5


def test_targets(model: LlamaForCausalLM) -> None:
    outline = Outline.of(model)

    def chosen(**options: Any) -> tuple[Target, ...]:
        return injection(outline, LlamaAdapter(rank=4, **options), LLAMA).targets

    assert len(chosen(targets="attention+mlp")) == 14
    everything = chosen(targets="all-linear")
    assert len(everything) == 14
    assert all(target.name != "lm_head" for target in everything)
    one = chosen(targets=["layers.*.mlp.*"], layers=[1])
    assert [tuple(t) for t in one] == [
        ("model.layers.1.mlp.gate_proj", 32, 64, 4),
        ("model.layers.1.mlp.up_proj", 32, 64, 4),
        ("model.layers.1.mlp.down_proj", 64, 32, 4),
    ]


def test_an_outline_on_meta_is_enough_for_an_injection(sd: Path) -> None:
    config = UNet2DConditionModel.load_config(sd / "unet")
    with torch.device("meta"):
        empty = UNet2DConditionModel.from_config(config)
    outline = Outline.of(empty)
    planned = injection(outline, Adapter(rank=4), UNET).targets
    unet = UNet2DConditionModel.from_pretrained(sd / "unet")
    assert planned == inject(unet, Adapter(rank=4), UNET, seed=0).targets
    assert Outline.of(unet).layers == outline.layers
    assert Outline.from_table(json.loads(json.dumps(outline.as_table()))) == outline
    assert len(planned) == len(
        [n for n, _ in empty.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    )
    assert any(target.name.endswith("to_out.0") for target in planned)
    unet(torch.randn(1, 4, 16, 16), 5, torch.randn(1, 7, 32)).sample.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in unet.parameters())


def test_a_convolutions_change_has_the_rank_of_its_matrix(sd: Path) -> None:
    """[32, 4 * 3 * 3]: more than its 4 channels in."""
    unet = UNet2DConditionModel.from_pretrained(sd / "unet")
    assert inject(unet, Adapter(rank=32, targets=["conv_in"]), UNET, seed=0).targets[0].rank == 32
    with pytest.raises(RecipeError, match="rank 5 is more than a change of conv_out can have, 4"):
        inject(unet, Adapter(rank=5, targets=["conv_out"]), UNET, seed=0)


@pytest.mark.parametrize(
    ("adapter", "message", "hint"),
    [
        (Adapter(targets=["q_prj"]), "'q_prj' matches no layer", "q_proj"),
        (Adapter(rank=4, rank_pattern={"gate_proj": 2}), "'gate_proj' matches no layer", "o_proj"),
        (Adapter(rank=4, alpha_pattern={"k_pro": 2}), "'k_pro' matches no layer", "k_proj"),
        (
            Adapter(rank=17),
            "adapter.rank: rank 17 is more than a change of .*k_proj can have, 16",
            "adapter.rank_pattern",
        ),
        (Adapter(rank=4, rank_pattern={"k_proj": 17}), "adapter.rank_pattern: rank 17 is more than", "16 or less"),
        (LlamaAdapter(rank=4, layers=[2]), "layer 2: the model has 2", "counted from 0"),
        (LlamaAdapter(rank=4, layers=[]), "adapter.layers: no layer of the model is left", ""),
        (Adapter(rank=4, targets=["lm_head"]), "shares its weight", ""),
        (Adapter(rank=4, targets=[]), "no layer of the model is left", ""),
    ],
)
def test_refused(model: LlamaForCausalLM, adapter: Adapter, message: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        inject(model, adapter, LLAMA, seed=0)
    assert hint in caught.value.hint
    assert not lora_layers(model)


def test_state_round_trip(model: LlamaForCausalLM, folder: Path) -> None:
    adapter = Adapter(rank=4, dora=True)
    inject(model, adapter, LLAMA, seed=0)
    state = disturb(model)
    other = LlamaForCausalLM.from_pretrained(folder)
    inject(other, adapter, LLAMA, seed=9)
    load_adapter_state(other, state)
    assert torch.equal(logits(model), logits(other))
    key = "model.layers.0.self_attn.q_proj.lora_A.weight"
    for wrong, message in (
        ({k: t for k, t in state.items() if k != key}, "missing"),
        (state | {"x": torch.zeros(1)}, "no such tensor"),
        (state | {key: torch.zeros(3, 3)}, "shape"),
        (state | {key: torch.full_like(state[key], torch.nan)}, "NaN"),
    ):
        with pytest.raises(ModelError, match=message):
            load_adapter_state(other, wrong)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("rank", [2, 8])
def test_without_an_alpha_the_scale_is_one(model: LlamaForCausalLM, rank: int) -> None:
    made = inject(model, Adapter(rank=rank), LLAMA, seed=0)
    assert {made.scale(target) for target in made.targets} == {1.0}


def test_scale(model: LlamaForCausalLM) -> None:
    base = logits(model)
    inject(model, Adapter(rank=4, rslora=True), LLAMA, seed=0)
    disturb(model)
    full = logits(model)
    set_scale(model, 0.5)
    half = logits(model)
    set_scale(model, 1)
    assert torch.equal(logits(model), full)
    assert not torch.allclose(half, full)
    set_scale(model, 0)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("dora", [False, True])
def test_applied_is_as_trained_and_fold_keeps_it(model: LlamaForCausalLM, folder: Path, dora: bool) -> None:
    injection = inject(model, Adapter(rank=4, alpha=6, dora=dora), LLAMA, seed=0)
    state = disturb(model)
    deltas = {
        t.name: Delta(
            state[f"{t.name}.lora_A.weight"],
            state[f"{t.name}.lora_B.weight"],
            injection.scale(t),
            state[f"{t.name}.lora_magnitude_vector"] if dora else None,
        )
        for t in injection.targets
    }
    for weight in (1.0, 0.3):
        other = LlamaForCausalLM.from_pretrained(folder)
        apply(other, deltas, weight=weight, name="a")
        set_scale(model, weight)
        torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)
        assert not any(p.requires_grad for p in other.parameters())
        fold(other)
        assert not lora_layers(other)
        torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-4)


def test_several_adapters_add_up(sd: Path) -> None:
    text = CLIPTextModel.from_pretrained(sd / "text_encoder")
    generator = torch.Generator().manual_seed(0)
    path = "encoder.layers.0.self_attn.q_proj"
    first, second = (
        Delta(torch.randn(r, 32, generator=generator), torch.randn(32, r, generator=generator), 0.5) for r in (2, 3)
    )
    weight = text.get_submodule(path).weight.detach().clone()
    apply(text, {f"text_model.{path}": first}, weight=0.5, name="one")
    apply(text, {path: second}, weight=-2.0, name="two")
    fold(text)
    expected = weight.double() + 0.25 * first.B.double() @ first.A.double() - second.B.double() @ second.A.double()
    torch.testing.assert_close(text.get_submodule(path).weight.double(), expected, rtol=1e-5, atol=1e-5)


def test_apply_refuses_what_does_not_fit(model: LlamaForCausalLM) -> None:
    delta = Delta(torch.ones(2, 32), torch.ones(32, 2), 1.0)
    with pytest.raises(ModelError, match="no such module"):
        apply(model, {"model.layers.9.self_attn.q_proj": delta}, weight=1, name="a")
    with pytest.raises(ModelError, match="the base has"):
        apply(model, {"model.layers.0.self_attn.k_proj": delta}, weight=1, name="a")
    q = {"model.layers.0.self_attn.q_proj": delta}
    apply(model, q, weight=1, name="a")
    dora = {key: Delta(d.A, d.B, 1.0, torch.ones(32)) for key, d in q.items()}
    with pytest.raises(ModelError, match="DoRA"):
        apply(model, dora, weight=1, name="b")


def test_fold_refuses_overflow() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).half()
    apply(model, {"0": Delta(torch.full((1, 4), 300.0), torch.full((4, 1), 300.0), 1.0)}, weight=1, name="a")
    with pytest.raises(ModelError, match="overflows"):
        fold(model)
    assert lora_layers(model)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_base(kind: str) -> None:
    import bitsandbytes as bnb

    torch.manual_seed(0)
    plain = nn.Linear(64, 64, bias=False)
    new = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    new.load_state_dict(plain.state_dict())
    model = nn.Sequential(new.to("cpu"))
    x = torch.randn(3, 64)
    before = model(x).detach()
    inject(model, Adapter(rank=4, alpha=16, targets="all-linear"), {}, seed=0)
    state = disturb(model)
    change = x @ state["0.lora_A.weight"].T @ state["0.lora_B.weight"].T * 4
    torch.testing.assert_close(model(x) - before, change, rtol=1e-3, atol=1e-3)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ModelError, match="quantized"):
        fold(model)
