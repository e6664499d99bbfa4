"""The key tables of the adapter formats: which tensor of a file is which part of which module.

Flat names (kohya's) come from a table made of the model's own module paths, never from replacing "_" by ".", which
would be ambiguous.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Literal, NamedTuple

from lorakit.adapters.sgm import original_paths
from lorakit.errors import ModelError

Format = Literal["peft", "kohya", "diffusers", "gguf"]
Part = Literal["A", "core", "B", "alpha", "magnitude"]


class Key(NamedTuple):
    """One tensor of a file: ``model``, ``unet``, ``text_encoder`` or ``text_encoder_2``; the module's path, or its name
    in the format's own spelling; what it is of the module."""

    component: str
    module: str
    part: Part


_ORIGINALS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
"""How the original names of a UNet's layers begin."""
_PREFIXES: dict[Format, dict[str, str]] = {
    "peft": {"base_model.model.": "model"},
    "kohya": {
        "lora_unet_": "unet",
        "lora_te_": "text_encoder",
        "lora_te1_": "text_encoder",
        "lora_te2_": "text_encoder_2",
        "lycoris_": "unet",
        "diffusion_model.": "unet",
        "text_encoders.clip_l.transformer.": "text_encoder",
        "text_encoders.clip_h.transformer.": "text_encoder",
        "text_encoders.clip_g.transformer.": "text_encoder_2",
        "lora_unet.": "unet",
        "lora_te.": "text_encoder",
        "lora_te1.": "text_encoder",
        "lora_te2.": "text_encoder_2",
        **{f"{front}{original}": "unet" for front in ("unet.", "") for original in _ORIGINALS},
        "clip_l.": "text_encoder",
        "clip_g.": "text_encoder_2",
    },
    "diffusers": {
        "unet.": "unet",
        "text_encoder.": "text_encoder",
        "text_encoder_2.": "text_encoder_2",
        "down_blocks.": "unet",
        "mid_block.": "unet",
        "up_blocks.": "unet",
        "conv_in.": "unet",
        "conv_out.": "unet",
        "time_embedding.": "unet",
        "add_embedding.": "unet",
    },
    "gguf": {"blk.": "model", "output.": "model", "token_embd.": "model"},
}
"""How keys begin, and the component that this means. Before diffusers 0.17 a UNet's had no name in front, and
``UNet2DConditionModel.save_lora_adapter`` still writes none. Of kohya's, ``lycoris_`` is that of LyCORIS where
sd-scripts does not call it; those with dots in place of ``_`` are ComfyUI's, OneTrainer's, and the Open Model
Initiative's, which are a UNet's original names and ``clip_l.`` and ``clip_g.``."""

_SUFFIXES: dict[Format, dict[str, Part]] = {
    "peft": {
        ".lora_A.weight": "A",
        ".lora_B.weight": "B",
        ".lora_magnitude_vector": "magnitude",
        ".lora_magnitude_vector.weight": "magnitude",
        ".lora_A.default.weight": "A",
        ".lora_B.default.weight": "B",
        ".lora_magnitude_vector.default.weight": "magnitude",
    },
    "kohya": {
        ".lora_down.weight": "A",
        ".lora_mid.weight": "core",
        ".lora_up.weight": "B",
        ".lora_A.weight": "A",
        ".lora_B.weight": "B",
        ".alpha": "alpha",
        ".dora_scale": "magnitude",
    },
    "diffusers": {
        ".lora_A.weight": "A",
        ".lora_B.weight": "B",
        ".lora_A.default.weight": "A",
        ".lora_B.default.weight": "B",
        ".lora.down.weight": "A",
        ".lora.up.weight": "B",
        ".lora_linear_layer.down.weight": "A",
        ".lora_linear_layer.up.weight": "B",
        ".lora_down.weight": "A",
        ".lora_up.weight": "B",
        ".alpha": "alpha",
        ".dora_scale": "magnitude",
        ".lora_magnitude_vector": "magnitude",
        ".lora_magnitude_vector.weight": "magnitude",
    },
    "gguf": {".weight.lora_a": "A", ".weight.lora_b": "B"},
}

