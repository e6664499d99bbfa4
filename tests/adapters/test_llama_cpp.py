"""llama.cpp on SmolLM2 with a GGUF adapter, beside transformers + PEFT. Runs where llama-cpp-python is installed.

The base is de-quantized first: llama.cpp multiplies 4-bit weights by 8-bit activations, transformers does not.
"""

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from lorakit.adapters.convert import convert
from lorakit.adapters.files import read_adapter
from lorakit.adapters.inject import adapter_state, inject, load_adapter_state
from lorakit.adapters.write import write_peft
from lorakit.families.llama.base import GROUPS, as_folder
from lorakit.families.llama.library import load_model, load_tokenizer
from lorakit.families.place import Place
from lorakit.recipe.schema import Adapter
from lorakit.storage.bases import resolve
from tests.tiny import tiny_gguf, tiny_llama

llama_cpp = pytest.importorskip("llama_cpp")
PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time there was a small", "Water boils at")
ADAPTER = Adapter(rank=8, alpha=16, targets="attention+mlp", rank_pattern={"v_proj": 4}, alpha_pattern={"k_proj": 5.0})
FLOAT32 = 0
"""llama.cpp's number for the type, of the key-value cache here."""

PLACE = Place(torch.device("cpu"), torch.float32)


def unpacked(source: Path, out: Path) -> Path:
    """A GGUF file with every tensor de-quantized to float32."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture", "general.file_type", "general.quantization")):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape(tuple(reversed(tensor.shape.tolist()))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.filterwarnings("ignore")
def test_next_tokens_are_those_of_transformers_with_peft(tmp_path: Path) -> None:
    base = resolve("builtin:smollm2-135m")
    folder = as_folder(base, PLACE.dtype)
    model, tokenizer = load_model(folder, PLACE, "none", attention="sdpa"), load_tokenizer(folder)
    injection = inject(model, ADAPTER, GROUPS, seed=0)
    generator = torch.Generator().manual_seed(3)
    state = {
        key: tensor if "lora_A" in key else 0.006 * torch.randn(tensor.shape, generator=generator)
        for key, tensor in adapter_state(model).items()
    }
    load_adapter_state(model, state)
    write_peft(tmp_path / "peft", state, injection, base_name=base.name, task="CAUSAL_LM")
    plain = load_model(folder, PLACE, "none", attention="sdpa")
    saved = read_adapter(tmp_path / "peft", {"model": plain})
    convert(saved, tmp_path / "a.gguf", "gguf", models={"model": plain}, base_name=base.name)
    file = unpacked(base.path, tmp_path / "f32.gguf")
    options = {"n_ctx": 128, "logits_all": True, "verbose": False, "type_k": FLOAT32, "type_v": FLOAT32}
    theirs: Any = llama_cpp.Llama(str(file), lora_path=str(tmp_path / "a.gguf"), **options)
    rows = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    with torch.no_grad():
        before = [plain(torch.tensor([ids])).logits[0].numpy() for ids in rows]
        ours = PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
        expected = [ours(torch.tensor([ids])).logits[0].numpy() for ids in rows]
    for ids, wanted, bare in zip(rows, expected, before, strict=True):
        theirs.reset()
        theirs.eval(ids)
        found = np.array(theirs.scores[: len(ids)])
        assert np.abs(wanted - bare).max() > 1
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
        assert (found.argmax(-1) == wanted.argmax(-1)).all()
    shutil.rmtree(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_an_embeddings_lora_moves_what_it_moves_in_peft(tmp_path: Path) -> None:
    folder, ids = tiny_llama(tmp_path / "base", tied=False), list(range(4, 20))
    file = tiny_gguf(tmp_path / "base.gguf", model=folder)
    targets = ["q_proj", "embed_tokens"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    ours = get_peft_model(LlamaForCausalLM.from_pretrained(folder), config).eval()
    ours.save_pretrained(tmp_path / "peft")
    models = {"model": LlamaForCausalLM.from_pretrained(folder)}
    saved = read_adapter(tmp_path / "peft", models, embeddings=True)
    convert(saved, tmp_path / "a.gguf", "gguf", models=models, base_name="")
    options = {"n_ctx": 64, "logits_all": True, "verbose": False, "type_k": FLOAT32, "type_v": FLOAT32}
    theirs: Any = llama_cpp.Llama(str(file), lora_path=str(tmp_path / "a.gguf"), **options)
    theirs.eval(ids)
    with torch.no_grad():
        bare, wanted = (model(torch.tensor([ids])).logits[0].numpy() for model in (models["model"], ours))
    assert np.abs(wanted - bare).max() > 1
    np.testing.assert_allclose(np.array(theirs.scores[: len(ids)]), wanted, rtol=1e-4, atol=1e-4)
