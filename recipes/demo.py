"""`make demo`: the whole main job on what ships with lorakit, each step a command that you could type.

    python recipes/demo.py runs/demo

Trains a Stable Diffusion LoRA and a LLaMA LoRA, shows both before and after, merges both, and generates from base +
adapter and from the merged models with the same seed. Run again after an interruption, it goes on.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
SD, LLAMA = "builtin:mini-sd", "builtin:smollm2-135m"


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(*words: object) -> None:
    """Run one command, shown as it could be typed; stop the demo with its exit code when it fails."""
    typed = [str(w) for w in words]
    print("$ " + shlex.join(typed), flush=True)
    command = ["-m", *typed] if typed[0] == "lorakit" else typed[1:]
    done = subprocess.run([sys.executable, *command], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def train(command: str, recipe: str, folder: Path, name: str) -> Path:
    """Train, or go on with a run that was interrupted; the run folder."""
    resume = ["--resume"] if (folder / name).exists() else []
    run("lorakit", command, HERE / recipe, "--set", f"output.folder={folder}", "--set", f"output.name={name}", *resume)
    return folder / name


def first_and_last(parent: Path) -> tuple[Path, Path]:
    """The sample folders before the first step and after the last."""
    steps = sorted(p for p in parent.iterdir() if p.name.startswith("step-"))
    return steps[0], steps[-1]


def before_after(run_folder: Path, out: Path) -> None:
    """Two sample grids, one above the other."""
    grids = [Image.open(folder / "grid.png").convert("RGB") for folder in first_and_last(run_folder / "samples")]
    band = 20
    sheet = Image.new("RGB", (grids[0].width, sum(g.height + band for g in grids)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for label, grid in zip(("before", "after: the same prompts and seeds"), grids, strict=True):
        draw.text((6, top + 4), label, fill="black")
        sheet.paste(grid, (0, top + band))
        top += grid.height + band
    sheet.save(out)


def held_out(run_folder: Path) -> tuple[float, float]:
    """The first and the last held-out loss of a run."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    return losses[0], losses[-1]


def write_answers(run_folder: Path, out: Path) -> None:
    """Answers before and after, side by side, with held-out loss and perplexity of both."""
    rows = [
        [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        for folder in first_and_last(run_folder / "samples")
    ]
    losses = held_out(run_folder)
    text = ["| | held-out loss | perplexity |", "|---|---|---|"]
    text += [f"| {n} | {x:.3f} | {np.exp(x):.2f} |" for n, x in zip(("before", "after"), losses, strict=True)]
    for before, after in zip(*rows, strict=True):
        text += ["", f"**{before['prompt']}**", "", f"- before: {before['answer']}", f"- after: {after['answer']}"]
    out.write_text("\n".join(text) + "\n")


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(p).convert("RGB")).astype(int) for p in sorted(folder.glob("[0-9]*.png"))]


def compare_pictures(folder: Path, run_folder: Path) -> str:
    """Draw from base + adapter and from the merged model, and say how far apart the pictures are."""
    merged, prompts = folder / "merged-sd", ["rocket", "pizza"]
    asked = [w for p in prompts for w in ("--prompt", p)]
    for base, adapter, out in ((SD, ["--adapter", run_folder], "from-adapter"), (merged, [], "from-merged")):
        if not (folder / out).exists():
            run("lorakit", "generate", "--base", base, *adapter, *asked, "--seed", 7, "--out", folder / out)
    pairs = zip(pictures(folder / "from-adapter"), pictures(folder / "from-merged"), strict=True)
    mean = float(np.mean([np.abs(a - b).mean() for a, b in pairs]))
    verdict = "agree" if mean < 2 else "DO NOT AGREE"
    return f"pictures of base + adapter and of the merged model {verdict}: they differ by {mean:.2f} of 255 on average"


def compare_answers(folder: Path, run_folder: Path) -> str:
    """Answer from base + adapter and from the merged model, greedily, and say whether the words are the same."""
    merged, prompt = folder / "merged-llama", "What does math.gcd do?"
    for base, adapter, out in ((LLAMA, ["--adapter", run_folder], "from-adapter"), (merged, [], "from-merged")):
        target = folder / f"{out}.jsonl"
        if not target.exists():
            run("lorakit", "generate", "--base", base, *adapter, "--prompt", prompt,
                "--temperature", 0, "--max-new-tokens", 60, "--out", target)  # fmt: skip
    answers = [json.loads((folder / f"{out}.jsonl").read_text())["answer"] for out in ("from-adapter", "from-merged")]
    if answers[0] == answers[1]:
        return "answers of base + adapter and of the merged model agree word for word"
    return "answers of base + adapter and of the merged model DO NOT AGREE"


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    say("Stable Diffusion: teach builtin:mini-sd the look of OpenMoji")
    run("python", HERE / "openmoji-style/make_pictures.py")
    sd = train("train-sd", "openmoji-style.yaml", folder, "openmoji-style")
    before_after(sd, folder / "before-after.png")

    say("LLaMA: teach builtin:smollm2-135m the words of Python's documentation")
    run("python", HERE / "python-help/make_chats.py")
    llama = train("train-llama", "python-help.yaml", folder, "python-help")
    write_answers(llama, folder / "before-after.md")

    say("Merge both, and generate from base + adapter and from the merged models")
    for base, adapter, out in ((SD, sd, "merged-sd"), (LLAMA, llama, "merged-llama")):
        if not (folder / out).exists():
            run("lorakit", "merge", base, adapter, folder / out)
    verdicts = [compare_pictures(folder, sd), compare_answers(folder, llama)]

    say(f"Done in {(time.monotonic() - started) / 60:.1f} minutes")
    print((folder / "before-after.md").read_text())
    for name, run_folder in (("Stable Diffusion", sd), ("LLaMA", llama)):
        before, after = held_out(run_folder)
        print(f"{name}: held-out loss {before:.4f} -> {after:.4f}")
    print("\n".join(verdicts))
    print(f"""
{folder}/before-after.png           the same prompts and seeds, before and after
{folder}/before-after.md            answers before and after, held-out loss and perplexity
{sd}/          the run: adapter/, openmoji-style.safetensors, metrics, loss.png
{llama}/             the run: adapter/, metrics, loss.png
{folder}/merged-sd  {folder}/merged-llama   load in plain diffusers / transformers

Next, with your own pictures:  lorakit init sd my-style.yaml""")
    if any("DO NOT" in v for v in verdicts):
        sys.exit("the merged models do not agree with base + adapter")


if __name__ == "__main__":
    main()
