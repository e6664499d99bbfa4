"""What a base's folder or file must be before anything loads it: complete, of a known architecture, and free of code.

Only JSON and safetensors headers are read. Every failure is a ModelError that names the file.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError
from lorakit.storage import configs
from lorakit.storage.headers import Header, read_header

LLAMA_ARCHITECTURES = {
    "LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3", "GemmaForCausalLM": "gemma", "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text", "GraniteForCausalLM": "granite", "Olmo2ForCausalLM": "olmo2",
    "SmolLM3ForCausalLM": "smollm3", "CohereForCausalLM": "cohere", "StableLmForCausalLM": "stablelm",
    "HeliumForCausalLM": "helium", "SeedOssForCausalLM": "seed_oss",
}  # fmt: skip
"""Decoders whose attention is q_proj, k_proj, v_proj and o_proj, with the model_type that goes with each."""

SCHEDULERS = {
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "UniPCMultistepScheduler",
    "DEISMultistepScheduler", "LCMScheduler", "TCDScheduler",
}  # fmt: skip

COMPONENTS: dict[str, tuple[set[str], set[str]]] = {
    "unet": ({"diffusers"}, {"UNet2DConditionModel"}),
    "vae": ({"diffusers"}, {"AutoencoderKL"}),
    "text_encoder": ({"transformers"}, {"CLIPTextModel"}),
    "text_encoder_2": ({"transformers"}, {"CLIPTextModelWithProjection"}),
    "tokenizer": ({"transformers"}, {"CLIPTokenizer", "CLIPTokenizerFast"}),
    "tokenizer_2": ({"transformers"}, {"CLIPTokenizer", "CLIPTokenizerFast"}),
    "scheduler": ({"diffusers"}, SCHEDULERS),
    "safety_checker": ({"stable_diffusion"}, {"StableDiffusionSafetyChecker"}),
    "feature_extractor": (
        {"transformers"},
        {"CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor"},
    ),
    "image_encoder": ({"transformers"}, {"CLIPVisionModelWithProjection"}),
}
"""What model_index.json may name: a component's libraries and classes."""

WEIGHTS = {
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
    "text_encoder_2": "model",
}  # fmt: skip
"""The components that have weights lorakit loads, and their files' stem; only SDXL has the last one."""

TRAIN_ON = "to train on from an adapter, `lorakit merge` it with its base, and name the result"
CODE = {".py", ".pyc", ".pyo", ".pyd", ".so", ".dll", ".dylib"}
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
ENCODERS = (("cond_stage_model.",), ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."))
"""What the text encoders of a single file are called: the one of SD 1.x and 2.x, the two of XL."""
PIPELINES = {
    "StableDiffusionPipeline": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "StableDiffusionXLPipeline": (
        "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler",
    ),
}  # fmt: skip
"""What model_index.json may be, and the components that it then has to have."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most 10 MB."""
    try:
        if not path.is_file():
            raise FileNotFoundError
        if path.stat().st_size > 10_000_000:
            raise ValueError("larger than 10 MB")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError("no such file", where=str(path)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"not readable as JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise ModelError("not a JSON object", where=str(path))
    return value


def read_text(path: Path) -> str:
    """A text file of at most 1 MB in UTF-8."""
    try:
        if path.stat().st_size > 1_000_000:
            raise ValueError("larger than 1 MB")
        return path.read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"not readable as text: {error}", where=str(path)) from error


def _field(table: dict[str, Any], key: str, path: Path) -> Any:
    if key not in table:
        raise ModelError(f"{key} is missing", where=str(path))
    return table[key]


def check_folder(root: Path) -> None:
    """Refuse code, pipes and devices, and links that lead out of the folder unless they are a hub cache's blobs."""
    for path in files_of(root):
        if path.suffix.lower() in CODE:
            raise ModelError("the base brings code, which is never run", where=str(path))
        check_link(path, root)
        if not path.is_file():
            raise ModelError("not a regular file", where=str(path))
        if path.name.endswith(("config.json", "model_index.json")):
            for key in ("auto_map", "custom_pipeline", "custom_pipelines"):
                if key in read_json(path):
                    raise ModelError(f"{key}: the base asks for code of its own, which is never run", where=str(path))


def check_link(path: Path, root: Path) -> None:
    """Refuse a link out of ``root`` unless it is to a hub cache's blob."""
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    if path.is_symlink():
        target = Path(os.path.realpath(path))
        cached = blobs is not None and target.parent == blobs.resolve()
        if not target.is_relative_to(root.resolve()) and not cached:
            raise ModelError("a link out of the model's folder", where=str(path))


def files_of(root: Path) -> Iterator[Path]:
    """Every file below a model's folder, but for hidden folders and what macOS puts beside files on foreign disks
    (``._NAME``). A folder that is a link is refused."""
    for below, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (Path(below) / name).is_symlink():
                raise ModelError("a folder that is a link", where=str(Path(below) / name))
        yield from (Path(below) / name for name in sorted(names) if not name.startswith("._"))


def shard_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of one model: ``STEM.safetensors``, or the shards that its index names.

    Raises ModelError for pickles only, a missing shard, an index that leads elsewhere, or one that does not list
    exactly the tensors that are there.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES) if folder.is_dir() else []
        if pickles:
            raise ModelError(
                f"only pickle files ({', '.join(pickles[:3])}), which are never opened",
                where=str(folder),
                hint="save the model as safetensors first",
            )
        variants = sorted(folder.glob(f"{stem}.*.safetensors"))
        hint = f"{variants[0].name} is a variant: rename it to {single.name}" if variants else ""
        raise ModelError(f"no {single.name} and no {index.name}", where=str(folder), hint=hint)
    weight_map = _field(read_json(index), "weight_map", index)
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError("weight_map is not a table of file names", where=str(index))
    files = sorted(set(weight_map.values()))
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{name!r} is not a safetensors file of this folder", where=str(index))
        if not (folder / name).is_file():
            raise ModelError(f"shard {name} is missing", where=str(index), hint="get the whole model again")
    _check_index(index, weight_map, {name: read_header(folder / name) for name in files})
    return [folder / name for name in files]


