"""Make the work folder of one comparison: lorakit's recipe, and for the peers what lorakit will train on.

    python -m tests.benchmarks.prepare llama|llama1b|ranks|sd|sd15 WORK --steps N --warmup N --precision P ...

The examples of every step, the first adapter and (SD) the noise are taken from lorakit's own task, so that all
contenders do the same work and their losses can be compared step by step. A process of its own; none of it is timed.
"""

import argparse
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file
from torch import Tensor

from lorakit.commands.train import load_task
from lorakit.families.llama.base import as_folder, find_base
from lorakit.families.llama.library import load_config, load_tokenizer
from lorakit.families.llama.task import LlamaTask
from lorakit.families.place import Place
from lorakit.families.sd.task import SDTask
from lorakit.numerics.order import Layout, micro_batches
from lorakit.recipe.load import load_any
from lorakit.recipe.schema import Compute, LlamaRecipe, SDRecipe
from lorakit.storage.bases import BaseLocation, resolve
from lorakit.training.launch import open_session
from tests.benchmarks import data, flops
from tests.benchmarks.plan import Plan, write_steps

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
PICTURES = 64
LEARNING_RATE = {"llama": 5e-4, "sd": 1e-4}
RANK = {"llama": 16, "sd": 4}
MASKED = -100
SMOLLM = "builtin:smollm2-135m"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("llama", "llama1b", "ranks", "sd", "sd15"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    return parser.parse_args()


def precision(asked: str) -> str:
    """What lorakit makes of compute.precision on this machine."""
    session = open_session(Compute.model_validate({"precision": asked}))
    try:
        return NAMES[session.dtype]
    finally:
        session.close()


def recipe_of(given: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """The recipe as a user would write it. No held-out data and no samples: only training is compared."""
    family = "sd" if given.what.startswith("sd") else "llama"
    common: dict[str, Any] = {
        "adapter": {"rank": RANK[family], "alpha": RANK[family], "targets": "attention"},
        "train": {"steps": given.steps, "batch_size": given.batch, "checkpoint_every": 0, "checkpoint_minutes": 0},
        "optimizer": {
            "name": "adamw",
            "learning_rate": LEARNING_RATE[family],
            "schedule": "constant",
            "warmup": 0,
        },
        "output": {"folder": str(given.work / "runs")},
        "compute": {"precision": dtype},
    }
    if family == "llama":
        model = SMOLLM
        if given.what == "llama1b":
            tokenizer = load_tokenizer(as_folder(resolve(SMOLLM), DTYPES[dtype]))
            model = str(data.random_llama1b(given.work / "llama1b", tokenizer))
        train = [{"path": str(data.chats(given.work) if given.what == "llama" else data.text(given.work))}]
        chats = {"train": train, "held_out": 0.0, "max_tokens": given.max_tokens}
        return {"base": {"model": model}, "data": chats, **common}
    side = 512 if given.what == "sd15" else 64
    folder = data.pictures(given.work, side, PICTURES if given.what == "sd" else 2 * given.batch)
    model = "builtin:mini-sd"
    if given.what == "sd15":
        tokenizer = resolve(model).path / "tokenizer"
        model = str(data.random_sd15(given.work / "sd15", tokenizer, DTYPES[dtype]))
    shown = {"path": str(folder), "resolution": side, "buckets": False, "held_out": 0.0}
    return {"base": {"model": model}, "data": shown, **common}


def share_base(folder: BaseLocation, work: Path) -> None:
    """WORK/base: the folder that lorakit loads, for a GGUF file what it unpacks to."""
    (work / "base").symlink_to(folder.path.resolve(), target_is_directory=True)


def llama_steps(task: LlamaTask, layout: Layout, count: int) -> list[list[list[list[int]]]]:
    """Token ids and labels (-100 where nothing is learned) of each chat of each step, to the last labelled token."""
    examples, found = task.chats.train, []
    for draws in itertools.islice(micro_batches(layout, [len(e.tokens) for e in examples], 0), count):
        rows = []
        for example in (examples[draw.index] for draw in draws):
            end = int(np.flatnonzero(example.labels)[-1]) + 1
            tokens, labels = example.tokens[:end], np.where(example.labels[:end], example.tokens[:end], MASKED)
            labels[0] = MASKED
            rows.append([tokens.tolist(), labels.tolist()])
        found.append(rows)
    return found


def beginning(documents: Sequence[Sequence[int]]) -> int:
    """How many tokens all documents begin with, none of them whole."""
    columns = zip(*(tokens[:-1] for tokens in documents), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len({*column}) == 1, columns))


def prepare_llama(recipe: LlamaRecipe, task: LlamaTask, given: argparse.Namespace) -> dict[str, Any]:
    """Writes base/ and the steps; gives the plan's own fields."""
    _, folder = find_base(recipe.base, DTYPES[recipe.compute.precision])
    share_base(folder, given.work)
    rows = llama_steps(task, Layout(recipe.train.seed, recipe.train.batch_size), given.steps)
    write_steps(given.work, rows)
    shape = flops.LlamaShape.of(load_config(folder), recipe.adapter.rank)
    lengths = [[len(tokens) for tokens, _ in step] for step in rows]
    labelled = [sum(label != MASKED for _, labels in step for label in labels) for step in rows]
    return {
        "family": "llama",
        "max_tokens": given.max_tokens,
        "work": [sum(step) for step in lengths],
        "labelled": labelled,
        "flops": [
            flops.llama_step(shape, step, n, beginning([tokens for tokens, _ in row]))
            for step, n, row in zip(lengths, labelled, rows, strict=True)
        ],
    }


def prepare_sd(recipe: SDRecipe, task: SDTask, given: argparse.Namespace) -> dict[str, Any]:
    """Writes base, the steps and their noise; gives the plan's own fields."""
    location = resolve(recipe.base.model)
    share_base(location, given.work)
    layout = Layout(recipe.train.seed, recipe.train.batch_size)
    maker, folder = task._loaded.maker, Path(recipe.data.path)
    found: dict[str, list[Tensor]] = {"noise": [], "sample": [], "timesteps": []}
    rows = []
    for step, draws in enumerate(micro_batches(layout, [e.bucket for e in task.examples.train], 0)):
        if step == given.steps:
            break
        drawn = [maker.draw(draw) for draw in draws]
        timesteps = torch.tensor([d.timestep for d in drawn])
        noise, noisy = (torch.stack([getattr(d, name) for d in drawn]) for name in ("target", "noisy"))
        signal = maker.alphas[timesteps].view(-1, 1, 1, 1)
        latents = (noisy - (1 - signal).sqrt() * noise) / signal.sqrt() / task.parts.vae.config.scaling_factor
        posteriors = [task.examples.latents.read(d.example.key) for d in drawn]
        mean, deviation = (torch.stack([p[name] for p in posteriors]) for name in ("mean", "deviation"))
        for name, value in (("noise", noise), ("sample", (latents - mean) / deviation), ("timesteps", timesteps)):
            found[name].append(value)
        rows.append([[str(folder / Path(d.example.id).name), d.caption] for d in drawn])
    save_file({name: torch.stack(values) for name, values in found.items()}, given.work / "steps.safetensors")
    write_steps(given.work, cast(Any, rows))
    config = dict(cast(Any, task.parts.unet).config)
    needed = flops.unet_step(config, given.batch, task.parts.conditioning.tokenizers[0].model_max_length)
    counts = [given.batch] * given.steps
    return {"family": "sd", "max_tokens": 0, "work": counts, "labelled": counts, "flops": [needed] * given.steps}


def main() -> None:
    given = arguments()
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    given.work = given.work.resolve()
    path = given.work / "recipe.yaml"
    with path.open("w") as file:
        YAML().dump(recipe_of(given, precision(given.precision)), file)
    recipe = load_any(path)
    dtype = recipe.compute.precision
    layout = Layout(recipe.train.seed, recipe.train.batch_size)
    task: Any = load_task(recipe, layout, Place(torch.device("cpu"), DTYPES[dtype], False))
    state = {name.removeprefix("unet."): tensor for name, tensor in task.adapter_state().items()}
    save_file(state, given.work / "initial.safetensors")
    if isinstance(recipe, LlamaRecipe):
        own = prepare_llama(recipe, task, given)
    else:
        own = prepare_sd(recipe, task, given)
    Plan(
        recipe=str(path),
        precision=dtype,
        steps=given.steps,
        warmup=given.warmup,
        batch=given.batch,
        rank=recipe.adapter.rank,
        targets=sorted({name.rpartition(".lora_")[0] for name in state}),
        learning_rate=recipe.optimizer.learning_rate,
        weight_decay=recipe.optimizer.weight_decay,
        clip=recipe.optimizer.clip,
        trainable=sum(tensor.numel() for tensor in state.values()),
        **own,
    ).save(given.work)


if __name__ == "__main__":
    main()
