"""Several adapters as one: their weighted sum is an adapter whose rank is the sum of their ranks."""

from collections.abc import Sequence

import torch

from lorakit.adapters.delta import Delta, SavedAdapter
from lorakit.adapters.pieces import TEMPLATE_KEY, trained_template
from lorakit.errors import ModelError


def combine(adapters: Sequence[tuple[SavedAdapter, float]]) -> SavedAdapter:
    """sum_i weight_i scale_i B_i A_i of each module, exactly, in float32: the A below one another, the B side by side.
    Of chat templates that differ the first is kept, with a warning.

    Raises ModelError for DoRA, which does not add up, and for a sum that float32 does not hold.
    """
    parts: dict[str, dict[str, list[tuple[Delta, float]]]] = {}
    for saved, weight in adapters:
        for (component, path), delta in saved.all_deltas().items():
            if delta.magnitude is not None:
                reason = "DoRA's change is no product of two matrices that another could be added to"
                raise ModelError(reason, where=path, hint="merge it into its base by itself")
            parts.setdefault(component, {}).setdefault(path, []).append((delta, weight))
    components = {
        component: {path: _stacked(path, deltas) for path, deltas in modules.items()}
        for component, modules in parts.items()
    }
    template = trained_template(saved.metadata for saved, _ in adapters)
    metadata = {} if template is None else {TEMPLATE_KEY: template}
    return SavedAdapter(adapters[0][0].family, components, "peft", metadata)


def _stacked(path: str, deltas: Sequence[tuple[Delta, float]]) -> Delta:
    a = torch.cat([delta.A.float() for delta, _ in deltas])
    b = torch.cat([delta.B.float() * (weight * delta.scale) for delta, weight in deltas], 1)
    if not torch.isfinite(b).all():
        raise ModelError("the sum is more than float32 holds", where=path)
    return Delta(a, b, 1.0)
