"""What `lorakit merge` prints: the plan, what was done, and how the outputs compare."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorakit.adapters.merging.merge import Compare, MergeReport
    from lorakit.adapters.merging.parallel import Crew
    from lorakit.adapters.merging.plan import MergePlan
    from lorakit.adapters.merging.source import Source


def compare_with(plan: "MergePlan") -> "Compare":
    """What compares the outputs."""

    def compare(place: Path, sources: "Mapping[str, Source]", crew: "Crew") -> dict[str, Any]:
        if plan.base.family == "sd":
            from lorakit.families.sd.compare import compare as compare_sd

            found = compare_sd(plan.base, plan.adapters, place, sources, crew)
        else:
            from lorakit.families.llama.compare import compare as compare_llama

            found = compare_llama(plan.base, plan.adapters, place, plan.settings.quant_base, sources, crew)
        if not found.difference <= found.allowed:
            hint = "the merged model was removed; --no-verify writes it without comparing"
            reason = f"does not verify: {found.told}, and rounding explains {found.allowed:.2%} at most"
            raise ModelError(reason, where=str(plan.out), hint=hint)
        return {"difference": found.difference, "allowed": found.allowed, "in_words": found.told}

    return compare


def tell_plan(plan: "MergePlan", overwrite: bool) -> None:
    """Print what would be written. Raises what stands in the way; reads the base where an adapter records its own."""
    from lorakit.adapters.merging.out import check_out, check_space
    from lorakit.adapters.merging.receipt import other_base

    check_out(plan, overwrite)
    free = check_space(plan)
    told = "what is free is not known" if free is None else f"{free / 1e9:.1f} GB are free"
    print(f"base     {plan.base.name} ({plan.base.layout})")
    for adapter in plan.adapters:
        ranks = ", ".join(map(str, adapter.ranks))
        print(f"adapter  {adapter.path} x {adapter.weight:g} ({adapter.format}, rank {ranks})")
        if warning := other_base(adapter, plan.base):
            print(f"         {warning}")
    tensors = sum(len(file.tensors) for file in plan.files.values())
    print(f"changes  {plan.changed} of {tensors} tensors, summed in float32, rounded once")
    if plan.untied:
        print("         the head, tied to the embedding, gets a weight of its own, and the config says so")
    for name, file in plan.files.items():
        print(f"writes   {plan.out / name}: {len(file.tensors)} tensors, {file.size / 1e9:.3f} GB")
    print(f"in all   {plan.size / 1e9:.3f} GB ({', '.join(plan.dtypes)}), {told}")


def tell(report: "MergeReport") -> None:
    """Print what was done."""
    print(f"merged {report.changed} tensors ({report.dtype}) into {report.out}, {report.size / 1e6:.1f} MB")
    print(f"largest rounding error {report.rounding:.2e}; {report.lost:.2%} of the change lost to rounding")
    for warning in report.warnings:
        print(f"warning: {warning}")
    if report.checked is not None:
        print(f"verified: {report.checked.changed} tensors recomputed in float64, others as the base was read")
    if report.compared is not None:
        print(f"verified: {report.compared['in_words']}")
    print(f'next: {shlex.join(["lorakit", "generate", "--base", str(report.out)])} --prompt "..."')
