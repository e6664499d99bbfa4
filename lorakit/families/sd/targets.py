"""Which layers of UNet and text encoder the groups and patterns of a recipe mean."""

from collections.abc import Collection, Mapping, Sequence

from lorakit.adapters.targets import matches
from lorakit.errors import RecipeError
from lorakit.recipe.schema import Adapter, SDAdapter

Groups = Mapping[str, Sequence[str]]

_UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
UNET_GROUPS: Groups = {
    "attention": _UNET_ATTENTION,
    "attention+mlp": (*_UNET_ATTENTION, "ff.net.0.proj", "ff.net.2"),
}
TEXT_GROUPS: Groups = {"attention": _TEXT_ATTENTION, "attention+mlp": (*_TEXT_ATTENTION, "fc1", "fc2")}


def split_adapter(adapter: SDAdapter, layers: Mapping[str, Collection[str]]) -> dict[str, tuple[Adapter, Groups]]:
    """The adapter section and groups for ``unet`` and, where they are trained, the text encoders; ``layers`` are the
    paths of each component's that can have LoRA.

    With all trained, a pattern goes to every component that has such a layer; one that fits none stays with the UNet,
    where it is refused. A text encoder that no target fits is left out.

    Raises RecipeError when the targets leave the UNet, or all text encoders that are to be trained, without any.
    """
    if not adapter.text_encoder:
        return {"unet": (adapter, UNET_GROUPS)}

    def fits(pattern: str, names: Collection[str]) -> bool:
        return any(matches(name, pattern) for name in names)

    def section(component: str) -> Adapter:
        def ours(pattern: str) -> bool:
            nobodys = component == "unet" and not any(fits(pattern, others) for others in layers.values())
            return nobodys or fits(pattern, layers[component])

        targets = adapter.targets
        return adapter.model_copy(
            update={
                "targets": targets if isinstance(targets, str) else [p for p in targets if ours(p)],
                "rank_pattern": {p: rank for p, rank in adapter.rank_pattern.items() if ours(p)},
                "alpha_pattern": {p: alpha for p, alpha in adapter.alpha_pattern.items() if ours(p)},
            }
        )

    found = {name: (section(name), UNET_GROUPS if name == "unet" else TEXT_GROUPS) for name in layers}
    found = {name: (own, groups) for name, (own, groups) in found.items() if own.targets}
    if "unet" not in found:
        raise RecipeError("none of them is a layer of the UNet", where="adapter.targets")
    if len(found) == 1:
        hint = "add q_proj, k_proj, v_proj and out_proj to adapter.targets, or leave text_encoder out"
        raise RecipeError(
            "none of adapter.targets is a layer of a text encoder", where="adapter.text_encoder", hint=hint
        )
    return found