_OLD = re.compile(r"(.*?)(?:\.processor)?\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
"""diffusers' names for the layers beside an attention, before it took PEFT's."""
_OLD_LAYERS = {
    "unet": {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"},
    "text": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}
_TRANSFORMERS = re.compile(
    r"(lora_unet_|lycoris_|diffusion_model\.|base_model\.model\.)?(double_|single_|joint_|(single_)?transformer_)?blocks[._]"
    r"|(lora_)?transformer[._]|lora_te3_|text_encoder_3\."
)
"""How keys begin in adapters for Flux, Stable Diffusion 3, Wan and their like."""
_OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "on_input": "(IA)^3",
    r"\.[ab]1\.weight$": "GLoRA",
    r"\.diff(_b)?$": "a full difference of weights",
    r"\.[wb]_norm$": "with trained norms",
    r"\.scalar$": "with trained scalars",
}
"""LyCORIS kinds by expressions for what their keys contain."""
_CONVERTED = {"unet": ("lora_unet",), "text_encoder": ("lora_te", "lora_te1"), "text_encoder_2": ("lora_te2",)}
"""How diffusers' converter, and those that know its files, begin the flat names of a component."""
_UNATTENDED = re.compile(r"(?<=\d)\.1\.conv$")
"""The original name's end of an upsampler that no attention comes before; some versions of OneTrainer count one."""


def detect(keys: Iterable[str]) -> Format:
    """The format that all keys belong to; ModelError naming a key of none, or one of a second format."""
    first: dict[Format, str] = {}
    for key in keys:
        if _TRANSFORMERS.match(key):
            reason = "made for a diffusion transformer (Flux, SD 3, Wan …), not for SD 1.x, 2.x or XL"
            raise ModelError(reason, where=key)
        found = next((form for form, prefixes in _PREFIXES.items() if key.startswith(tuple(prefixes))), None)
        if found is None:
            reason = "a key of no known adapter format (PEFT, diffusers, kohya, GGUF)"
            if key.startswith("bundle_emb."):
                reason = "an embedding is bundled with the adapter, which lorakit does not read"
            raise ModelError(reason, where=key)
        first.setdefault(found, key)
    if len(first) > 1:
        raise ModelError(f"keys of several formats ({', '.join(sorted(first))})", where=", ".join(first.values()))
    if not first:
        raise ModelError("no tensors")
    return next(iter(first))


def split(key: str, form: Format, component: str | None = None) -> Key:
    """A tensor's name taken apart; ``component`` is what a PEFT file is for. ModelError for a part it cannot have."""
    prefix = next(p for p in _PREFIXES[form] if key.startswith(p))
    component = component or _PREFIXES[form][prefix]
    named = form == "peft" or prefix.removesuffix(".") == component
    path = key.removeprefix(prefix) if named else key
    if form == "diffusers":
        path = path.removeprefix("base_model.model.")  # a PEFT model's, as scripts for distilling leave it
    if form == "diffusers" and (old := _OLD.fullmatch(path)):
        layer = _OLD_LAYERS["unet" if component == "unet" else "text"][old[2]]
        return Key(component, f"{old[1]}.{layer}", "A" if old[3] == "down" else "B")
    suffix = next((s for s in sorted(_SUFFIXES[form], key=len, reverse=True) if path.endswith(s)), None)
    if suffix is None:
        raise ModelError("not a part of LoRA", where=key)
    module = path.removesuffix(suffix)
    if form == "kohya" and (prefix.endswith(".") or prefix == "lycoris_"):
        name = module.removeprefix("unet." if prefix.endswith(_ORIGINALS) else prefix)
        module = f"{_CONVERTED[component][-1]}_{name.replace('.', '_')}"
    return Key(component, module, _SUFFIXES[form][suffix])


def refuse_other_kinds(keys: Iterable[str]) -> None:
    """ModelError for an adapter of LyCORIS' that is not LoRA, by the first key that says so."""
    for key in keys:
        for part, kind in _OTHER_KINDS.items():
            if re.search(part, key):
                raise ModelError(f"the adapter is {kind} (LyCORIS), not LoRA", where=key)


def is_xl(layers: Mapping[str, Collection[str]]) -> bool:
    """Whether the layers, by component, are Stable Diffusion XL's."""
    return "text_encoder_2" in layers or "add_embedding.linear_1" in layers.get("unet", ())


def kohya_names(layers: Mapping[str, Collection[str]]) -> dict[tuple[str, str], str]:
    """kohya's flat names for all layers of a base's UNet and text encoders, by (component, path). SDXL's UNet goes by
    its original names.

    Raises ModelError when two layers share a name.
    """
    xl = is_xl(layers)
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if xl else "lora_te", "text_encoder_2": "lora_te2"}
    found: dict[tuple[str, str], str] = {}
    owners: dict[str, str] = {}
    for component in (name for name in prefixes if name in layers):
        paths = layers[component]
        spelt = original_paths(paths) if xl and component == "unet" else {path: long(component, path) for path in paths}
        for path, spelling in spelt.items():
            name = f"{prefixes[component]}_{spelling.replace('.', '_')}"
            if name in owners:
                raise ModelError(f"{path} and {owners[name]} share one flat name", where=name)
            found[component, path], owners[name] = name, path
    return found


