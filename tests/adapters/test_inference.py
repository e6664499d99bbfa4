"""Stacked layers against PEFT's own forward pass."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lorakit.adapters.inference import Stacked, stackable

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


class Three(nn.Module):
    """Three linear layers that read the same input, 24 -> 10, 6, 7; the second without bias."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 10), nn.Linear(24, 6, bias=False), nn.Linear(24, 7)


def three(*adapters, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = Three().to(dtype)
    for number, targets in enumerate(adapters):
        config = LoraConfig(r=4 + number, lora_alpha=9, target_modules=targets, init_lora_weights=False, **options)
        inject_adapter_in_model(config, model, adapter_name=f"adapter{number}")
    for layer in (model.q, model.k, model.v):
        if hasattr(layer, "lora_A"):
            layer.set_adapter(list(layer.lora_A))
    return model.eval()


@pytest.mark.parametrize("adapters", [(), (["q", "v"],), (["q", "k", "v"], ["k"])])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("rows", [1, 2, 19])
def test_outputs_are_those_of_peft(adapters, dtype, error, rows):
    model = three(*adapters, dtype=dtype)
    layers = [model.q, model.k, model.v]
    x = torch.randn(rows, 24, dtype=dtype)
    with torch.inference_mode():
        expected = torch.cat([layer(x) for layer in layers], -1)
        torch.testing.assert_close(Stacked(layers)(x), expected, rtol=error / 4, atol=error)


def test_what_is_no_plain_lora_over_linear_is_not_stacked():
    assert all(map(stackable, three(["q"]).children()))
    assert not stackable(three(["q"], use_dora=True).q)
    assert not stackable(three(["q"], lora_bias=True).q)
    assert not stackable(nn.Bilinear(2, 2, 2))
    model = three(["q"])
    model.q.merge()
    assert not stackable(model.q)
    model.k.weight = nn.Parameter(model.k.weight.detach())
    with pytest.raises(ValueError, match="stacked"):
        Stacked([model.q, model.k])
