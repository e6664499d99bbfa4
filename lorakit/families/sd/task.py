"""Stable Diffusion as a task of the training loop: load, loss, held-out loss, sample pictures, save."""

import dataclasses
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.adapters.inject import adapter_parameters, adapter_state, inject, load_adapter_state
from lorakit.adapters.linear import plain_layers
from lorakit.adapters.outline import adaptable
from lorakit.adapters.targets import Injection
from lorakit.adapters.write import deltas, version_of, write_kohya, write_peft
from lorakit.data.arrange import resolution_of, sizes_of
from lorakit.errors import ModelError
from lorakit.families.place import Place
from lorakit.families.sd.attention import diffusers_attention
from lorakit.families.sd.base import Parts, load_parts, noise_schedule
from lorakit.families.sd.batches import BatchMaker, SDBatch
from lorakit.families.sd.conditioning import Text, cut_captions, ids_of
from lorakit.families.sd.drawing import DrawSettings
from lorakit.families.sd.find import find_base
from lorakit.families.sd.generate import Painter
from lorakit.families.sd.layers import diffusers_layers, without_checkpointing
from lorakit.families.sd.pictures import grid, save_picture
from lorakit.families.sd.prepare import Examples, TextStates, prepare_examples
from lorakit.families.sd.targets import split_adapter
from lorakit.families.task import Batch, origin
from lorakit.numerics.order import Layout, mix
from lorakit.recipe.schema import Diffusion, PictureData, SDAdapter, SDBase, SDOptimizer, SDSample, SDTrain
from lorakit.storage.atomic import new_file, new_folder
from lorakit.storage.bases import BaseLocation, base_id, texts

logger = logging.getLogger("lorakit")


@dataclass(frozen=True)
class Learning:
    """What is learned from: the loss's settings, and the peak rates of UNet and text encoder."""

    diffusion: Diffusion
    learning_rate: float
    text_encoder_learning_rate: float

    @classmethod
    def of(cls, train: SDTrain, optimizer: SDOptimizer) -> "Learning":
        """From the recipe's sections; the text encoder's rate is half the UNet's when not given."""
        rate = optimizer.text_encoder_learning_rate
        return cls(train, optimizer.learning_rate, optimizer.learning_rate / 2 if rate is None else rate)


class Denoiser(nn.Module):
    """UNet, with the text encoders where they are trained too."""

    def __init__(self, parts: Parts, trained: Collection[str], dtype: torch.dtype) -> None:
        super().__init__()
        self.unet = parts.unet
        self.encoders = nn.ModuleDict({n: m for n, m in parts.conditioning.encoders.items() if n in trained})
        self.conditioning = parts.conditioning
        self.dtype = dtype

    def forward(self, inputs: Sequence[tuple[Tensor, Tensor, Text, Tensor]]) -> list[Tensor]:
        """Predictions, float32 [n, C, H, W], for each (noisy latents, timesteps [n], captions, frames [n, 6])."""
        predictions = []
        for noisy, timesteps, text, frames in inputs:
            encoded = self.conditioning.encode(text["ids"]) if self.encoders else text
            told = self.conditioning.arguments(encoded, frames, self.dtype)
            predicted = self.unet(noisy.to(self.dtype), timesteps, **told, return_dict=False)[0]
            predictions.append(predicted.float())
        return predictions

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile what does not change shape but in its tokens: each transformer block's feed-forward."""
        for name, module in self.unet.named_modules():
            if name.endswith(".ff"):
                module.compile(*args, dynamic=True, **kwargs)


