"""How far a merged model's outputs may be from base + adapter's: what its rounding explains, and no more."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit.adapters.merging.merge import merge
from lorakit.adapters.merging.outputs import TIMES
from lorakit.adapters.merging.plan import Settings, plan_merge
from lorakit.adapters.merging.reference import parameters_on_meta, run_from_files
from lorakit.adapters.merging.rounding import error_of, random_error
from lorakit.adapters.merging.verify import Proof
from lorakit.commands.merge_told import compare_with
from lorakit.errors import ModelError
from lorakit.families.llama.compare import compare
from lorakit.families.llama.skeleton import open_language_model
from lorakit.families.sd import compare as sd_compare
from lorakit.families.sd.original import open_stable_diffusion
from lorakit.storage.bases import resolve
from tests.adapters.merging.test_merge_parts import TOKENS, adapter, from_files, planned
from tests.faults.harness import process
from tests.tiny import tiny_llama

Q, DOWN = "q_proj", "down_proj"
ADAPTERS = {
    "lora": {"target_modules": [Q, DOWN]},
    "dora": {"target_modules": [Q, DOWN], "use_dora": True},
    "whole": {"target_modules": [Q], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
}


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 0.02), (torch.float16, 0.02), (torch.float16, 1e-7)])
def test_the_size_of_rounding_is_what_rounding_does(dtype: torch.dtype, size: float) -> None:
    """1e-7 lies in the smallest numbers of float16, whose steps are even."""
    weight = size * torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    measured = float((weight.to(dtype).double() - weight.double()).square().mean().sqrt())
    assert error_of(dtype, float(weight.square().sum()), weight.numel()) == pytest.approx(measured, rel=0.1)


def test_random_errors_do_what_independent_ones_do() -> None:
    """norm(E x)^2 is out * norm(x)^2 in the mean, for entries with the variance 1."""
    x = torch.randn(48, generator=torch.Generator().manual_seed(1)).double()
    shares = []
    for number in range(200):
        a, b = random_error(str(number), (32, 48))
        assert a.shape == (16, 48)
        assert b.shape == (32, 16)
        shares.append(float((b.double() @ (a.double() @ x)).square().sum() / (32 * x.square().sum())))
    assert sum(shares) / 200 == pytest.approx(1, rel=0.1)
    assert torch.equal(random_error("x", (2, 3)).A, random_error("x", (2, 3)).A)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_an_honest_merge_is_as_far_as_its_rounding(tmp_path: Path, kind: str, stored: torch.dtype) -> None:
    """A base in float32 is converted as a whole, norms included."""
    base = tiny_llama(tmp_path / "base", dtype=stored, tied=False)
    adapter(base, tmp_path / "a", **ADAPTERS[kind])
    location = resolve(str(base))
    settings = Settings(torch.bfloat16) if stored == torch.float32 else Settings()
    plan = plan_merge(location, open_language_model(location), [(tmp_path / "a", 1.0)], tmp_path / "out", settings)
    merge(plan)
    found = compare(location, plan.adapters, tmp_path / "out")
    assert found.rounding / 2 < found.difference < TIMES / 2 * found.rounding
    assert found.allowed == TIMES * found.rounding or stored == torch.float16


def test_errors_are_in_the_second_half_alone(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16, tied=False)
    expected = adapter(base, tmp_path / "a", **ADAPTERS["whole"])
    plan = planned(base, [(tmp_path / "a", 1.0)], tmp_path / "out")
    merge(plan)
    opened: Any = open_language_model(resolve(str(base)), parameters_on_meta())
    run_from_files(opened, plan.adapters, open_language_model(resolve(str(tmp_path / "out"))))
    with torch.inference_mode():
        both = opened.models["model"](torch.cat([TOKENS, TOKENS])).logits
    torch.testing.assert_close(both[:2], expected, rtol=1e-4, atol=1e-5)
    assert 1e-4 < (both[2:] - expected).abs().mean() < 0.1
    torch.testing.assert_close(from_files(base, [(tmp_path / "a", 1.0)]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.fault(62)
@pytest.mark.parametrize("share", [0.9, 1.1])
def test_a_tenth_of_the_change_too_many_or_too_few_is_found(tmp_path: Path, share: float) -> None:
    """In bfloat16, by the outputs alone."""
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16, tied=False)
    adapter(base, tmp_path / "a", **ADAPTERS["lora"])
    adapter(base, tmp_path / "wrong", **ADAPTERS["lora"])
    file = tmp_path / "wrong" / "adapter_model.safetensors"
    tensors = {name: t * share if "lora_B" in name else t for name, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    right, wrong = (planned(base, [(tmp_path / name, 1.0)], tmp_path / "out") for name in ("a", "wrong"))
    with pytest.raises(ModelError, match="rounding explains"):
        merge(wrong, compare=compare_with(right))
    assert not (tmp_path / "out").exists()
    assert merge(right, compare=compare_with(right)).compared is not None


def test_what_computes_nothing_finite_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(tmp_path / "base", tied=False)
    model = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.fill_(3e38)
    model.save_pretrained(base)
    adapter(base, tmp_path / "a", target_modules=[Q])
    plan = planned(base, [(tmp_path / "a", 1.0)], tmp_path / "out")
    monkeypatch.setattr(Proof, "__call__", lambda *_: None)
    with pytest.raises(ModelError, match="not finite: there is nothing to compare with"):
        merge(plan, compare=compare_with(plan))


def test_a_base_without_a_tokenizer_is_compared_all_the_same(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tied=False)
    for path in base.glob("*token*"):
        path.unlink()
    adapter(base, tmp_path / "a", **ADAPTERS["lora"])
    plan = planned(base, [(tmp_path / "a", 1.0)], tmp_path / "out")
    compared = merge(plan, compare=compare_with(plan)).compared
    assert compared is not None
    assert "random tokens" in compared["in_words"]
    assert compared["difference"] < 1e-4


def test_a_large_head_that_is_saved_whole_is_never_in_memory(tmp_path: Path) -> None:
    """200 MB in float32; verifying reads it from the adapter, and from OUT, while it computes."""
    base = tiny_llama(tmp_path / "base", tied=False)
    config = json.loads((base / "config.json").read_text()) | {"vocab_size": 50_000, "hidden_size": 1024, "head_dim": 8}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(base)
    adapter(base, tmp_path / "lora", target_modules=[Q])
    adapter(base, tmp_path / "whole", target_modules=[Q], modules_to_save=["lm_head"])
    told = "import atexit\natexit.register(lambda: print(open('/proc/self/status').read()))"
    peaks = []
    for name in ("lora", "whole"):
        done = process("merge", base, tmp_path / name, tmp_path / f"out-{name}", prelude=told)
        assert done.code == 0, done.err
        peaks.append(int(done.out.split("VmHWM:")[1].split()[0]) // 1024)
    assert peaks[1] - peaks[0] < 100


def test_errors_leave_the_first_half_of_a_picture_as_it_is(tmp_path: Path) -> None:
    """CLIP looks up its positions once for all rows of a batch: what has no second half gets no error."""
    location = resolve("builtin:mini-sd")
    opened = open_stable_diffusion(location)
    plan = plan_merge(location, opened, [], tmp_path / "out", Settings(torch.bfloat16))
    merge(plan)
    merged = open_stable_diffusion(resolve(str(tmp_path / "out")))
    text, ids, _ = sd_compare._prompts(location)
    with torch.inference_mode():
        plain = sd_compare._prediction(sd_compare._running(location, opened), text, ids, 8)
        running = sd_compare._running(location, opened, (), merged)
        same, wrong = sd_compare._prediction(running, text, torch.cat([ids, ids]), 8).chunk(2)
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-5)
    assert (wrong - plain).abs().mean() > 1e-4
