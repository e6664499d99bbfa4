"""An adapter from one format to another, read back and compared before it takes its place.

A conversion is right when every module's change comes back within the rounding of the target's dtype and no module is
lost or new.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit.adapters import gguf_lora
from lorakit.adapters.delta import Delta, SavedAdapter, rescaled, told_as
from lorakit.adapters.delta import cast as to_dtype
from lorakit.adapters.files import read_adapter
from lorakit.adapters.formats import Format, bare
from lorakit.adapters.known import encoder_path
from lorakit.adapters.pieces import DIFFUSERS
from lorakit.adapters.write import taken_apart, version_of, with_one_alpha, write_diffusers, write_kohya, write_peft
from lorakit.errors import ConflictError, ModelError, RecipeError
from lorakit.storage.atomic import new_file, new_folder

Models = Mapping[str, nn.Module]
_ENDINGS: dict[Format, tuple[str, ...]] = {
    "peft": ("",),
    "diffusers": ("", ".safetensors"),
    "kohya": (".safetensors",),
    "gguf": (".gguf",),
}
"""How OUT may end; without an ending of a file it is a folder."""
FILES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
"""How names of files end, be they written or not."""
_FAMILIES: dict[Format, tuple[str, ...]] = {
    "peft": ("sd", "llama"),
    "diffusers": ("sd",),
    "kohya": ("sd",),
    "gguf": ("llama",),
}
ROWS = 1024
"""Of a module's change that are multiplied out at a time."""


@dataclass(frozen=True)
class Conversion:
    """What was written, and how far it is from what was read."""

    out: Path
    format: Format
    modules: int
    dtypes: str
    """Of the tensors written."""
    largest: float
    """Largest |dW_in - dW_out| over all modules; of DoRA's magnitudes too."""
    where: str
    """The module where that is."""


def convert(
    saved: SavedAdapter,
    out: Path,
    to: Format,
    *,
    models: Models | None,
    base_name: str,
    dtype: torch.dtype | None = None,
) -> Conversion:
    """Write ``saved`` as ``to``, read it back, compare, and only then let it take the place ``out``.

    ``models``: the base's components, on meta if need be; kohya and GGUF need them.
    ``dtype``: of the tensors; each keeps its own without it, but for GGUF, which gets float32 for bfloat16.

    Raises RecipeError for a format that the family or ``out`` does not fit, ConflictError when ``out`` exists, and
    ModelError when a module is lost or its change does not come back.
    """
    _check(saved, to, models, dtype)
    check_out(out, to)
    written = replace(saved, components=_cast(saved.components, to, dtype))
    if _ending(out):
        with new_file(out) as path:
            _write_file(path, out.stem, written, to, models, base_name)
            return _compared(saved, path, out, to, models)
    with new_folder(out, manifest=False) as folder:
        if to == "diffusers":
            _write_file(folder / DIFFUSERS, out.stem, written, to, models, base_name)
        else:
            _write_peft(folder, written, models, base_name)
        return _compared(saved, folder, out, to, models)


def _held(delta: Delta) -> Delta:
    """In a dtype that GGUF holds."""
    return delta if {delta.A.dtype, delta.B.dtype} == {torch.float16} else to_dtype(delta, torch.float32)


def _cast(
    components: Mapping[str, Mapping[str, Delta]], to: Format, dtype: torch.dtype | None
) -> dict[str, dict[str, Delta]]:
    """The changes in ``dtype``. What the format takes into B is so beforehand in float64, to be rounded once."""
    if dtype is None:
        return {c: {path: _held(d) if to == "gguf" else d for path, d in own.items()} for c, own in components.items()}
    exact = {c: {path: to_dtype(d, torch.float64) for path, d in own.items()} for c, own in components.items()}
    if to == "diffusers":
        exact = {c: {path: rescaled(d, 1.0) for path, d in own.items()} for c, own in exact.items()}
    elif to != "peft":
        _, exact = with_one_alpha(exact)
    return {c: {path: to_dtype(d, dtype) for path, d in own.items()} for c, own in exact.items()}


def check_out(out: Path, to: Format) -> None:
    """RecipeError when ``out`` does not end as ``to`` does, ConflictError when it exists."""
    if _ending(out) not in _ENDINGS[to]:
        kinds = " or ".join(f"a name that ends in {end}" if end else "a folder's name" for end in _ENDINGS[to])
        raise RecipeError(f"{to} is written as {kinds}", where=str(out))
    if os.path.lexists(out):
        raise ConflictError("exists already", where=str(out), hint="choose another name, or remove it")


def _ending(out: Path) -> str:
    """That of a file; a folder's name may hold dots."""
    return out.suffix if out.suffix.lower() in FILES else ""


def _check(saved: SavedAdapter, to: Format, models: Models | None, dtype: torch.dtype | None) -> None:
    if saved.family not in _FAMILIES[to]:
        family = "Stable Diffusion" if saved.family == "sd" else "a language model"
        fitting = " or ".join(form for form, families in _FAMILIES.items() if saved.family in families)
        raise RecipeError(f"{to} is no format for {family}", where="--to", hint=f"choose {fitting}")
    if to == "gguf" and dtype == torch.bfloat16:
        raise RecipeError("a GGUF adapter is float32 or float16", where="--dtype")
    if models is None and to in ("kohya", "gguf"):
        raise ModelError(f"the names in a {to} file are made from the base's layers", hint="give it with --base")


