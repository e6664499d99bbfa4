"""`lorakit verify` on real recipes: it passes, and fails when the fast path is wrong."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from lorakit.adapters import linear
from lorakit.commands import verify
from lorakit.commands.train import load_task
from lorakit.errors import ModelError, RecipeError
from lorakit.families.place import Place
from lorakit.numerics.order import Layout
from lorakit.recipe.load import load
from lorakit.recipe.schema import SDRecipe
from tests.torture import runs


@pytest.mark.parametrize("family", ["llama", "sd"])
@pytest.mark.parametrize(("precision", "checkpointing"), [("fp32", "false"), ("bf16", "true")])
def test_the_fast_path_is_as_exact_as_plain_means(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    precision: str,
    checkpointing: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    recipe = runs.make(family, tmp_path / family)
    settings = [f"compute.precision={precision}", f"compute.gradient_checkpointing={checkpointing}"]
    verify.run(Path(recipe), settings)
    out = capsys.readouterr().out
    assert "fast path" in out
    assert "plain means" in out


def test_the_demo_s_recipe_trains_all_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    for i in range(8):
        Image.new("RGB", (64, 64), (i * 30, 90, 250 - i * 30)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"colour {i}")
    recipe = Path(__file__).parents[2] / "recipes/openmoji-style.yaml"
    settings = [f"data.path={tmp_path}", "data.held_out=0", "train.batch_size=4"]
    verify.run(recipe, settings)
    resolved = load(recipe, SDRecipe, settings)
    task = load_task(resolved, Layout(0, 4), Place(torch.device("cpu"), torch.float32))
    assert f"of {len(task.adapter_state())} gradients" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama", "sd"])
def test_a_wrong_fast_path_is_found(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    recipe = runs.make(family, tmp_path / family)
    right = linear.lora_linear

    def wrong(x: torch.Tensor, *arguments: object) -> torch.Tensor:
        return right(x, *arguments) * 1.001  # type: ignore[arg-type]

    monkeypatch.setattr(linear, "lora_linear", wrong)
    with pytest.raises(ModelError, match="further from exact"):
        verify.run(Path(recipe), ["compute.precision=fp32"])


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="widened"):
        verify.run(Path(runs.make("llama", tmp_path / "llama")), ["base.quantization=nf4"])


def test_a_gradient_that_is_all_rounding_is_held_against_all_gradients() -> None:
    """Keys' biases have none, as softmax takes no notice of them: what is found of it is the rounding of others."""
    wanted = {"loss": torch.tensor(2.0), "0": torch.ones(100), "1": torch.full((4,), 1e-12)}
    found = {"loss": torch.tensor(2.0), "0": torch.ones(100), "1": torch.full((4,), 2e-7)}
    told = verify._differences(found, wanted, torch.float32)
    assert told["loss"] == 0
    assert told["gradient"] == pytest.approx(4e-8, rel=1e-3)
    assert told["worst tensor"] == pytest.approx(4e-7 / (10 * 2**-23), rel=1e-3)
    found["1"] = torch.full((4,), 2e-3)
    assert verify._differences(found, wanted, torch.float32)["worst tensor"] > 1000