class SDTask:
    """A Stable Diffusion with LoRA, and the pictures it trains on (``families.task.Task``)."""

    def __init__(self, parts: Parts, learning: Learning, sampling: SDSample, layout: Layout, loaded: "_Loaded") -> None:
        self.model: nn.Module = Denoiser(parts, loaded.injections.keys(), loaded.dtype)
        self.steps_per_epoch = len(loaded.examples.train) / layout.batch_size
        self.base_id = base_id(loaded.location)
        self.base_texts = texts(loaded.location)
        self.fingerprint = loaded.examples.fingerprint()
        self.generate_options: Sequence[str] = ()
        self.examples = loaded.examples
        self.parts = parts
        self._loaded = loaded
        self._learning = learning
        self._sampling = sampling
        self._layout = layout

    @property
    def _components(self) -> dict[str, nn.Module]:
        return {name: self.parts.adaptable[name] for name in self._loaded.injections}

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        first, others = self._learning.learning_rate, self._learning.text_encoder_learning_rate
        components = self._components.items()
        return [(list(adapter_parameters(m).values()), first if n == "unet" else others) for n, m in components]

    def batches(self, split: str, start: int) -> Iterator[Batch]:
        maker = self._loaded.maker
        return maker.train(self._layout, start) if split == "train" else maker.held_out(self._layout)

    def loss(self, batch: Batch) -> Tensor:
        """Sum over pictures of weight times the mean squared error of a picture's latents."""
        groups = cast(SDBatch, batch).groups
        predictions = self.model([(g.noisy, g.timesteps, g.text, g.frames) for g in groups])
        sums = [
            (g.weight * (predicted - g.target).square().mean((1, 2, 3))).sum()
            for g, predicted in zip(groups, predictions, strict=True)
        ]
        return torch.stack(sums).sum()

    def plain_loss(self, batch: Batch, dtype: torch.dtype) -> Tensor:
        """diffusers' UNet with PEFT's layers and diffusers' own attention, its activations kept: the backward pass
        comes when all of them have gone."""
        denoiser, unet = cast(Denoiser, self.model), self.parts.unet
        if denoiser.dtype != dtype:
            denoiser.to(dtype).dtype = dtype
        with plain_layers(denoiser), diffusers_attention(unet), diffusers_layers(unet), without_checkpointing(unet):
            return self.loss(batch)

    def metrics(self, held_out_loss: float) -> Mapping[str, float]:  # noqa: ARG002 (the loss says it all)
        return {}

    def sample(self, out: Path) -> None:
        """A picture a prompt, 000.png and so on, and all of them in grid.png."""
        prompts = self._sampling.prompts
        if not prompts:
            return
        painter = Painter(self.parts, self.base_id, [{"adapter": "in training"}])
        with _on(painter.device, self._loaded.idle):
            drawn = painter.draw(prompts, self._loaded.drawing)
        for number, (picture, settings) in enumerate(drawn):
            save_picture(picture, settings, out / f"{number:03d}.png")
        save_picture(grid([picture for picture, _ in drawn], prompts), {}, out / "grid.png")

    def adapter_state(self) -> dict[str, Tensor]:
        return {f"{name}.{k}": v for name, m in self._components.items() for k, v in adapter_state(m).items()}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        known = tuple(f"{name}." for name in self._components)
        for key in state:
            if not key.startswith(known):
                raise ModelError("the adapter has a tensor that this recipe does not train", where=key)
        for name, module in self._components.items():
            prefix = f"{name}."
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            load_adapter_state(module, own)

    def save(self, out: Path, name: str, recipe: Mapping[str, Any] | None = None) -> None:
        """Write ``adapter/unet`` (and the text encoders beside it) as PEFT, and NAME.safetensors as kohya."""
        changes = {}
        strings = origin(name, self.base_id, recipe)
        base_name = self._loaded.location.name
        with new_folder(out / "adapter", manifest=False, replace=True) as folder:
            for component, module in self._components.items():
                state, injection = adapter_state(module), self._loaded.injections[component]
                write_peft(folder / component, state, injection, base_name=base_name, metadata=strings)
                changes[component] = deltas(state, injection)
        with new_file(out / f"{name}.safetensors", replace=True) as path:
            write_kohya(
                path,
                changes,
                title=name,
                version=version_of(self.parts.adaptable),
                prediction_type=self._loaded.maker.kind,
                resolution=resolution_of(self._loaded.maker.data, self.parts.size),
                models=self.parts.adaptable,
                metadata=strings,
            )


