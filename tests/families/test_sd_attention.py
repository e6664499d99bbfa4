"""The UNet with lorakit's attention beside the same UNet with diffusers'."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from lorakit.adapters.linear import all_of
from lorakit.families.place import Place
from lorakit.families.sd import attention
from lorakit.families.sd.attention import Processor, text_once
from lorakit.families.sd.base import load_parts
from lorakit.storage.bases import resolve
from tests.tiny import tiny_sd


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_unet_and_its_gradients_are_as_near_to_float64_as_diffusers(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_sd(tmp_path / "base")
    parts = load_parts(resolve(str(tmp_path / "base")), Place(torch.device("cpu"), dtype))
    ours: Any = parts.unet
    theirs = copy.deepcopy(ours)
    theirs.set_attn_processor(AttnProcessor2_0())
    assert {type(p) for p in ours.attn_processors.values()} == {Processor}
    exact = copy.deepcopy(theirs).double()
    torch.manual_seed(0)
    noisy, text = torch.randn(2, ours.config.in_channels, 8, 8), torch.randn(2, 5, ours.config.cross_attention_dim)

    def results(unet: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        x = noisy.to(dtype).requires_grad_()
        out = unet(x, torch.tensor([3, 700]), text.to(dtype)).sample
        (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
        return [out.double(), gradient.double()]

    triples = zip(results(ours, dtype), results(theirs, dtype), results(exact, torch.float64), strict=True)
    for own, other, wanted in triples:
        assert wanted.norm() > 0
        assert (own - wanted).norm() <= 1.5 * (other - wanted).norm()


def test_the_text_is_read_once_as_long_as_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_sd(tmp_path / "base")
    unet: Any = load_parts(resolve(str(tmp_path / "base")), Place(torch.device("cpu"), torch.float32)).unet
    torch.manual_seed(0)
    texts = torch.randn(2, 2, 5, unet.config.cross_attention_dim)

    def predict(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = unet(x, torch.tensor(700), text).sample
        return out

    pictures = torch.randn(2, 2, unet.config.in_channels, 8, 8)
    readers = {module for name, module in unet.named_modules() if name.endswith("attn2.to_k")}
    calls: list[Any] = []

    def counted(layers: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.extend(readers.intersection(layers))
        return all_of(layers, x)

    monkeypatch.setattr(attention, "all_of", counted)
    with torch.no_grad():
        for text in texts:
            expected = [predict(x, text) for x in pictures]
            calls.clear()
            with text_once(unet):
                found = [predict(x, text) for x in pictures]
            assert len(calls) == len(readers) == len({*calls}) > 0
            assert {type(p) for p in unet.attn_processors.values()} == {Processor}
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.equal(ours, theirs)
