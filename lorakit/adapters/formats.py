"""The key tables of the adapter formats: which tensor of a file is which part of which module.

Flat names (kohya's) come from a table made of the model's own module paths, never from replacing "_" by ".", which
would be ambiguous.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from lorakit.errors import ModelError

Format = Literal["peft", "kohya", "diffusers"]
Part = Literal["A", "B", "alpha", "magnitude"]


class Key(NamedTuple):
    """One tensor of a file: ``model``, ``unet`` or ``text_encoder``; the module's path or flat name; what it is."""

    component: str
    module: str
    part: Part


_PREFIXES: dict[Format, tuple[str, ...]] = {
    "peft": ("base_model.model.",),
    "kohya": ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_"),
    "diffusers": ("unet.", "text_encoder.", "text_encoder_2."),
}

_SUFFIXES: dict[Format, dict[str, Part]] = {
    "peft": {
        ".lora_A.weight": "A",
        ".lora_B.weight": "B",
        ".lora_magnitude_vector": "magnitude",
        ".lora_magnitude_vector.weight": "magnitude",
    },
    "kohya": {
        ".lora_down.weight": "A",
        ".lora_up.weight": "B",
        ".alpha": "alpha",
        ".dora_scale": "magnitude",
    },
    "diffusers": {
        ".lora_A.weight": "A",
        ".lora_B.weight": "B",
        ".lora.down.weight": "A",
        ".lora.up.weight": "B",
        ".lora_linear_layer.down.weight": "A",
        ".lora_linear_layer.up.weight": "B",
        ".lora_magnitude_vector": "magnitude",
        ".lora_magnitude_vector.weight": "magnitude",
    },
}

_PROCESSOR = re.compile(r"(.*)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
_LYCORIS = ("hada_", "lokr_", "lora_mid", "oft_", "glora", "a1.weight", "b1.weight")
_SDXL = "an adapter for Stable Diffusion XL, which is not supported yet (it comes next)"


def detect(keys: Iterable[str]) -> Format:
    """The format that all keys belong to; ModelError naming a key of none, or one of a second format."""
    first: dict[Format, str] = {}
    for key in keys:
        found = next((form for form, prefixes in _PREFIXES.items() if key.startswith(prefixes)), None)
        if found is None:
            raise ModelError("a key of no known adapter format (PEFT, diffusers, kohya)", where=key)
        first.setdefault(found, key)
    if len(first) > 1:
        raise ModelError(f"keys of several formats ({', '.join(sorted(first))})", where=", ".join(first.values()))
    if not first:
        raise ModelError("no tensors")
    return next(iter(first))


def split(key: str, form: Format, component: str = "model") -> Key:
    """A tensor's name taken apart; ``component`` is what a PEFT file is for. ModelError for a part it cannot have."""
    prefix = next(p for p in _PREFIXES[form] if key.startswith(p))
    if prefix in ("lora_te1_", "lora_te2_", "text_encoder_2."):
        raise ModelError(_SDXL, where=key)
    if form == "diffusers" and (old := _PROCESSOR.fullmatch(key.removeprefix(prefix))):
        module = f"{old[1]}.{old[2]}" + (".0" if old[2] == "to_out" else "")
        return Key(prefix.rstrip("."), module, "A" if old[3] == "down" else "B")
    suffix = next((s for s in sorted(_SUFFIXES[form], key=len, reverse=True) if key.endswith(s)), None)
    if suffix is None:
        kind = "a LyCORIS tensor (LoHa, LoKr, …), not LoRA" if any(k in key for k in _LYCORIS) else "not a part of LoRA"
        raise ModelError(kind, where=key)
    names = {"lora_unet_": "unet", "lora_te_": "text_encoder", "unet.": "unet", "text_encoder.": "text_encoder"}
    module = key.removesuffix(suffix)
    if form != "kohya":
        module = module.removeprefix(prefix)
    return Key(names.get(prefix, component), module, _SUFFIXES[form][suffix])


def kohya_name(component: str, path: str) -> str:
    """kohya's flat name of a module of ``unet`` or ``text_encoder``."""
    if component == "text_encoder":
        return f"lora_te_text_model_{path.removeprefix('text_model.').replace('.', '_')}"
    return f"lora_unet_{path.replace('.', '_')}"


def kohya_table(components: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, str]]:
    """Flat name -> (component, module path), for all module paths of the components; ModelError when two collide."""
    table: dict[str, tuple[str, str]] = {}
    for component, paths in components.items():
        for path in paths:
            name = kohya_name(component, path)
            if name in table:
                raise ModelError(f"{path} and {table[name][1]} share one flat name", where=name)
            table[name] = (component, path)
    return table


def flat_path(name: str, table: Mapping[str, tuple[str, str]]) -> str:
    """The module path behind a flat name; ModelError for a name that the base's table has not."""
    if name not in table:
        other = any(part in name for part in ("input_blocks", "middle_block", "output_blocks"))
        raise ModelError(_SDXL if other else "the base has no such module", where=name)
    return table[name][1]
