"""Merging into a folder of bitsandbytes' 4-bit weights: against bitsandbytes' own dequantization and PEFT."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

from lorakit.adapters.merging import change, stream
from lorakit.adapters.merging.four_bit import dequantized
from lorakit.adapters.merging.source import FileSource
from lorakit.commands import merge as command
from lorakit.errors import ModelError, RecipeError
from lorakit.families.llama.generate import open_chat
from lorakit.families.place import Place
from lorakit.storage.bases import base_id, digest, resolve
from tests.tiny import tiny_llama

Q, DOWN = "q_proj", "down_proj"
TOKENS = torch.arange(24).reshape(2, 12)
STATE = ".quant_state.bitsandbytes__"


def plain(folder: Path, dtype: torch.dtype = torch.bfloat16, *, tied: bool = False) -> Path:
    """A tiny LLaMA with rows of whole blocks, as every published model has, and more than one block of maxima."""
    tiny_llama(folder, tied=tied)
    config = LlamaForCausalLM.from_pretrained(folder).config
    config.hidden_size, config.head_dim, config.intermediate_size = 64, 16, 384
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def four_bit(
    base: Path, out: Path, kind: str = "nf4", *, nested: bool = True, shard: str = "5GB", **options: Any
) -> Path:
    """A plain folder as transformers stores it after loading it in 4 bit."""
    dtype = LlamaForCausalLM.from_pretrained(base).dtype
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=dtype,
        **options,
    )
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=how, device_map={"": "cpu"})
    model.save_pretrained(out, max_shard_size=shard)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


def adapter(base: Path, out: Path, **options: Any) -> Path:
    """A PEFT adapter with every trained number disturbed."""
    lora = LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", target_modules=[Q, DOWN], **options)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(out)
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("model*.safetensors") for name, value in load_file(file).items()}


def by_bitsandbytes(folder: Path) -> dict[str, torch.Tensor]:
    """A folder's tensors, the packed ones dequantized."""
    stored = tensors(folder)
    packed = {name.split(STATE)[0] for name in stored if STATE in name}
    found = {name: value for name, value in stored.items() if not any(name.startswith(one) for one in packed)}
    for name in packed:
        state = {key: value for key, value in stored.items() if key.startswith(f"{name}.")}
        found[name] = bnb.dequantize_4bit(stored[name], bnb.QuantState.from_dict(state, torch.device("cpu")))
    return found


