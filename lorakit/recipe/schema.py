"""The recipes: frozen, strict pydantic models, one section a concern.

``SDRecipe`` and ``LlamaRecipe`` share ``adapter``, ``train``, ``optimizer``, ``output`` and ``compute``; ``base``,
``data`` and ``sample`` are a family's own. Unknown keys are refused. Every field says what it means and in which unit.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Adapter(Section):
    """LoRA: W + scale * B A, with A [rank, in] and B [out, rank] (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Positive = 16
    """Inner dimension of A and B."""
    alpha: Rate | None = None
    """scale = alpha / rank, or alpha / sqrt(rank) with rslora; as large as rank when absent."""
    rslora: bool = False
    """Rank-stabilised scale (Kalajdzievski 2023, arXiv:2312.03732)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of A's inputs dropped in training."""
    dora: bool = False
    """Weight-decomposed LoRA (Liu et al. 2024, arXiv:2402.09353)."""
    targets: Literal["attention", "attention+mlp", "all-linear"] | list[str] = "attention"
    """Which layers get LoRA: a group, or patterns of module names such as "q_proj", "layers.*.mlp.*" or a convolution's
    "conv1"."""
    rank_pattern: dict[str, Positive] = {}
    """Rank by module-name pattern, over ``rank``."""
    alpha_pattern: dict[str, Rate] = {}
    """Alpha by module-name pattern, over ``alpha``."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """How A starts; B starts at zero either way."""

    @property
    def lora_alpha(self) -> float:
        """``alpha``, or what stands for it."""
        return self.rank if self.alpha is None else self.alpha


class LlamaAdapter(Adapter):
    layers: list[NonNegative] | None = None
    """Only these transformer layers, counted from 0; all when absent."""


class Train(Section):
    steps: Positive | None = None
    """Optimizer steps; give steps or epochs."""
    epochs: Rate | None = None
    """Passes over the training data; 1 when neither is given."""
    batch_size: Positive = 8
    """Examples in one update, over all ranks and accumulated micro-batches together."""
    seed: Seed = 0
    """Data order, initial adapter, noise and dropout all follow from it."""
    evaluate_every: NonNegative = 0
    """Held-out loss every so many steps, and before the first and after the last; 0: only those two."""
    checkpoint_every: NonNegative = 200
    """A checkpoint every so many steps; 0: by minutes, at the end and when stopped only."""
    checkpoint_minutes: Amount = 10.0
    """A checkpoint at least every so many minutes; 0: by steps only."""
    keep_checkpoints: Positive = 2
    """How many of the newest checkpoints stay on disk."""

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> "Train":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


class Optimizer(Section):
    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "lion_8bit"] = "adamw_8bit"
    """adamw is PyTorch's, in float32; the others are bitsandbytes' block-wise 8-bit ones."""
    learning_rate: Rate = 2e-4
    """Peak rate, after warmup."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """The rate after warmup: level, or falling so that it would be 0 after the last step."""
    warmup: Amount = 0.03
    """Steps in which the rate rises to its peak: a share of all below 1, a number of them from 1 on."""
    weight_decay: Amount = 0.01
    """Decoupled from the gradient (Loshchilov and Hutter 2017, arXiv:1711.05101)."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square. Lion's authors take 0.9 and 0.99, and a third to a
    tenth of AdamW's rate (Chen et al. 2023, arXiv:2302.06675)."""
    clip: Amount = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""


class Output(Section):
    folder: Annotated[Path, AfterValidator(lambda folder: Path(os.path.expanduser(folder)))] = Path("runs")
    """The run folder is made in here, relative to where the command runs."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "run"
    """Name of the run folder and of the adapter file."""
    track: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Metrics go there too; metrics.jsonl and loss.png are always written."""


class Compute(Section):
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """The base's dtype and the matmuls' on the device; the adapter and the optimizer's masters stay float32.

    auto: bf16 where the device multiplies bf16 in hardware, else fp32.
    """
    gradient_accumulation: Positive = 1
    """Micro-batches a rank takes for one update; batch_size = ranks x gradient_accumulation x micro-batch."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the blocks' MLPs (and LLaMA's norms); pays back in long runs."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: cuda where there is one, else cpu."""


class LlamaBase(Section):
    model: str = "builtin:smollm2-135m"
    """builtin:smollm2-135m, a folder, a .gguf file, or a hub id (owner/name)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """bitsandbytes: 4-bit NormalFloat (QLoRA) or LLM.int8() weights under the adapter."""


class ChatSource(Section):
    path: str
    """A jsonl, json, csv, parquet or txt file, a folder made by datasets.save_to_disk, or a hub id."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "completion", "text", "squad"] = "auto"
    """How a row is laid out; auto tells it from the first row's fields."""
    config: str | None = None
    """Configuration of a hub data set that has several, such as "main" of openai/gsm8k."""
    split: str = "train"
    """Split of a hub data set, or of a folder that datasets.save_to_disk made."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    weight: Rate = 1.0
    """How often its rows come: 2 shows each twice an epoch, 0.5 shows half of them (the same half each epoch)."""


class ChatData(Section):
    train: Annotated[list[ChatSource], Field(min_length=1)]
    """Where the chats come from, one source an item."""
    held_out: Annotated[float, Field(ge=0, lt=1)] | list[ChatSource] = 0.05
    """A share of the training rows set aside (by seed), or sources of their own."""
    max_tokens: Annotated[int, Field(ge=16)] = 1024
    """Longest chat; a longer one loses its oldest turns or its question's end, never its answer's beginning."""
    chat_template: str | None = None
    """Name of a built-in template (chatml, llama2, llama3) or a .jinja file; the tokenizer's own when absent."""
    packing: bool = True
    """Chats of a micro-batch stand in one row without padding, attention kept apart."""
    on_bad: Literal["fail", "skip"] = "fail"
    """A row that cannot be used stops the run, or is counted, listed and left out."""


class LlamaSample(Section):
    every: NonNegative = 0
    """Sample answers every so many steps, and before the first and after the last; 0: only those two."""
    prompts: list[str] = []
    """What to answer each time."""
    system: str | None = None
    """A system message before each prompt."""
    max_new_tokens: Positive = 96
    """Longest answer."""
    temperature: Amount = 0.0
    """0: the likeliest token each time."""
    top_p: Share = 1.0
    """Draw from the likeliest tokens that together have this probability; used when temperature is above 0."""
    seed: Seed = 0
    """Same seed, same answers."""


class SDBase(Section):
    model: str = "builtin:mini-sd"
    """builtin:mini-sd, a diffusers folder, a single .safetensors checkpoint, or a hub id (owner/name)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""


class SDAdapter(Adapter):
    rank: Positive = 8
    text_encoder: bool = False
    """LoRA in the text encoder's attention too; in both of SDXL's."""


class SDOptimizer(Optimizer):
    learning_rate: Rate = 1e-4
    text_encoder_learning_rate: Rate | None = None
    """Peak rate of the text encoders' LoRA; half of learning_rate when absent."""


class PictureData(Section):
    path: str
    """A folder of pictures with .txt or .caption files or metadata.jsonl or .csv, such a table itself, a parquet
    file, a datasets folder, or a hub id."""
    split: str = "train"
    """Split of a hub data set, or of a folder that datasets.save_to_disk made."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    image_column: str = "image"
    """Where a parquet file or data set has its pictures."""
    caption_column: str = "text"
    """Where a parquet file, data set, metadata.jsonl or .csv has its captions."""
    resolution: Annotated[int, Field(ge=8, le=2048)] | None = None
    """Side of the square that a bucket's area stays within, in pixels; the base's own size when absent."""
    buckets: bool = True
    """Keep aspect ratios by sizes of about the same area; else crop every picture to the square."""
    bucket_step: Positive = 64
    """Bucket sides are multiples of this many pixels."""
    crop: Literal["center", "random"] = "center"
    """Where the excess is cut; random draws one place a picture, the same each epoch."""
    flip: bool = False
    """Add each picture's mirror image."""
    repeats: Positive | Literal["folders"] = 1
    """How often a picture comes in one epoch; folders: as kohya's folder names say, 10 times in 10_name."""
    caption_dropout: Share = 0.1
    """Share of examples with an empty caption, so that guidance works."""
    shuffle_tags: bool = False
    """Shuffle the comma-separated tags of a caption each time."""
    keep_tags: NonNegative = 1
    """The first so many tags stay in front when shuffling."""
    trigger: str = ""
    """A word put in front of every caption, to call the style or thing by."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the pictures set aside for the held-out loss."""
    on_bad: Literal["fail", "skip"] = "fail"
    """A picture that cannot be used stops the run, or is counted, listed and left out."""


class Diffusion(Section):
    noise_offset: Amount = 0.0
    """Strength of a per-channel shift of the noise (crosslabs.org 2023), 0.05 to 0.1 where used."""
    min_snr_gamma: Amount = 0.0
    """min-SNR loss weights (Hang et al. 2023, arXiv:2303.09556), 5 where used; 0: none."""


class SDTrain(Train, Diffusion):
    batch_size: Positive = 4


class SDSample(Section):
    every: NonNegative = 0
    """A grid of sample pictures every so many steps, and before the first and after the last; 0: only those two."""
    prompts: list[str] = []
    """What to draw each time."""
    negative_prompt: str = ""
    """What the pictures should not show."""
    steps: Positive = 25
    """Denoising steps."""
    guidance_scale: Amount = 7.5
    """Weight of the prompt (Ho and Salimans 2022, arXiv:2207.12598)."""
    width: Positive | None = None
    """Pixels; the base's own size when absent."""
    height: Positive | None = None
    """Pixels; the base's own size when absent."""
    seed: Seed = 0
    """Same seed, same pictures."""


class LlamaRecipe(Section):
    base: LlamaBase = LlamaBase()
    adapter: LlamaAdapter = LlamaAdapter()
    data: ChatData
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    sample: LlamaSample = LlamaSample()
    output: Output = Output()
    compute: Compute = Compute()


class SDRecipe(Section):
    base: SDBase = SDBase()
    adapter: SDAdapter = SDAdapter()
    data: PictureData
    train: SDTrain = SDTrain()
    optimizer: SDOptimizer = SDOptimizer()
    sample: SDSample = SDSample()
    output: Output = Output()
    compute: Compute = Compute()
