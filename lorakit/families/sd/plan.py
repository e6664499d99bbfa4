"""What a Stable Diffusion recipe would do, worked out without reading any weights."""

from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.adapters.targets import Target, injection
from lorakit.data.arrange import sizes_of, survey
from lorakit.data.cache import content_key, remembered
from lorakit.data.images import Size, read_size
from lorakit.families.place import Place
from lorakit.families.sd.drawing import DrawSettings
from lorakit.families.sd.facts import facts_of, identity
from lorakit.families.sd.find import find_base
from lorakit.families.sd.targets import split_adapter
from lorakit.numerics.order import Layout
from lorakit.recipe.schema import PictureData, SDAdapter, SDBase, SDSample
from lorakit.storage.bases import BaseLocation


@dataclass(frozen=True)
class SDPlan:
    """What ``load`` and training would make of a recipe."""

    modules: tuple[Target, ...]
    """The layers that get LoRA, their component in front, with features in and out and rank."""
    total_parameters: int
    """Of the base: UNet, text encoder and VAE."""
    trainable_parameters: int
    memory: dict[str, int]
    """Estimated bytes by component. ``gradients`` and the optimizer's state go by ``trainable_parameters``."""
    pictures: int
    """Examples of one epoch: training pictures, mirrored ones and repeats counted."""
    held_out: int
    buckets: dict[Size, int]
    """Examples of one epoch by size (width, height) in pixels; empty sizes left out."""
    notes: tuple[str, ...]
    """Pictures that on_bad "skip" leaves out, as far as their headers tell."""
    steps_per_epoch: float

    @property
    def examples(self) -> str:
        """What is learned from, in one line."""
        sizes = ", ".join(f"{width}x{height}: {count}" for (width, height), count in sorted(self.buckets.items()))
        return f"{self.pictures} pictures an epoch, {self.held_out} held out; sizes {sizes}"


def plan(base: SDBase, adapter: SDAdapter, data: PictureData, sample: SDSample, layout: Layout, place: Place) -> SDPlan:
    """Raises what ``load`` would raise, but for weights and pixels that cannot be read."""
    location = find_base(base)
    facts = facts_of(location)
    DrawSettings.from_recipe(sample).check(facts.size, facts.factor, "sample.")
    targets: list[Target] = []
    trainable = 0
    for component, (section, groups) in split_adapter(adapter, facts.layers).items():
        layers = facts.outlines[component].layers
        for target in injection(facts.outlines[component], section, groups).targets:
            trainable += layers[target.name].lora_parameters(target.rank, dora=adapter.dora)
            targets.append(target._replace(name=f"{component}.{target.name}"))
    sizes = sizes_of(data, facts.factor, facts.size)
    found = survey(data, sizes, layout.seed, lambda picture: read_size(picture.read(), picture.id))
    largest = max(found.examples, key=lambda size: size[0] * size[1])
    adaptable = sum(outline.parameters for outline in facts.outlines.values())
    memory = {
        "base weights": adaptable * place.dtype.itemsize + facts.vae_parameters * 4,
        "adapter": 4 * trainable,
        "gradients": 4 * trainable,
        "activations": _activation_bytes(location, adapter, targets, largest, layout.micro_batch, place),
    }
    pictures = found.examples.total()
    return SDPlan(
        modules=tuple(targets),
        total_parameters=adaptable + facts.vae_parameters,
        trainable_parameters=trainable,
        memory=memory,
        pictures=pictures,
        held_out=found.held_out,
        buckets=dict(found.examples),
        notes=tuple(map(str, found.left_out)),
        steps_per_epoch=pictures / layout.batch_size,
    )


def _activation_bytes(
    location: BaseLocation, adapter: SDAdapter, targets: Sequence[Target], size: Size, batch: int, place: Place
) -> int:
    """What a micro-batch of the largest pictures keeps for its backward pass."""

    def make() -> tuple[int, int]:
        from lorakit.families.sd.activations import activation_bytes  # with diffusers

        return activation_bytes(location, adapter, size, place)

    what = repr((targets, adapter.dora, adapter.dropout, size, str(place.dtype), place.gradient_checkpointing))
    whole, each = remembered("activations", content_key("sd 1", identity(location), what), make)
    return int(whole + batch * each)
