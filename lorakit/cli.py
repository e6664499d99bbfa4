"""The command line: arguments, help, printing of errors, exit codes. Everything heavy is imported inside a command."""

import codecs
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from lorakit import __version__
from lorakit.commands.report import guarded
from lorakit.errors import RecipeError

app = typer.Typer(
    help="Fine-tune Stable Diffusion and LLaMA with LoRA, merge the result, and generate with it.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the boxes around a help text take longer to import than all else
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe; lorakit init writes one.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override, such as train.steps=50.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and train nothing.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest good checkpoint.")]
Allow = Annotated[
    bool, typer.Option("--allow", help="With --resume: accept safe changes of recipe, places, device and ranks.")
]
Processes = Annotated[int, typer.Option("--num-processes", min=1, help="Ranks on this machine, one a GPU.")]
Rank = Annotated[int, typer.Option(min=1, help="The highest rank a module may have.")]
AdapterSpecs = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="PATH[:WEIGHT]", help="An adapter and its weight; may be given again."),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorakit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[  # noqa: ARG001 (read by its callback)
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if debug:
        os.environ["LORAKIT_DEBUG"] = "1"
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(RecipeError.exit_code)


@app.command("train-sd")
def train_sd(
    recipe: RecipeFile,
    set_: Set = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    allow: Allow = False,
    num_processes: Processes = 1,
) -> None:
    """Train a LoRA for Stable Diffusion on pictures with captions."""
    from lorakit.commands import train
    from lorakit.recipe.schema import SDRecipe

    mode = train.Mode(dry_run=dry_run, resume=resume, allow=allow, processes=num_processes)
    train.run(SDRecipe, recipe, set_ or [], mode)


@app.command("train-llama")
def train_llama(
    recipe: RecipeFile,
    set_: Set = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    allow: Allow = False,
    num_processes: Processes = 1,
) -> None:
    """Train a LoRA for a LLaMA-type model on chats or text."""
    from lorakit.commands import train
    from lorakit.recipe.schema import LlamaRecipe

    mode = train.Mode(dry_run=dry_run, resume=resume, allow=allow, processes=num_processes)
    train.run(LlamaRecipe, recipe, set_ or [], mode)


@app.command()
def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A base model, named as in a recipe.")],
    adapter: Annotated[
        list[str], typer.Argument(metavar="ADAPTER[:WEIGHT]...", help="Adapters or run folders, each with a weight.")
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A folder; for Stable Diffusion also a .safetensors file."),
    ],
    scale: Annotated[float, typer.Option(help="Factor on every adapter's weight.")] = 1.0,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Of the merged weights; default: the base's."),
    ] = None,
    quant_base: Annotated[
        Literal["original", "as-trained"] | None,
        typer.Option(help="After training over 4-bit weights: add to the base's own, or to what training saw of them."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read OUT back, recompute, and compare with base + adapter.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write no model.")] = False,
    as_adapter: Annotated[
        int | None,
        typer.Option(min=1, metavar="RANK", help="Write the adapters' sum as an adapter of this rank, by SVD."),
    ] = None,
) -> None:
    """Add adapters to their base for good: W + scale * B A, summed in float32, rounded once."""
    from lorakit.commands import merge as command

    options = command.Options(
        scale=scale,
        dtype=dtype,
        quant_base=quant_base,
        revision=revision,
        overwrite=overwrite,
        verify=verify,
        dry_run=dry_run,
        as_adapter=as_adapter,
    )
    command.run(base, adapter, out, options)


@app.command()
def generate(
    context: typer.Context,
    base: Annotated[str, typer.Option("--base", help="A base model, named as in a recipe.")],
    adapter: AdapterSpecs = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="May be given again.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A prompt a line, or .jsonl with a field prompt; LLaMA then writes answers.jsonl."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="SD: a folder for pictures (else: generated), or a .png for one. LLaMA: a .jsonl file."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same output.")] = 0,
    device: Annotated[Literal["auto", "cuda", "cpu"], typer.Option(help="auto: a GPU if there is one.")] = "auto",
    precision: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="Of the base; auto: bf16 in hardware, else fp32.")
    ] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    quantization: Annotated[
        Literal["none", "nf4", "int8"],
        typer.Option(help="LLaMA: 4- or 8-bit weights, as base.quantization of a recipe."),
    ] = "none",
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Add the adapters to the weights first; pictures always are drawn so.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after what a stopped batch has finished.")] = False,
    negative_prompt: Annotated[str, typer.Option(help="SD: what the picture should not show.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="SD: denoising steps.")] = 25,
    guidance_scale: Annotated[float, typer.Option(min=0.0, help="SD: weight of the prompt.")] = 7.5,
    width: Annotated[int | None, typer.Option(min=8, help="SD: pixels; default: the base's own size.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="SD: pixels; default: the base's own size.")] = None,
    count: Annotated[int, typer.Option(min=1, help="SD: pictures a prompt.")] = 1,
    scheduler: Annotated[str | None, typer.Option(help="SD: by name, such as ddim, euler, dpm++2m, unipc.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="LLaMA: continue the prompt, without the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="LLaMA: a system message.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="LLaMA: chatml, llama2, llama3 or a .jinja file; default: the adapter's own.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="LLaMA: 0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="LLaMA: nucleus.")] = 0.9,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="LLaMA: least share of the top probability.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="LLaMA: longest answer.")] = 256,
) -> None:
    """Draw pictures or answer prompts with a base and any number of adapters."""
    from lorakit.commands import generate as command

    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = frozenset(name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE")
    request = command.Request(
        base=base,
        revision=revision,
        adapters=tuple(adapter or ()),
        prompts=tuple(prompt or ()),
        prompts_file=prompts,
        out=out,
        device=device,
        precision=precision,
        seed=seed,
        fuse=fuse,
        resume=resume,
        given=given,
    )
    command.run(
        request,
        sd={
            "negative_prompt": negative_prompt,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "width": width,
            "height": height,
            "count": count,
            "scheduler": scheduler,
        },
        llama={
            "quantization": quantization,
            "raw": raw,
            "system": system,
            "chat_template": chat_template,
            "temperature": temperature,
            "top_p": top_p,
            "min_p": min_p,
            "max_new_tokens": max_new_tokens,
        },
    )


@app.command()
def convert(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter of any format, or a run folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder; .safetensors for kohya, .gguf for GGUF.")],
    to: Annotated[Literal["peft", "diffusers", "kohya", "gguf"], typer.Option(help="The format of OUT.")],
    base: Annotated[
        str | None, typer.Option(help="The base it was made for; default: builtin: ones and published SDs are known.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="Of OUT's tensors; default: ADAPTER's.")
    ] = None,
) -> None:
    """Write an adapter in another format, read it back, and compare every module's change."""
    from lorakit.commands import convert as command

    command.run(adapter, out, to, base, dtype)


@app.command()
def verify(
    recipe: RecipeFile,
    resume: Annotated[
        bool, typer.Option("--resume", help="Stop a run, resume it, compare with one never stopped.")
    ] = False,
    set_: Set = None,
    num_processes: Processes = 1,
) -> None:
    """Prove on your own recipe that the fast path is exact, or with --resume that a resumed run is bit-equal."""
    if resume:
        from lorakit.commands import verify_resume

        verify_resume.run(recipe, set_ or [], num_processes)
    else:
        from lorakit.commands import verify as command

        if num_processes > 1:
            raise RecipeError("goes with --resume", where="--num-processes", hint="leave it out, or add --resume")
        command.run(recipe, set_ or [])


@app.command()
def resize(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter of any format, or a run folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Named as ADAPTER's format wants it.")],
    rank: Rank,
    base: Annotated[str | None, typer.Option(help="The base it was made for; default: as convert takes it.")] = None,
) -> None:
    """Lower an adapter's rank, keeping as much of its change as that rank can."""
    from lorakit.commands import resize as command

    command.run(adapter, out, rank, base)


@app.command()
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model, named as in a recipe.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The same model, fully fine-tuned.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter, a PEFT folder.")],
    rank: Rank,
) -> None:
    """Make an adapter from the difference of two full models, by singular values."""
    from lorakit.commands import extract as command

    command.run(base, tuned, out, rank)


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter of any format, a file or a folder.")],
    base: Annotated[str | None, typer.Option(help="The base, for the names of a kohya file's modules.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
    recipe: Annotated[bool, typer.Option("--recipe", help="Only the recipe that made it, as YAML.")] = False,
) -> None:
    """Show what is in an adapter: format, ranks, alphas, norms, dead or broken modules, metadata, its base."""
    from lorakit.commands import inspect as command

    command.run(adapter, base, as_json=as_json, recipe=recipe)


@app.command()
def init(
    family: Annotated[Literal["sd", "llama"], typer.Argument(help="Which kind of recipe.")],
    path: Annotated[Path | None, typer.Argument(help="Default: sd.yaml or llama.yaml.")] = None,
) -> None:
    """Write a commented recipe to start from."""
    from lorakit.commands.init import init as write

    typer.echo(f"wrote {write(family, path or Path(f'{family}.yaml'))}")


@app.command()
def data(
    recipe: RecipeFile,
    set_: Set = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 4,
) -> None:
    """Show training rows as the model sees them, and how long they are."""
    from lorakit.commands.data import run

    run(recipe, set_ or [], rows)


@app.command()
def doctor() -> None:
    """Check the installation: versions, devices, 8-bit optimizers, disk, memory."""
    from lorakit.commands.doctor import run

    raise typer.Exit(run())


def _open_output() -> None:
    """What goes to a stream that was closed (``>&-``) goes nowhere; what another's encoding lacks is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="backslashreplace")


def _run(arguments: Sequence[str] | None) -> object:
    try:
        return app(arguments, prog_name="lorakit", standalone_mode=False)
    except typer.TyperException as error:
        told = " ".join((error.format_message() if hasattr(error, "format_message") else str(error)).split())
        path = getattr(getattr(error, "ctx", None), "command_path", "lorakit")
        told = told.rstrip(".").replace("Input should be", "must be").replace("Value error, ", "")
        raise RecipeError(told, hint=f"see {path} --help") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code that `lorakit.errors` lists."""
    _open_output()
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else every lost connection prints a stack of C++
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars for loading; lorakit shows its own
    # bitsandbytes recommends a package that would fetch kernels from the hub, at every start on some CPUs
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    sys.exit(guarded(lambda: _run(arguments)))
