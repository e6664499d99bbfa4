"""The text encoders of a single file, each under the names of the library that its model was trained with."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from torch import Tensor, nn

from lorakit.adapters.formats import bare
from lorakit.adapters.merging.base import Packed

Shapes = Mapping[str, tuple[int, ...]]
_rename: Any = convert_open_clip_checkpoint  # diffusers has no types
_FUSED = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OUTSIDE = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}


class TextEncoder(Protocol):
    """How a single file holds a text encoder. ``bare`` names are a module's without the ``text_model.`` in front."""

    @property
    def prefix(self) -> str:
        """What its tensors' names begin with."""
        ...

    @property
    def tokenizer(self) -> Mapping[str, Any]:
        """What its tokenizer says otherwise than CLIP's."""
        ...

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """The CLIPTextConfig that the file's shapes tell. KeyError and the like where they do not."""
        ...

    def rename(self, tensors: Mapping[str, Tensor], module: Any) -> dict[str, Tensor]:
        """The file's tensors of this encoder under bare names."""
        ...

    def names(self, component: str, module: nn.Module) -> dict[str, Packed]:
        """The inverse of ``rename``: what the file's tensors are made of."""
        ...


def bare_names(module: nn.Module) -> dict[str, str]:
    """A text encoder's tensor names by bare name."""
    return {bare(name): name for name in module.state_dict()}


def _config(sizes: tuple[int, int], layers: int, inner: int, positions: int, **others: Any) -> dict[str, Any]:
    """``sizes`` are vocabulary and width. The pooled state is the largest token's, which eos_token_id 2 means."""
    vocabulary, width = sizes
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": positions,
        "projection_dim": width,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        **others,
    }


@dataclass(frozen=True)
class Clip:
    """OpenAI's CLIP under transformers' names; the oldest files lack ``text_model.``."""

    prefix: str
    tokenizer: ClassVar[Mapping[str, Any]] = {}

    def config(self, shapes: Shapes) -> dict[str, Any]:
        found = {bare(name.removeprefix(self.prefix)): shape for name, shape in shapes.items()}
        layers = {
            int(m[1]) for name in found if (m := re.fullmatch(r"encoder\.layers\.(\d+)\.layer_norm1\.weight", name))
        }
        vocabulary, width = found["embeddings.token_embedding.weight"]
        inner = found["encoder.layers.0.mlp.fc1.weight"][0]
        positions = found["embeddings.position_embedding.weight"][0]
        return _config((vocabulary, width), 1 + max(layers), inner, positions, hidden_act="quick_gelu")

    def rename(self, tensors: Mapping[str, Tensor], module: Any) -> dict[str, Tensor]:  # noqa: ARG002
        found = {bare(name.removeprefix(self.prefix)): t for name, t in tensors.items()}
        unused = ("embeddings.position_ids", "text_projection.weight", "logit_scale")
        return {name: tensor for name, tensor in found.items() if name not in unused}

    def names(self, component: str, module: nn.Module) -> dict[str, Packed]:
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        return {
            f"{self.prefix}text_model.{short}": Packed(((component, name),), shapes[name])
            for short, name in bare_names(module).items()
        }


@dataclass(frozen=True)
class OpenClip:
    """OpenCLIP's text transformer: q, k and v stacked into one, the projection of the pooled state on its side."""

    prefix: str
    spare: int
    """Layers at the end that the file holds and the model never uses."""
    tokenizer: ClassVar[Mapping[str, Any]] = {"pad_token": "!"}

    def config(self, shapes: Shapes) -> dict[str, Any]:
        layer = re.compile(re.escape(self.prefix) + r"transformer\.resblocks\.(\d+)\.ln_1\.weight")
        layers = {int(m[1]) for name in shapes if (m := layer.fullmatch(name))}
        vocabulary, width = shapes[f"{self.prefix}token_embedding.weight"]
        inner = shapes[f"{self.prefix}transformer.resblocks.0.mlp.c_fc.weight"][0]
        positions = shapes[f"{self.prefix}positional_embedding"][0]
        projection = shapes.get(f"{self.prefix}text_projection", (width, width))[1]
        count = 1 + max(layers) - self.spare
        others = {"hidden_act": "gelu", "projection_dim": projection}
        return _config((vocabulary, width), count, inner, positions, **others)

    def rename(self, tensors: Mapping[str, Tensor], module: Any) -> dict[str, Tensor]:
        count = module.config.num_hidden_layers
        spare = tuple(f"{self.prefix}transformer.resblocks.{count + number}." for number in range(self.spare))
        used = {name: tensor for name, tensor in tensors.items() if not (spare and name.startswith(spare))}
        found = {bare(name): t for name, t in _rename(module, used, prefix=self.prefix).items()}
        unused = set() if "text_projection.weight" in module.state_dict() else {"text_projection.weight"}
        return {name: tensor for name, tensor in found.items() if name not in unused}

    def names(self, component: str, module: nn.Module) -> dict[str, Packed]:
        """A layer that is never used is the last one again."""
        state, found = module.state_dict(), dict[str, Packed]()
        layers: dict[str, dict[str, Packed]] = {}
        for short, name in bare_names(module).items():
            shape, part = tuple(state[name].shape), (component, name)
            if short in _OUTSIDE:
                turned = short == "text_projection.weight"
                found[f"{self.prefix}{_OUTSIDE[short]}"] = Packed((part,), shape[::-1] if turned else shape, turned)
                continue
            number, _, rest = short.removeprefix("encoder.layers.").partition(".")
            layer = layers.setdefault(number, {})
            if fused := _FUSED.fullmatch(rest):
                stacked = [(component, name.replace(f".{fused[1]}_proj.", f".{one}_proj.")) for one in "qkv"]
                layer[f"attn.in_proj_{fused[2]}"] = Packed(tuple(stacked), (3 * shape[0], *shape[1:]))
            else:
                path, _, kind = rest.rpartition(".")
                layer[f"{_LAYER[path]}.{kind}"] = Packed((part,), shape)
        last = str(max(map(int, layers)))
        layers |= {str(int(last) + 1 + number): layers[last] for number in range(self.spare)}
        for number, layer in layers.items():
            found |= {f"{self.prefix}transformer.resblocks.{number}.{name}": packed for name, packed in layer.items()}
        return found
