"""``LoraLinear`` computes what PEFT's own layer computes."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import nn

from lorakit.adapters.delta import Delta
from lorakit.adapters.inject import apply, inject, lora_layers, set_scale
from lorakit.adapters.linear import LoraLinear, LoraLinear4bit, LoraLinear8bit, all_of, plain_layers
from lorakit.recipe.schema import Adapter

GROUPS = {"attention": ("0", "2"), "attention+mlp": ("0", "2")}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 7, bias=False)).double()


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    """The same network and adapter by lorakit's layers and by PEFT's, in float64."""
    ours = network()
    inject(ours, Adapter.model_validate({"rank": 3, "alpha": 6, **options}), GROUPS, seed=1)
    theirs = network().requires_grad_(False)
    dora = options.get("dora", False)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], use_dora=dora)
    inject_adapter_in_model(config, theirs)
    torch.manual_seed(2)
    mine, other = lora_layers(ours), lora_layers(theirs)
    assert {type(layer) for layer in mine.values()} == {LoraLinear}
    assert {type(layer) for layer in other.values()} == {Linear}
    for path, layer in mine.items():
        for name in ("lora_A", "lora_B"):
            weight = getattr(layer, name)["default"].weight
            weight.data = torch.randn_like(weight.double())
            getattr(other[path], name)["default"].weight.data = weight.data.clone()
        if dora:
            magnitude = layer.lora_magnitude_vector["default"].weight
            magnitude.data = magnitude.data.double() * 1.1
            other[path].lora_magnitude_vector["default"].weight.data = magnitude.data.clone()
    return ours, theirs


@pytest.mark.parametrize("dora", [False, True])
def test_output_and_gradients_are_pefts(dora: bool) -> None:
    ours, theirs = pair(dora=dora)
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(grads) == (6 if dora else 4)
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, grads[name])


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"dropout": 0.4}, {"rank_pattern": {"0": 2}}])
def test_layers_of_one_input_are_each_pefts(options: dict[str, Any]) -> None:
    """Two with LoRA and one without it; PEFT drops in the order of the layers, as they do."""
    torch.manual_seed(0)
    fans = [nn.ModuleList([nn.Linear(12, 9), nn.Linear(12, 7), nn.Linear(12, 5, bias=False)]).double()]
    fans.append(copy.deepcopy(fans[0]).requires_grad_(False))
    inject(fans[0], Adapter.model_validate({"rank": 3, "alpha": 6, "targets": ["0", "2"], **options}), {}, seed=1)
    dora, dropout = options.get("dora", False), options.get("dropout", 0.0)
    patterns = options.get("rank_pattern", {})
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], use_dora=dora, lora_dropout=dropout,
                        rank_pattern=patterns)  # fmt: skip
    inject_adapter_in_model(config, fans[1])
    for path, theirs in lora_layers(fans[1]).items():
        ours = lora_layers(fans[0])[path]
        for name in ("lora_A", "lora_B"):
            weight = getattr(ours, name)["default"].weight
            weight.data = torch.randn_like(weight.double())
            getattr(theirs, name)["default"].weight.data = weight.data.clone()
        if dora:
            theirs.lora_magnitude_vector["default"].weight.data *= 1.1
            ours.lora_magnitude_vector["default"].weight.data = theirs.lora_magnitude_vector[
                "default"
            ].weight.data.clone()
    found = []
    for fan, run in ((fans[0], all_of), (fans[1], lambda layers, x: tuple(layer(x) for layer in layers))):
        x = torch.randn(4, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(2)
        ys = run([*fan], x)
        sum(y.square().sum() for y in ys).backward()
        grads = {name: p.grad for name, p in fan.named_parameters() if p.grad is not None}
        assert len(grads) == (6 if dora else 4)
        found.append((*ys, x.grad, *(grads[name] for name in sorted(grads))))
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_at_scale_0_there_is_no_adapter() -> None:
    ours, _ = pair()
    x = torch.randn(5, 12, dtype=torch.float64)
    set_scale(ours, 0.0)
    torch.testing.assert_close(ours(x), network()(x))


def test_two_adapters_add_up() -> None:
    torch.manual_seed(4)
    model, x = network(), torch.randn(5, 12, dtype=torch.float64)
    deltas = [Delta(torch.randn(2, 12), torch.randn(9, 2), 0.5, None) for _ in range(2)]
    for number, delta in enumerate(deltas):
        apply(model, {"0": delta}, weight=1.0, name=f"a{number}")
    wanted = network()
    with torch.no_grad():
        for delta in deltas:
            wanted[0].weight += (delta.scale * delta.B @ delta.A).double()
    torch.testing.assert_close(model(x), wanted(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("kind", "own", "pefts", "dora"), [
    ("nf4", LoraLinear4bit, Linear4bit, False),
    ("nf4", LoraLinear4bit, Linear4bit, True),
    ("int8", LoraLinear8bit, Linear8bitLt, False),
])  # fmt: skip
def test_over_quantized_weights_too(kind: str, own: type, pefts: type, dora: bool) -> None:
    import bitsandbytes as bnb

    torch.manual_seed(0)
    plain = nn.Linear(64, 48)
    new: Any = bnb.nn.Linear4bit(64, 48, quant_type="nf4", compute_dtype=torch.float32)
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    new.load_state_dict(plain.state_dict())
    model: Any = nn.Sequential(new.to("cpu"))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"  # as transformers marks them
    inject(model, Adapter(rank=4, alpha=8, targets="all-linear", dora=dora), {}, seed=0)
    (layer,) = lora_layers(model).values()
    assert type(layer) is own
    assert isinstance(layer, pefts)
    layer.lora_B["default"].weight.data.normal_()
    found = []
    for by_peft in (False, True):
        model.zero_grad()
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with plain_layers(model) if by_peft else nullcontext():
            out = model(x)
        out.square().sum().backward()
        found.append([out, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(found[0]) == (5 if dora else 4)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
