"""Ranks lowered and adapters extracted, against plain singular values of the whole matrices."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from lorakit.adapters.delta import SavedAdapter, product
from lorakit.adapters.files import read_adapter
from lorakit.adapters.outline import adaptable
from lorakit.adapters.reduce import FullModel, Kept, resize
from lorakit.adapters.reduce import extract as extract_from
from lorakit.cli import app
from lorakit.commands.adapters import open_base, open_headers
from lorakit.errors import ConflictError, LorakitError, ModelError
from lorakit.storage.bases import resolve
from tests.adapters.test_convert import MODELS, random_delta
from tests.tiny import tiny_gguf, tiny_llama, tiny_sd


def shares(matrix: torch.Tensor, rank: int) -> tuple[float, float]:
    """What numpy says that the best approximation of a rank keeps, and the squared norm of the matrix."""
    values = np.linalg.svd(matrix.double().flatten(1).numpy(), compute_uv=False) ** 2
    return values[:rank].sum() / values.sum(), values.sum()


def extract(base: Path, tuned: Path, rank: int) -> tuple[SavedAdapter, Kept]:
    one, other = (FullModel(str(path), open_headers(resolve(str(path)))) for path in (base, tuned))
    return extract_from(one, other, rank)


@pytest.mark.parametrize("dora", [False, True])
def test_resize_keeps_what_singular_values_allow(dora: bool) -> None:
    layers = list(adaptable(MODELS["sd"]["unet"]).items())[::5]
    changes = {
        path: random_delta(layer, 1 + number % 6, 3.0, torch.float32, dora=dora, seed=number)
        for number, (path, layer) in enumerate(layers)
    }
    saved = SavedAdapter("sd", {"unet": changes}, "peft", {})
    smaller, kept = resize(saved, 3)
    total = weight = 0.0
    for path, delta in changes.items():
        found = smaller.components["unet"][path]
        share, square = shares(product(delta), 3)
        left = (product(delta) - product(found)).double().square().sum().item()
        assert found.rank == min(3, delta.rank)
        assert found.shape == delta.shape
        assert left == pytest.approx((1 - share) * square, abs=1e-5 * square)
        assert (found.magnitude is None) == (not dora)
        total, weight = total + share * square, weight + square
    assert kept.share == pytest.approx(total / weight, rel=1e-6)
    assert kept.modules == len(changes)
    assert kept.least == pytest.approx(min(shares(product(d), 3)[0] for d in changes.values()), rel=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_extract_finds_the_adapter_that_was_added(tmp_path: Path) -> None:
    """A UNet with changes of rank 2, convolutions too, added: rank 2 brings them back, rank 1 what it can."""
    base, tuned = tiny_sd(tmp_path / "base"), tiny_sd(tmp_path / "tuned")
    unet = UNet2DConditionModel.from_pretrained(tuned / "unet")
    layers = {p: m for p, m in adaptable(unet).items() if p.endswith(("to_q", "conv1", "proj_in"))}
    changes = {
        path: random_delta(layer, 2, 0.1, torch.float32, dora=False, seed=number)
        for number, (path, layer) in enumerate(layers.items())
    }
    with torch.no_grad():
        for path, delta in changes.items():
            layers[path].weight += product(delta)
        unet.conv_norm_out.bias += 0.01
    unet.save_pretrained(tuned / "unet")
    out = tmp_path / "found"
    done = CliRunner().invoke(app, ["extract", str(base), str(tuned), str(out), "--rank", "2"], catch_exceptions=False)
    assert "rank 2 keeps 100.00% of the difference" in done.stdout
    assert "left out: 1 tensors" in done.stdout
    assert "unet.conv_norm_out.bias" in done.stdout
    found = read_adapter(out, open_base(resolve(str(base))).models).components
    assert found["unet"].keys() == changes.keys()
    for path, delta in changes.items():
        torch.testing.assert_close(product(found["unet"][path]), product(delta), rtol=1e-4, atol=1e-6)
    saved, kept = extract(base, tuned, 1)
    for path, delta in changes.items():
        share, square = shares(product(delta), 1)
        left = (product(delta) - product(saved.components["unet"][path])).double().square().sum().item()
        assert left == pytest.approx((1 - share) * square, rel=1e-3)
    assert kept.least < 1


def test_extract_then_resize_a_llama(tmp_path: Path) -> None:
    base, tuned = tiny_llama(tmp_path / "base"), tiny_llama(tmp_path / "tuned", seed=1)
    words = ["extract", str(base), str(tuned), str(tmp_path / "full"), "--rank", "32"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "rank 32 keeps 100.00%" in done.stdout
    assert "model.model.embed_tokens.weight" in done.stdout
    saved = read_adapter(tmp_path / "full").components["model"]
    one, other = (LlamaForCausalLM.from_pretrained(folder).state_dict() for folder in (base, tuned))
    for path, delta in saved.items():
        difference = other[f"{path}.weight"] - one[f"{path}.weight"]
        torch.testing.assert_close(product(delta), difference, rtol=1e-4, atol=1e-5)
    words = ["resize", str(tmp_path / "full"), str(tmp_path / "small"), "--rank", "4"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    small = read_adapter(tmp_path / "small").components["model"]
    assert {delta.rank for delta in small.values()} == {4}
    kept = [shares(product(delta), 4) for delta in saved.values()]
    expected = sum(share * square for share, square in kept) / sum(square for _, square in kept)
    assert f"rank 4 keeps {expected:.2%} of the change" in done.stdout
    nowhere = str(tmp_path / "nowhere")  # where the result cannot go is told before any other base is looked for
    for out, code in ((tmp_path / "small", 7), (tmp_path / "a.safetensors", 2)):
        for words in (["extract", str(base), nowhere], ["resize", str(tmp_path / "full"), "--base", nowhere]):
            with pytest.raises(LorakitError) as refused:
                CliRunner().invoke(app, [*words, str(out), "--rank", "4"], catch_exceptions=False)
            assert refused.value.exit_code == code


def test_names_that_no_model_has_and_a_head_that_one_leaves_out_are_no_difference(tmp_path: Path) -> None:
    """CLIP's position_ids of older files; a tied head, which transformers does not write, saved all the same."""
    sd, other = tiny_sd(tmp_path / "sd"), tiny_sd(tmp_path / "other")
    weights = sd / "text_encoder/model.safetensors"
    save_file(load_file(weights) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, weights)
    with pytest.raises(ModelError, match="no layer differs"):
        extract(sd, other, 2)
    base, tuned = tiny_llama(tmp_path / "base"), tiny_llama(tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    for change in (0.0, 1.0):
        save_file(tensors | {"lm_head.weight": head + change}, tuned / "model.safetensors", {"format": "pt"})
        if not change:
            with pytest.raises(ModelError, match="no layer differs"):
                extract(base, tuned, 2)
            continue
        saved, _ = extract(base, tuned, 2)
        assert list(saved.components["model"]) == ["lm_head"]
        torch.testing.assert_close(product(saved.components["model"]["lm_head"]), torch.ones_like(head))


def test_models_that_do_not_compare(tmp_path: Path) -> None:
    base, same = tiny_llama(tmp_path / "base"), tiny_llama(tmp_path / "same")
    with pytest.raises(ModelError, match="no layer differs"):
        extract(base, same, 2)
    tensors = load_file(same / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file(tensors | {name: torch.zeros(16, 32)}, same / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"\(32, 32\) in one model, \(16, 32\) in the other"):
        extract(base, same, 2)


def test_what_only_the_tuned_model_has_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, tuned = tiny_llama(tmp_path / "base", tied=False), tiny_llama(tmp_path / "tuned", tied=False, seed=1)
    tensors = load_file(tuned / "model.safetensors")
    save_file(tensors | {"score.weight": torch.ones(2, 32)}, tuned / "model.safetensors", {"format": "pt"})
    extract(base, tuned, 2)
    assert "1 tensors that no layer takes: model.score.weight" in caplog.text
    config = LlamaForCausalLM.from_pretrained(base).config
    config.attention_bias = True
    LlamaForCausalLM(config).save_pretrained(tuned)
    with pytest.raises(ModelError, match=r"k_proj\.bias: .*tuned has it, .*base does not"):
        extract(base, tuned, 2)
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(410, mean_resizing=False)
    model.save_pretrained(tuned)
    with pytest.raises(ModelError, match=r"\(400, 32\) in one model, \(410, 32\) in the other") as grown:
        extract(base, tuned, 2)
    assert "resize_token_embeddings(410)" in grown.value.hint


def test_extract_from_a_gguf_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    base = tiny_gguf(tmp_path / "base" / "tiny.gguf")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base" / "tiny-folder", dtype=torch.float32)
    layer = model.model.layers[1].self_attn.q_proj  # whose rows GGUF keeps in another order
    delta = random_delta(layer, 2, 1.0, torch.float32, dora=False, seed=0)
    with torch.no_grad():
        layer.weight += product(delta)
    model.save_pretrained(tmp_path / "tuned")
    out = tmp_path / "found"
    done = CliRunner().invoke(
        app, ["extract", str(base), str(tmp_path / "tuned"), str(out), "--rank", "2"], catch_exceptions=False
    )
    assert "rank 2 keeps" in done.stdout
    found = read_adapter(out).components["model"]
    torch.testing.assert_close(product(found["model.layers.1.self_attn.q_proj"]), product(delta), rtol=1e-2, atol=1e-2)


def test_what_is_read_is_not_written_into(tmp_path: Path) -> None:
    """As merge refuses it: an adapter inside the base's folder, or inside another adapter's."""
    base, tuned = tiny_llama(tmp_path / "base"), tiny_llama(tmp_path / "tuned", seed=1)
    full = tmp_path / "full"
    CliRunner().invoke(app, ["extract", str(base), str(tuned), str(full), "--rank", "4"], catch_exceptions=False)
    (tmp_path / "link").symlink_to(base)
    before = sorted(tmp_path.rglob("*"))
    for words, places in (
        (["extract", str(base), str(tuned), "--rank", "2"], (base, tuned, tmp_path / "link")),
        (["resize", str(full), "--base", str(base), "--rank", "2"], (base, full)),
        (["merge", str(base), str(full), "--as-adapter", "2"], (base, full)),
        (["merge", str(base), str(full), "--as-adapter", "2", "--dry-run"], (base, full)),
    ):
        for place in places:
            with pytest.raises(ConflictError, match="lies inside it"):
                CliRunner().invoke(app, [*words, str(place / "new")], catch_exceptions=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_rounding_alone_made_different_is_no_difference(tmp_path: Path) -> None:
    """A tuned model that was published in another dtype than its base."""
    base = tiny_llama(tmp_path / "base", tied=False)
    model = LlamaForCausalLM.from_pretrained(base)
    layer = model.model.layers[1].self_attn.q_proj
    delta = random_delta(layer, 2, 1.0, torch.float32, dora=False, seed=0)
    with torch.no_grad():
        layer.weight += product(delta)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "tuned")
    saved, kept = extract(base, tmp_path / "tuned", 2)
    assert list(saved.components["model"]) == ["model.layers.1.self_attn.q_proj"]
    assert kept.left_out == ()
