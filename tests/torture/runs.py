"""The two tiny real recipes that are tortured: dropout, 8-bit state, accumulation, held-out loss and samples."""

import json
from pathlib import Path

from PIL import Image

from tests.tiny import tiny_llama, tiny_sd

LLAMA = """\
base: {{model: {folder}/base}}
adapter: {{rank: 16, dropout: 0.2}}
data:
  train: [{{path: {folder}/chats.jsonl}}]
  held_out: 0.2
  max_tokens: 64
train: {{steps: 8, batch_size: 8, checkpoint_every: 2, checkpoint_minutes: 0, keep_checkpoints: 2, evaluate_every: 4}}
optimizer: {{name: adamw_8bit, learning_rate: 0.02}}
sample: {{prompts: ["What is 3?"], max_new_tokens: 2}}
output: {{name: run}}
compute: {{device: cpu, precision: fp32, gradient_accumulation: 2}}
"""
SD = """\
base: {{model: {folder}/base}}
adapter: {{rank: 8, dropout: 0.2, text_encoder: true}}
data: {{path: {folder}/pictures, resolution: 32, bucket_step: 8, held_out: 0.25}}
train: {{steps: 8, batch_size: 4, checkpoint_every: 2, checkpoint_minutes: 0, keep_checkpoints: 2, evaluate_every: 4}}
optimizer: {{name: adamw_8bit, learning_rate: 0.01}}
sample: {{prompts: [red], steps: 2}}
output: {{name: run}}
compute: {{device: cpu, precision: fp32, gradient_accumulation: 2}}
"""
FAMILIES = ("llama", "sd")
STEPS, PER_EPOCH, ACCUMULATION = 8, 3, 2


def make(family: str, folder: Path) -> Path:
    """Base, data and recipe in ``folder``; the recipe's path. An epoch has three updates."""
    recipe = folder / "recipe.yaml"
    if recipe.exists():
        return recipe
    folder.mkdir(parents=True, exist_ok=True)
    if family == "llama":
        tiny_llama(folder / "base")
        rows = [
            [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i * 7}."}]
            for i in range(30)
        ]
        (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    else:
        tiny_sd(folder / "base", packable=True)
        (folder / "pictures").mkdir(exist_ok=True)
        for i in range(16):
            size = (48, 32 + 8 * (i % 2))
            Image.new("RGB", size, (i * 15, 90, 250 - i * 15)).save(folder / f"pictures/{i:02d}.png")
            (folder / f"pictures/{i:02d}.txt").write_text(f"colour {i}")
    recipe.write_text((LLAMA if family == "llama" else SD).format(folder=folder))
    return recipe