def _write_peft(folder: Path, saved: SavedAdapter, models: Models | None, base_name: str) -> None:
    metadata = _carried(saved)
    for component, changes in saved.components.items():
        if models is None and saved.format != "peft" and component.startswith("text_encoder"):
            changes = {encoder_path(component, path): delta for path, delta in changes.items()}
        state, injection = taken_apart(changes, None if models is None else models[component])
        if saved.family == "llama":
            write_peft(folder, state, injection, base_name=base_name, task="CAUSAL_LM", metadata=metadata)
        else:
            write_peft(folder / component, state, injection, base_name=base_name, metadata=metadata)


def _write_file(path: Path, title: str, saved: SavedAdapter, to: Format, models: Models | None, base_name: str) -> None:
    metadata = _carried(saved)
    if to == "diffusers":
        write_diffusers(path, saved.components, base_name, metadata)
    elif to == "gguf" and models is not None:
        alpha, even = with_one_alpha(saved.components)
        strings = {"general.name": title, "lorakit_base": base_name, **metadata}
        gguf_lora.write(path, even["model"], models["model"], alpha=alpha, metadata=strings)
    elif models is not None:
        predicts = saved.metadata.get("modelspec.prediction_type")
        write_kohya(
            path,
            saved.components,
            title=title,
            version=version_of(models),
            prediction_type={None: None, "v": "v_prediction"}.get(predicts, "epsilon"),
            resolution=None,
            models=models,
            metadata={"lorakit_base": base_name, **metadata},
        )


def _carried(saved: SavedAdapter) -> dict[str, str]:
    """The metadata that stay true in another format: where the adapter comes from, not how the file is laid out."""
    own = ("lorakit_", "ss_", "modelspec.")
    return {key: value for key, value in saved.metadata.items() if key.startswith(own) and key != "modelspec.title"}


def _compared(saved: SavedAdapter, path: Path, out: Path, to: Format, models: Models | None) -> Conversion:
    again = read_adapter(path, models, embeddings=True)
    before, after = _by_place(saved), _by_place(again)
    for component, module in before.keys() ^ after.keys():
        place = "was lost" if (component, module) in before else "is new"
        raise ModelError(f"the conversion failed: a module {place}", where=told_as(component, module))
    largest, where = 0.0, ""
    for (component, module), delta in before.items():
        difference = _difference(delta, after[component, module], told_as(component, module))
        if difference >= largest:
            largest, where = difference, told_as(component, module)
    dtypes = sorted({str(delta.B.dtype).removeprefix("torch.") for delta in after.values()})
    return Conversion(out, to, len(before), ", ".join(dtypes), largest, where)


def _by_place(saved: SavedAdapter) -> dict[tuple[str, str], Delta]:
    """Changes by component and path, without the ``text_model.`` that some versions put in front."""
    return {(component, bare(path)): d for (component, path), d in saved.all_deltas().items()}


def _difference(before: Delta, after: Delta, where: str) -> float:
    """Largest |dW_in - dW_out| of one module; ModelError when more than rounding A and B once explains it.

    What a scale pushes below the dtype's normal numbers is rounded more coarsely, which may not cost the whole change
    more than a rounding either.
    """
    if _equal(before, after):
        return 0.0
    info = torch.finfo(after.B.dtype)
    step, largest, off, size = info.eps, 0.0, 0.0, 0.0
    least = 0.51 * step * info.smallest_normal
    coarse = least * abs(after.scale) * _flat(before.A).abs().sum(0)
    too_far, below = False, False
    for first in range(0, before.B.shape[0], ROWS):
        rows = slice(first, first + ROWS)
        one = _product(before, rows)
        distance = (one - _product(after, rows)).abs_()
        room = (_flat(before.B[rows]).abs() @ _flat(before.A).abs()).mul_(1.01 * step * abs(before.scale))
        below |= not bool((distance <= room + 1e-12).all())
        room += least * abs(before.scale) * _flat(before.B[rows]).abs().sum(1, keepdim=True)
        too_far |= not bool((distance <= room + coarse + 1e-12).all())
        largest = max(largest, float(distance.max()))
        off, size = off + float(distance.square().sum()), size + float(one.square().sum())
    too_far |= below and off > step**2 * size
    magnitudes = torch.zeros(1, dtype=torch.float64)
    if before.magnitude is not None and after.magnitude is not None:
        magnitudes = (before.magnitude.double() - after.magnitude.double()).abs()
        too_far |= bool((magnitudes > step * before.magnitude.double().abs()).any())
    else:
        too_far |= before.magnitude is not after.magnitude
    if too_far:
        reason = f"the conversion failed: the change came back {largest:.2e} away, more than rounding explains"
        raise ModelError(reason, where=where, hint="numbers too small or too large for the dtype? --dtype float32")
    return max(largest, magnitudes.max().item())


def _equal(one: Delta, other: Delta) -> bool:
    """Whether two changes are the same numbers, which spares multiplying them out."""
    pairs = [(one.A, other.A), (one.B, other.B), (one.magnitude, other.magnitude)]
    same = (x is y if x is None or y is None else torch.equal(x.double(), y.double()) for x, y in pairs)
    return one.scale == other.scale and all(same)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.double().flatten(1)


def _product(delta: Delta, rows: slice) -> Tensor:
    return (_flat(delta.B[rows]) @ _flat(delta.A)).mul_(delta.scale)
