"""Training steps and generation where the model is not on the CPU, as on a GPU. PyTorch's meta device refuses
to copy a number from it, for which a GPU would have to wait; a dispatch mode refuses operations on two devices."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from lorakit.families.llama import task as llama
from lorakit.families.llama.decode import AnyModel, PlainLlama
from lorakit.families.place import Place
from lorakit.families.sd import task as sd
from lorakit.families.sd.drawing import SCHEDULERS, DrawSettings
from lorakit.families.sd.generate import Painter, open_painter
from lorakit.families.task import Task
from lorakit.numerics.order import Layout
from lorakit.recipe.schema import (
    Adapter,
    ChatData,
    LlamaBase,
    LlamaSample,
    PictureData,
    SDAdapter,
    SDBase,
    SDOptimizer,
    SDSample,
    SDTrain,
)
from lorakit.storage.bases import resolve
from tests.tiny import tiny_llama, tiny_sd, tiny_sdxl

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'
META = torch.device("meta")
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
LAYOUT = Layout(seed=0, batch_size=4)
PLACES = [Place(torch.device("cpu"), torch.float32), Place(torch.device("cpu"), torch.bfloat16, True)]
EVERYTHING: dict[str, Any] = {"dora": True, "dropout": 0.1, "targets": "all-linear"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("bases")
    return {"llama": str(tiny_llama(root / "l")), "sd": str(tiny_sd(root / "s")), "sdxl": str(tiny_sdxl(root / "x"))}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [
        [{"role": "user", "content": "word " * n}, {"role": "assistant", "content": f"answer {n}"}] for n in range(1, 9)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for n in range(8):
        Image.fromarray(random.integers(0, 255, (40 if n % 2 else 64, 64, 3), np.uint8)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"picture {n}")
    return folder


class OneDevice(TorchDispatchMode):
    """Refuses tensors of two devices in one operation, as a GPU's kernels do, but for copies and single numbers."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()]
        if function not in COPIES and len({tensor.device for tensor in tensors}) > 1:
            raise RuntimeError(f"{function} on two devices")
        return function(*args, **(kwargs or {}))


def step(task: Task) -> None:
    """One forward and backward pass, which leaves gradients where the model is."""
    task.model.to(META).train()
    batch = next(iter(task.batches("train", 0))).to(META)
    with OneDevice():
        loss = task.loss(batch)
        loss.backward()
    gradients = [p.grad for parameters, _ in task.parameter_groups() for p in parameters if p.grad is not None]
    assert {tensor.device for tensor in [loss, *gradients]} == {META}
    assert gradients


class Mixing(torch.autograd.Function):
    """A backward pass that multiplies by what stayed on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return gradients[0] @ torch.ones(2, 2)


def test_what_a_gpu_refuses_is_refused() -> None:
    there, here = torch.ones(2, 2, device=META, requires_grad=True), torch.ones(2, 2)
    with OneDevice():
        for operation in (torch.mm, torch.add, torch.nn.functional.linear):
            with pytest.raises(RuntimeError):
                operation(there, here)
        with pytest.raises(RuntimeError, match="two devices"):
            Mixing.apply(there).sum().backward()
        with pytest.raises(RuntimeError):
            there.sum().item()
        with pytest.raises(RuntimeError):
            there.cpu()


@pytest.mark.parametrize("place", PLACES, ids=["fp32", "bf16, checkpointing"])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("adapter", [Adapter(rank=2), Adapter(rank=2, **EVERYTHING)], ids=["lora", "everything"])
def test_llama(bases: dict[str, str], chats: Path, place: Place, packing: bool, adapter: Adapter) -> None:
    data = ChatData.model_validate(
        {"train": [{"path": str(chats)}], "held_out": 0, "max_tokens": 64, "packing": packing}
    )
    base = LlamaBase(model=bases["llama"])
    step(llama.load(base, adapter, data, LlamaSample(), LAYOUT, place, learning_rate=1e-3))


@pytest.mark.parametrize(
    ("kind", "adapter", "place"),
    [
        ("sd", SDAdapter(rank=2), PLACES[0]),
        ("sd", SDAdapter(rank=2, text_encoder=True, **EVERYTHING), PLACES[0]),
        ("sd", SDAdapter(rank=2, text_encoder=True, **EVERYTHING), PLACES[1]),
        ("sdxl", SDAdapter(rank=2), PLACES[0]),
        ("sdxl", SDAdapter(rank=2, text_encoder=True), PLACES[1]),
    ],
)
def test_sd(
    bases: dict[str, str],
    pictures: Path,
    kind: str,
    adapter: SDAdapter,
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    data = PictureData(path=str(pictures), resolution=64, bucket_step=8, held_out=0)
    learning = sd.Learning.of(SDTrain(noise_offset=0.1, min_snr_gamma=5), SDOptimizer())
    step(sd.load(SDBase(model=bases[kind]), adapter, data, learning, SDSample(), LAYOUT, place))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [PlainLlama, AnyModel])
def test_decoding(bases: dict[str, str], kind: type[PlainLlama | AnyModel], dtype: torch.dtype) -> None:
    """Rows of one length, then of two, as far as the kind takes them."""
    decoder = kind(AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=dtype).eval().to(META))
    with OneDevice():
        logits = [decoder.start(row, [1, 2, 3][row:]) for row in range(min(2, decoder.rows))]
        logits += [decoder.step([1]), decoder.step([1, 2][: decoder.rows])]
        decoder.move(min(1, decoder.rows - 1), 0)
    assert {tensor.device for tensor in logits} == {META}


@pytest.mark.parametrize(("kind", "names"), [("sd", SCHEDULERS), ("sdxl", [None])])
def test_drawing(bases: dict[str, str], kind: str, names: Iterable[str | None]) -> None:
    """No step waits for the device: schedulers look into their timesteps, which stay on the CPU."""
    parts = open_painter(resolve(bases[kind]), [], torch.device("cpu"), torch.bfloat16).parts
    for module in {parts.unet, *parts.adaptable.values()}:
        module.to(META)
    painter = Painter(parts, "a base", ())
    for name in names:
        settings = DrawSettings(steps=2, width=64, height=64, scheduler=name)
        with OneDevice():
            latents = painter._denoise(["a prompt"], [0], settings)
        assert latents.device == META
