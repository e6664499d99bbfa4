"""The original names of a Stable Diffusion UNet's layers (of XL the "SGM" names of Stability's generative-models).

diffusers groups a level's blocks, the original code counts through: with L resnets a level, block j of level i is
``input_blocks.{(L+1) i + j + 1}`` on the way down and ``output_blocks.{(L+1) i + j}`` on the way up.
"""

import re
from collections.abc import Collection

from lorakit.errors import ModelError

_RESNET = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def original_paths(paths: Collection[str]) -> dict[str, str]:
    """The original path of each of ``paths``, which are all adaptable layers of a diffusers UNet, or all its layers.

    Raises ModelError for a path that such a UNet has not.
    """
    resnets = [int(m[4]) for path in paths if (m := _BLOCK.match(path)) and m[1] == "down" and m[3] == "resnets"]
    step = 2 + max(resnets, default=0)
    attended = {int(m[2]) for path in paths if (m := _BLOCK.match(path)) and m[1] == "up" and m[3] == "attentions"}
    found = {}
    for path in paths:
        if path in _OUTSIDE:
            found[path] = _OUTSIDE[path]
            continue
        match = _BLOCK.fullmatch(path)
        if match is None:
            raise ModelError("not a layer of Stable Diffusion's UNet", where=path)
        found[path] = _inside(match, step, attended)
    return found


def _inside(match: re.Match[str], step: int, attended: Collection[int]) -> str:
    side, level, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    rest = _RESNET.get(rest, rest)
    if side is None:
        return f"middle_block.{2 * number if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{step * (level + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{step * level + step - 1}.{1 + (level in attended)}.{rest}"
    first = step * level + number + (side == "down")
    return f"{'input' if side == 'down' else 'output'}_blocks.{first}.{int(kind == 'attentions')}.{rest}"