def bare(name: str) -> str:
    """A module's or a tensor's name without what some versions of transformers put before all of CLIP's."""
    return name.removeprefix("text_model.")


def long(component: str, name: str) -> str:
    """A module's or a tensor's name, CLIP's with the ``text_model.`` in front that newer versions of transformers leave
    out: the opposite of ``bare``."""
    whole = not component.startswith("text_encoder") or name.startswith(("text_model.", "text_projection"))
    return name if whole else f"text_model.{name}"


def kohya_table(layers: Mapping[str, Collection[str]]) -> dict[str, tuple[str, str]]:
    """Flat name -> (component, path), for all layers of a base, and the names that diffusers' own converter gives: of
    SDXL's UNet diffusers' paths, of a single text encoder those of SDXL's first, of both without ``text_model.``; and
    every UNet's original names, which ComfyUI writes."""
    table: dict[str, tuple[str, str]] = {}
    with suppress(ModelError):  # a UNet of another make
        for path, name in original_paths(layers.get("unet", ())).items():
            for original in (name, _UNATTENDED.sub(".2.conv", name)):
                table[f"lora_unet_{original.replace('.', '_')}"] = ("unet", path)
    for component, spellings in _CONVERTED.items():
        for path in layers.get(component, ()):
            names = {path, bare(path), long(component, path)}
            table |= {f"{start}_{name.replace('.', '_')}": (component, path) for start in spellings for name in names}
    return table | {name: place for place, name in kohya_names(layers).items()}


def flat_path(name: str, table: Mapping[str, tuple[str, str]]) -> str:
    """The module path behind a flat name; ModelError for a name that the base's table has not."""
    if name not in table:
        original = any(part in name for part in ("input_blocks", "middle_block", "output_blocks"))
        xl = (original or name.startswith("lora_te2_")) and not any(c == "text_encoder_2" for c, _ in table.values())
        reason = "the base has no such module" + (": this adapter is for Stable Diffusion XL" if xl else "")
        raise ModelError(reason, where=name)
    return table[name][1]


def diffusers_name(component: str, path: str) -> str:
    """A tensor's name in a diffusers file; CLIP's with the ``text_model.`` that all readers know, and its magnitudes as
    transformers' ``load_adapter`` finds them, which a text encoder goes through and a UNet does not."""
    end = ".weight" if path.endswith(".lora_magnitude_vector") and component.startswith("text_encoder") else ""
    return f"{component}.{long(component, path)}{end}"