def _check_index(index: Path, weight_map: dict[str, str], headers: dict[str, Header]) -> None:
    found: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.tensors:
            if name in found:
                raise ModelError(f"{name} is in {found[name]} and in {file}", where=str(index))
            found[name] = file
    for name in sorted(found.keys() ^ weight_map.keys()):
        place = "in no shard" if name in weight_map else "not in the index"
        raise ModelError(f"{name} is {place}", where=str(index))
    for name, file in weight_map.items():
        if found[name] != file:
            raise ModelError(f"{name} is in {found[name]}, not in {file}", where=str(index))


def shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape over the files of one model."""
    return {name: info.shape for file in files for name, info in read_header(file).tensors.items()}


def check_transformers(folder: Path, *, four_bit: bool = False) -> None:
    """A causal language model of the LLaMA kind: architecture, no quantized weights but with ``four_bit`` those of
    bitsandbytes, sizes as the config says."""
    check_folder(folder)
    path = folder / "config.json"
    config = read_json(path)
    architectures = _field(config, "architectures", path)
    named = str(architectures[0] if isinstance(architectures, list) and architectures else architectures)
    if named not in LLAMA_ARCHITECTURES:
        raise ModelError(f"the architecture is {named!r}, not one like LlamaForCausalLM", where=str(path))
    if config.get("model_type") != LLAMA_ARCHITECTURES[named]:
        reason = f"model_type is {config.get('model_type')!r}, but {named} is a {LLAMA_ARCHITECTURES[named]!r}"
        raise ModelError(reason, where=str(path))
    configs.check_quantization(config, path, four_bit=four_bit)
    found = shapes(shard_files(folder, "model"))
    configs.check_sizes(config, path, len(found))
    sizes = {key: _field(config, key, path) for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    embedding = found.get("model.embed_tokens.weight")
    if embedding != (sizes["vocab_size"], sizes["hidden_size"]):
        claimed = (sizes["vocab_size"], sizes["hidden_size"])
        raise ModelError(f"the config says embeddings {claimed}, the weights have {embedding}", where=str(path))
    for name, shape in configs.claimed(config).items():
        packed = four_bit and f"{name}.absmax" in found  # its state tells the shape
        if found.get(name, shape) != shape and not packed:
            raise ModelError(f"the config says {name} {shape}, the weights have {found[name]}", where=str(path))
    layers = {name.split(".")[2] for name in found if name.startswith("model.layers.")}
    if len(layers) != sizes["num_hidden_layers"]:
        raise ModelError(f"{sizes['num_hidden_layers']} layers in the config, {len(layers)} there", where=str(path))


def weight_stems(folder: Path) -> dict[str, str]:
    """``WEIGHTS`` of a diffusers folder: with a second text encoder where it has one."""
    return {name: stem for name, stem in WEIGHTS.items() if name != "text_encoder_2" or (folder / name).is_dir()}


def check_diffusers(folder: Path) -> None:
    """A pipeline of SD 1.x, 2.x or XL: known classes only, weights there, a text-to-image UNet."""
    path = folder / "model_index.json"
    check_folder(folder)
    index = read_json(path)
    name = _field(index, "_class_name", path)
    if not isinstance(name, str) or name not in PIPELINES:
        raise ModelError(f"a {name!r}, not one of {', '.join(PIPELINES)}", where=str(path))
    for component, pair in index.items():
        if not isinstance(pair, list) or pair == [None, None]:
            continue
        libraries, classes = COMPONENTS.get(component, (set(), set()))
        named = len(pair) == 2 and all(isinstance(part, str) for part in pair)
        if not named or pair[0] not in libraries or pair[1] not in classes:
            raise ModelError(f"{component}: {pair} is not part of a Stable Diffusion", where=str(path))
    for component in PIPELINES[name]:
        if not isinstance(index.get(component), list) or index[component] == [None, None]:
            raise ModelError(f"{component} is missing", where=str(path))
        if not (folder / component).is_dir():
            raise ModelError(f"the folder {component} is missing", where=str(path))
        tokens = [folder / component / file for file in ("vocab.json", "tokenizer.json")]
        if component.startswith("tokenizer") and not any(file.is_file() for file in tokens):
            raise ModelError("no vocab.json and no tokenizer.json", where=str(folder / component))
    for component, stem in weight_stems(folder).items():
        found = shapes(shard_files(folder / component, stem))
        config_path = folder / component / "config.json"
        configs.check_sizes(read_json(config_path), config_path, len(found))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    configs.check_scheduler(read_json(scheduler), scheduler, SCHEDULERS)
    configs.check_vae(read_json(folder / "vae" / "config.json"), folder / "vae" / "config.json")
    config = read_json(folder / "unet" / "config.json")
    configs.check_unet(config, folder / "unet" / "config.json")
    added = config.get("addition_embed_type")
    if added != ("text_time" if "XL" in name else None):
        raise ModelError(f"addition_embed_type is {added!r}: not the UNet of a {name}", where=str(folder / "unet"))
    if _field(config, "in_channels", folder / "unet" / "config.json") != 4:
        raise ModelError(
            f"the UNet takes {config['in_channels']} channels: made for inpainting or the like, not for text to image",
            where=str(folder / "unet"),
        )


def check_single_file(path: Path) -> None:
    """One file with UNet, VAE and text encoders of SD 1.x, 2.x or XL under their original names."""
    found = {name: info.shape for name, info in read_header(path).tensors.items()}
    first = "model.diffusion_model.input_blocks.0.0.weight"
    if any(name.startswith(("lora_unet_", "lora_te", "base_model.model.", "unet.")) for name in found):
        raise ModelError("an adapter, not a base model", where=str(path), hint=TRAIN_ON)
    if any(name.startswith("conditioner.embedders.0.model.") for name in found):
        raise ModelError(
            "the refiner of Stable Diffusion XL, not a base that makes pictures from text", where=str(path)
        )
    if other := next((name for name in found if name.startswith("edm_")), None):
        raise ModelError(
            f"a Stable Diffusion XL trained on EDM's noise schedule ({other}), which is not known here", where=str(path)
        )
    encoders = next((one for one in ENCODERS if any(name.startswith(one) for name in found)), ENCODERS[0])
    for prefix in ("model.diffusion_model.", "first_stage_model.", *encoders):
        if not any(name.startswith(prefix) for name in found):
            raise ModelError(f"not a whole Stable Diffusion checkpoint: no {prefix}*", where=str(path))
    if first not in found or len(found[first]) != 4 or found[first][1] != 4:
        raise ModelError(f"not a text-to-image UNet: {first} has shape {found.get(first)}", where=str(path))