@dataclass(frozen=True)
class _Loaded:
    """What ``load`` made beside the parts."""

    location: BaseLocation
    dtype: torch.dtype
    examples: Examples
    maker: BatchMaker
    injections: Mapping[str, Injection]
    drawing: DrawSettings
    idle: Sequence[nn.Module]
    """What no step needs once all is cached, and samples alone do: on the CPU meanwhile."""


def load(
    base: SDBase,
    adapter: SDAdapter,
    data: PictureData,
    learning: Learning,
    sample: SDSample,
    layout: Layout,
    place: Place,
) -> SDTask:
    """Load the base on ``place``, prepare the pictures, inject LoRA: a task ready to train.

    Raises: ModelError for the base, DataError for the pictures, RecipeError for settings that do not fit the base.
    """
    location = find_base(base)
    parts = load_parts(location, dataclasses.replace(place, device=torch.device("cpu")))
    for module in (parts.vae, *parts.conditioning.encoders.values()):
        module.to(place.device)
    schedule = noise_schedule(parts.schedule, location.name)
    drawing = DrawSettings.from_recipe(sample)
    drawing.check(parts.size, parts.factor, "sample.")
    injections = _inject(parts, adapter, layout.seed)
    sizes = sizes_of(data, parts.factor, parts.size)
    examples = prepare_examples(data, parts.vae, sizes, layout)
    _tell_cut_captions(parts, examples)
    text = _text_source(parts, data, adapter, examples)
    maker = BatchMaker(examples, schedule, parts.vae, (data, learning.diffusion), text)
    if place.gradient_checkpointing:  # the text encoder's activations are few beside the UNet's
        cast(Any, parts.unet).enable_gradient_checkpointing()
    cached = not adapter.text_encoder and not data.shuffle_tags
    idle: list[nn.Module] = [parts.vae, *(parts.conditioning.encoders.values() if cached else ())]
    for module in idle:
        module.to("cpu" if sample.prompts else "meta")
    parts.unet.to(place.device)  # after what a GPU would otherwise need at once with it
    loaded = _Loaded(location, place.dtype, examples, maker, injections, drawing, idle)
    return SDTask(parts, learning, sample, layout, loaded)


def _inject(parts: Parts, adapter: SDAdapter, seed: int) -> dict[str, Injection]:
    modules = parts.adaptable
    sections = split_adapter(adapter, {name: adaptable(module) for name, module in modules.items()})
    return {
        name: inject(modules[name], section, groups, seed=mix(seed, 6, number))
        for number, (name, (section, groups)) in enumerate(sections.items())
    }


def _tell_cut_captions(parts: Parts, examples: Examples) -> None:
    captions = [example.caption for example in (*examples.train, *examples.held_out)]
    if cut := cut_captions(parts.conditioning, captions):
        length = min(tokenizer.model_max_length for tokenizer in parts.conditioning.tokenizers)
        logger.warning(
            "%d captions are longer than %d tokens; the text encoder does not see their ends", cut, length - 2
        )


@contextmanager
def _on(device: torch.device, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules of the CPU on ``device`` in the block."""
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module in modules:
            module.to("cpu")


def _text_source(parts: Parts, data: PictureData, adapter: SDAdapter, examples: Examples) -> Any:
    """Captions to what a batch carries: token ids where the text encoders are trained, else what these say.

    Shuffled captions hardly come twice, so their states are computed on the fly.
    """
    if adapter.text_encoder:
        return lambda captions: {"ids": ids_of(parts.conditioning, captions)}
    store = TextStates(parts, cached=not data.shuffle_tags)
    if store.cached:
        store.fill(["", *(example.caption for example in (*examples.train, *examples.held_out))])
    return store.states