def changed(weight: torch.Tensor, lora: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """W + scale * B A in float64, with DoRA every row scaled to its magnitude."""
    a, b = (lora[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
    total = weight.double() + 6 / 4 * b @ a
    magnitude = lora.get(f"base_model.model.{module}.lora_magnitude_vector")
    return total if magnitude is None else total * (magnitude.double() / total.norm(dim=1))[:, None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.float()


def merge(base: Path, lora: Path, out: Path, **options: Any) -> Path:
    command.run(str(base), [str(lora)], out, command.Options(**options))
    return out


CASES = {
    "nf4": ("nf4", False, torch.bfloat16, "5GB", {}),
    "nf4, double": ("nf4", True, torch.bfloat16, "5GB", {}),
    "fp4": ("fp4", False, torch.bfloat16, "5GB", {}),
    "fp4, double": ("fp4", True, torch.bfloat16, "5GB", {}),
    "float16": ("nf4", True, torch.float16, "5GB", {}),
    "float32": ("nf4", True, torch.float32, "5GB", {}),
    "shards": ("nf4", True, torch.bfloat16, "40kB", {}),
    "DoRA": ("nf4", True, torch.bfloat16, "5GB", {"use_dora": True}),
    "DoRA, float16, shards": ("fp4", False, torch.float16, "40kB", {"use_dora": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_adds_to_what_bitsandbytes_dequantizes(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(change, "WORK", 1000)
    monkeypatch.setattr(stream, "READ", 3000)
    kind, nested, dtype, shard, options = CASES[case]
    plain(tmp_path / "plain", dtype)
    base = four_bit(tmp_path / "plain", tmp_path / "base", kind, nested=nested, shard=shard)
    lora = adapter(tmp_path / "plain", tmp_path / "adapter", **options)
    out = merge(base, lora, tmp_path / "out")
    told = capsys.readouterr().out
    assert "--quant-base as-trained: " in told
    assert "4-bit" in told
    assert told.count("verified: ") == 2

    before, after = by_bitsandbytes(base), tensors(out)
    assert before.keys() == after.keys() == tensors(tmp_path / "plain").keys()
    assert len(list(base.glob("*.safetensors"))) == len(list(out.glob("*.safetensors"))) > (shard != "5GB")
    saved = load_file(lora / "adapter_model.safetensors")
    for name, weight in before.items():
        assert after[name].dtype == dtype
        if Q in name or DOWN in name:
            expected = changed(weight, saved, name.removesuffix(".weight"))
            half_unit = torch.finfo(dtype).eps / 2
            torch.testing.assert_close(after[name].double(), expected, rtol=1.01 * half_unit, atol=1e-6)
        else:
            assert torch.equal(after[name], weight)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    if (index := out / "model.safetensors.index.json").is_file():
        told_size = json.loads(index.read_text())["metadata"]["total_size"]
        assert told_size == sum(tensor.nbytes for tensor in after.values())
    receipt = json.loads((out / "merge_receipt.json").read_text())
    assert receipt["quant_base"] == "as-trained"
    assert receipt["base"]["sha256"] == digest(resolve(str(base), four_bit=True))

    model = LlamaForCausalLM.from_pretrained(out)
    assert model.dtype == dtype
    assert {type(layer).__name__ for layer in model.modules()}.isdisjoint({"Linear4bit"})
    exact = LlamaForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    exact.load_state_dict(before)
    trained = PeftModel.from_pretrained(exact, lora)
    torch.testing.assert_close(logits(model.float()), logits(trained), rtol=0.02, atol=0.02)
    if dtype == torch.float32:  # elsewhere sums in 16 bit blur it
        stored = LlamaForCausalLM.from_pretrained(base, device_map={"": "cpu"}, dtype=torch.float32)
        for module in stored.modules():  # on some CPUs bitsandbytes would compute in bfloat16 all the same
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        torch.testing.assert_close(logits(model), logits(PeftModel.from_pretrained(stored, lora)), rtol=1e-3, atol=1e-3)


def test_opens_and_answers_like_any(tmp_path: Path) -> None:
    plain(tmp_path / "plain", tied=True)
    lora = adapter(tmp_path / "plain", tmp_path / "adapter")
    out = merge(four_bit(tmp_path / "plain", tmp_path / "base"), lora, tmp_path / "out", dtype="float16")
    assert {tensor.dtype for tensor in tensors(out).values()} == {torch.float16}
    open_chat(resolve(str(out)), [], Place(torch.device("cpu"), torch.float32))


@pytest.mark.parametrize("columns", [33, 48, 64, 200])
@pytest.mark.parametrize(
    ("kind", "nested", "dtype"), list(product(["nf4", "fp4"], [True, False], ["bfloat16", "float16"]))
)
def test_rows_are_bitsandbytes_own(tmp_path: Path, columns: int, kind: str, nested: bool, dtype: str) -> None:
    weight = torch.randn(162, columns, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    # As one row: bitsandbytes 0.50.2 for the CPU goes astray where a row ends within a block.
    codes, state = bnb.quantize_4bit(weight.view(1, -1), blocksize=128, compress_statistics=nested, quant_type=kind)
    expected = bnb.dequantize_4bit(codes, state).view(162, columns)
    state.shape = weight.shape
    beside = {f"w.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    save_file({"w.weight": codes} | beside, tmp_path / "w.safetensors")
    source = dequantized({"w": FileSource(tmp_path / "w.safetensors")})["w"]
    assert source.slots == {"w.weight": (weight.dtype, weight.shape)}
    for first, last in ((0, 162), (7, 93), (159, 162)):
        assert torch.equal(source.rows("w.weight", first, last), expected[first:last])


def test_codes_stored_in_another_dtype(tmp_path: Path) -> None:
    base = plain(tmp_path / "plain")
    lora = adapter(base, tmp_path / "adapter")
    outs = []
    for storage in ("uint8", "bfloat16"):
        stored = four_bit(base, tmp_path / storage, bnb_4bit_quant_storage=storage)
        outs.append(tensors(merge(stored, lora, tmp_path / f"{storage}-out")))
    assert tensors(tmp_path / "bfloat16")[f"model.layers.0.self_attn.{Q}.weight"].dtype == torch.bfloat16
    assert all(torch.equal(outs[0][name], outs[1][name]) for name in outs[0] | outs[1])


def test_the_plan_tells_the_sizes_of_plain_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = plain(tmp_path / "plain")
    lora = adapter(base, tmp_path / "adapter")
    stored = four_bit(base, tmp_path / "base")
    told = []
    for one in (base, stored):
        merge(one, lora, tmp_path / "out", dry_run=True)
        told.append([line for line in capsys.readouterr().out.splitlines() if line[:8] in ("changes ", "writes  ")])
    assert told[0] == told[1]
    assert not (tmp_path / "out").exists()


def test_its_original_weights_are_not_to_be_had(tmp_path: Path) -> None:
    base = plain(tmp_path / "plain")
    stored, lora = four_bit(base, tmp_path / "base"), adapter(base, tmp_path / "adapter")
    with pytest.raises(RecipeError, match="4-bit") as caught:
        merge(stored, lora, tmp_path / "out", quant_base="original")
    assert "original weights" in str(caught.value.hint)
    given, chosen = (merge(stored, lora, tmp_path / f"{n}", quant_base=n) for n in ("as-trained", None))
    assert all(torch.equal(value, tensors(chosen)[name]) for name, value in tensors(given).items())


def test_all_else_takes_the_original_weights(tmp_path: Path) -> None:
    stored = four_bit(plain(tmp_path / "plain"), tmp_path / "base")
    with pytest.raises(ModelError, match="quantized already: bitsandbytes, 4 bit") as caught:
        resolve(str(stored))
    assert "original weights" in str(caught.value.hint)
    assert "to merge an adapter, the folder itself" in str(caught.value.hint)


OTHERS = {
    "bitsandbytes, 8 bit": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8"},
    "an unknown method": None,
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("merging", [True, False])
def test_other_methods_are_refused_by_name(tmp_path: Path, name: str, merging: bool) -> None:
    base = plain(tmp_path / "plain")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": OTHERS[name]}))
    with pytest.raises(ModelError, match=f"quantized already: {name}") as caught:
        resolve(str(base), four_bit=merging)
    assert "original weights" in str(caught.value.hint)
    assert ("bitsandbytes' 4-bit ones" in str(caught.value.hint)) is merging
    assert "the folder itself" not in str(caught.value.hint)


WEIGHT = f"model.layers.1.self_attn.{Q}.weight"
Tensors = dict[str, torch.Tensor]


def told(stored: Tensors, **values: Any) -> Tensors:
    """With other values in a weight's state."""
    key = f"{WEIGHT}{STATE}nf4"
    state = json.loads(bytes(stored[key].tolist())) | values
    return stored | {key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


DAMAGES: dict[str, Callable[[Tensors], Tensors]] = {
    "no maxima": lambda stored: {name: value for name, value in stored.items() if name != f"{WEIGHT}.absmax"},
    "few maxima": lambda stored: stored | {f"{WEIGHT}.absmax": stored[f"{WEIGHT}.absmax"][:-1]},
    "few codes": lambda stored: stored | {WEIGHT: stored[WEIGHT][:-1]},
    "no codes": lambda stored: {name: value for name, value in stored.items() if name != WEIGHT},
    "few nested": lambda stored: stored | {f"{WEIGHT}.nested_absmax": stored[f"{WEIGHT}.nested_absmax"][:0]},
    "short map": lambda stored: stored | {f"{WEIGHT}.nested_quant_map": stored[f"{WEIGHT}.nested_quant_map"][:9]},
    "no JSON": lambda stored: stored | {f"{WEIGHT}{STATE}nf4": torch.zeros(5, dtype=torch.uint8)},
    "no state": lambda stored: {name: value for name, value in stored.items() if name != f"{WEIGHT}{STATE}nf4"},
    "dtype": lambda stored: told(stored, dtype="int8"),
    "shape": lambda stored: told(stored, shape=[64, 128]),
    "no shape": lambda stored: told(stored, shape=None),
    "negative": lambda stored: told(stored, shape=[-64, -64]),
    "blocks": lambda stored: told(stored, blocksize=0),
    "nested blocks": lambda stored: told(stored, nested_blocksize=0),
    "offset": lambda stored: told(stored, nested_offset="a"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_an_error(tmp_path: Path, damage: str) -> None:
    base = plain(tmp_path / "plain")
    stored, lora = four_bit(base, tmp_path / "base"), adapter(base, tmp_path / "adapter")
    save_file(DAMAGES[damage](load_file(stored / "model.safetensors")), stored / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        merge(stored, lora, tmp_path / "out", dry_run=True)
    assert WEIGHT in str(caught.value)


def test_an_adapter_that_was_trained_on_it_is_known(tmp_path: Path) -> None:
    base = plain(tmp_path / "plain")
    stored, lora = four_bit(base, tmp_path / "base"), adapter(base, tmp_path / "adapter")
    saved = load_file(lora / "adapter_model.safetensors")
    for location, same in ((resolve(str(stored), four_bit=True), True), (resolve(str(base)), False)):
        metadata = {"format": "pt", "lorakit_base": base_id(location)}
        save_file(saved, lora / "adapter_model.safetensors", metadata)
        out = merge(stored, lora, tmp_path / "out", overwrite=True)
        assert json.loads((out / "merge_receipt.json").read_text())["adapters"][0]["is_its_base"] is same
