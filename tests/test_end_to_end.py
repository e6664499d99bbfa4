"""The main job through the command line on tiny real models: train, merge, generate; one rank and two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lorakit.cli import app
from tests.tiny import tiny_llama, tiny_sd

LLAMA = """\
base: {{model: {base}}}
adapter: {{rank: 4, alpha: 8, dropout: {dropout}}}
data:
  train: [{{path: {folder}/chats.jsonl}}]
  held_out: 0.2
  max_tokens: 64
train: {{steps: 12, batch_size: 8, checkpoint_every: 5}}
optimizer: {{name: adamw, learning_rate: 0.02}}
sample: {{prompts: ["What is 3?"], max_new_tokens: 4}}
output: {{folder: {folder}/runs, name: chats}}
compute: {{device: cpu, precision: fp32}}
"""
SD = """\
base: {{model: {base}}}
adapter: {{rank: 4, text_encoder: true}}
data: {{path: {folder}/pictures, resolution: 32, bucket_step: 8, held_out: 0.25}}
train: {{steps: 8, batch_size: 2}}
optimizer: {{learning_rate: 0.01}}
sample: {{prompts: [red], steps: 3}}
output: {{folder: {folder}/runs, name: colours}}
compute: {{device: cpu, precision: fp32}}
"""


def lorakit(*words: object) -> str:
    """Run the command in this process; its standard output."""
    done = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["LORAKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained LLaMA run."""
    folder = tmp_path_factory.mktemp("llama")
    rows = [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]
        for i in range(30)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    recipe = LLAMA.format(base=tiny_llama(folder / "base"), folder=folder, dropout=0)
    (folder / "recipe.yaml").write_text(recipe)
    lorakit("train-llama", folder / "recipe.yaml")
    return folder


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained Stable Diffusion run."""
    folder = tmp_path_factory.mktemp("sd")
    (folder / "pictures").mkdir()
    for i in range(8):
        Image.new("RGB", (48, 32 + 8 * (i % 2)), (i * 30, 90, 250 - i * 30)).save(folder / f"pictures/{i}.png")
        (folder / f"pictures/{i}.txt").write_text(f"colour {i}")
    (folder / "recipe.yaml").write_text(SD.format(base=tiny_sd(folder / "base"), folder=folder))
    lorakit("train-sd", folder / "recipe.yaml")
    return folder


@pytest.mark.parametrize("kind", ["chats", "colours"])
def test_an_adapter_knows_its_recipe_and_its_base(kind: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(kind) / "runs" / kind
    adapters = [run / "adapter"] if kind == "chats" else [run / "adapter", run / "colours.safetensors"]
    for adapter in adapters:
        assert lorakit("inspect", adapter, "--recipe") == (run / "recipe.yaml").read_text()
        told = json.loads(lorakit("inspect", adapter, "--json"))
        assert told["base"] == str(run.parents[1] / "base")
        assert told["faults"] == told["dead"] == []


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["held_out_loss"] for row in rows if "held_out_loss" in row]


@pytest.mark.parametrize("kind", ["chats", "colours"])
def test_a_run_leaves_what_the_readme_says_and_its_held_out_loss_falls(
    kind: str, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(kind) / "runs" / kind
    component = "adapter/unet" if kind == "colours" else "adapter"
    expected = [
        "recipe.yaml",
        "metrics.jsonl",
        "loss.png",
        f"{component}/adapter_model.safetensors",
        "samples/step-000000",
    ]
    assert [name for name in expected if not (run / name).exists()] == []
    first, *_, last = losses(run)
    assert last < first


def test_a_merged_llama_answers_as_base_and_adapter_do(chats: Path) -> None:
    run = chats / "runs/chats"
    lorakit("merge", chats / "base", run, chats / "merged")
    asked = ["--prompt", "What is 7?", "--temperature", 0, "--max-new-tokens", 8]
    lorakit("generate", "--base", chats / "base", "--adapter", run, *asked, "--out", chats / "a.jsonl")
    lorakit("generate", "--base", chats / "merged", *asked, "--out", chats / "b.jsonl")
    assert (chats / "a.jsonl").read_text() == (chats / "b.jsonl").read_text()
    base, merged = (AutoModelForCausalLM.from_pretrained(chats / n, dtype=torch.float32) for n in ("base", "merged"))
    tokens = torch.arange(5, 25)[None]
    assert (base(tokens).logits - merged(tokens).logits).abs().max() > 1e-3, "training changed nothing"


def test_a_merged_sd_draws_as_base_and_adapter_do(colours: Path) -> None:
    run = colours / "runs/colours"
    lorakit("merge", colours / "base", run, colours / "merged")
    asked = ["--prompt", "colour 2", "--steps", 4, "--seed", 3]
    lorakit("generate", "--base", colours / "base", *asked, "--out", colours / "plain")
    lorakit("generate", "--base", colours / "base", "--adapter", run, *asked, "--out", colours / "a")
    lorakit("generate", "--base", colours / "merged", *asked, "--out", colours / "b")
    lorakit(
        "generate", "--base", colours / "base", "--adapter", run / "colours.safetensors", *asked, "--out", colours / "c"
    )
    plain, a, b, c = (np.asarray(Image.open(colours / n / "0001.png")).astype(int) for n in ("plain", "a", "b", "c"))
    assert np.array_equal(a, b), "base + adapter and the merged model have the same weights, bit for bit"
    assert np.abs(a - c).max() <= 1, "the kohya file and the PEFT folder draw the same"
    assert np.abs(a - plain).max() > 1, "training changed nothing"
    StableDiffusionPipeline.from_pretrained(colours / "merged")


def test_a_finished_run_says_so_and_an_existing_one_is_not_overwritten(chats: Path) -> None:
    before = (chats / "runs/chats/metrics.jsonl").read_bytes()
    again = CliRunner().invoke(app, ["train-llama", str(chats / "recipe.yaml")])
    assert again.exception is not None
    assert "--resume" in getattr(again.exception, "hint", "")
    assert "finished" in lorakit("train-llama", chats / "recipe.yaml", "--resume")
    assert (chats / "runs/chats/metrics.jsonl").read_bytes() == before


def test_the_dry_run_prints_a_plan_and_trains_nothing(chats: Path, colours: Path) -> None:
    for command, folder in (("train-llama", chats), ("train-sd", colours)):
        plan = lorakit(command, folder / "recipe.yaml", "--dry-run", "--set", "output.name=dry")
        for word in ("trainable", "learning rate", "optimizer state", "held out", "disk"):
            assert word in plan
        assert not (folder / "runs/dry").exists()


def test_two_ranks_and_accumulation_train_the_same_adapter(chats: Path) -> None:
    """1 x 8, 2 ranks x 4 and 8 x 1 agree to float32 rounding."""
    recipe = chats / "recipe.yaml"
    words = [sys.executable, "-m", "lorakit", "train-llama", str(recipe), "--num-processes", "2"]
    subprocess.run([*words, "--set", "output.name=two"], check=True, capture_output=True, timeout=300)
    changed = ["--set", "output.name=eight", "--set", "compute.gradient_accumulation=8"]
    lorakit("train-llama", recipe, *changed)
    one, two, eight = (
        load_file(chats / "runs" / name / "adapter/adapter_model.safetensors") for name in ("chats", "two", "eight")
    )
    worlds = [
        json.loads((chats / f"runs/{n}/checkpoints/step-000012/state.json").read_text())["world"]
        for n in ("chats", "two")
    ]
    assert worlds == [1, 2]
    for key, expected in one.items():
        torch.testing.assert_close(two[key], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(eight[key], expected, rtol=1e-4, atol=1e-5)
