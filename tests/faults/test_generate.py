"""Faults 65 to 70: what generate leaves, and never leaves."""

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from lorakit.families.sd.pictures import read_settings
from tests.faults.harness import lorakit, untouched
from tests.tiny import tiny_llama, tiny_sd

SMALL = ("--width", "32", "--height", "32", "--steps", "2")


@pytest.mark.fault(65)
@pytest.mark.parametrize("prompt", ["../../etc/passwd", "/tmp/x", "a\0b", "-rf", "con:", "a" * 5000, "\x1b[31m\n"])
def test_65_prompts_never_name_files(tmp_path: Path, whole_sd: Path, prompt: str) -> None:
    told = lorakit("generate", "--base", whole_sd, f"--prompt={prompt}", "--out", tmp_path / "out", *SMALL)
    assert told.code == 0, told.err
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/0001.png"]
    with Image.open(tmp_path / "out/0001.png") as picture:
        assert picture.size == (32, 32)


@pytest.mark.fault(66)
def test_66_out_is_there_or_a_link(tmp_path: Path, whole_sd: Path, whole_llama: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "dangling").symlink_to("nowhere")
    for base, outs in ((whole_sd, ("file", "link", "dangling")), (whole_llama, ("file", "link", "dangling"))):
        for out in outs:
            with untouched(tmp_path):
                told = lorakit("generate", "--base", base, "--prompt", "a", "--out", tmp_path / out)
                told.refused(7, str(tmp_path / out))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/0001.png").symlink_to("../file")
    told = lorakit("generate", "--base", whole_sd, "--prompt", "a", "--out", tmp_path / "out", *SMALL)
    assert told.code == 0, told.err
    assert (tmp_path / "file").read_text() == "precious"
    assert (tmp_path / "out/0002.png").is_file()


@pytest.mark.fault(66)
def test_66_what_lies_beside_out_stays(tmp_path: Path, whole_sd: Path, whole_llama: Path) -> None:
    (tmp_path / "answers.jsonl.settings.json").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/grid-0001.png").write_text("precious")
    with untouched(tmp_path):
        asked = ("--prompt", "a", "--out", tmp_path / "answers.jsonl", "--max-new-tokens", "2")
        lorakit("generate", "--base", whole_llama, *asked).refused(7, "answers.jsonl.settings.json")
    told = lorakit("generate", "--base", whole_sd, "-p", "a", "-p", "b", "--out", tmp_path / "out", *SMALL)
    assert told.code == 0, told.err
    assert (tmp_path / "out/grid-0001.png").read_text() == "precious"
    assert (tmp_path / "out/grid-0001-2.png").is_file()


@pytest.mark.fault(67)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("width", "33"),
        ("height", "100000"),
        ("steps", "1001"),
        ("steps", "0"),
        ("count", "100000"),
        ("guidance-scale", "nan"),
        ("guidance-scale", "inf"),
        ("guidance-scale", "-1"),
        ("scheduler", "fast"),
        ("width", str(2**70)),
    ],
)
def test_67_sizes_steps_and_counts(tmp_path: Path, whole_sd: Path, option: str, value: str) -> None:
    told = lorakit("generate", "--base", whole_sd, "--prompt", "a", "--out", tmp_path / "out", f"--{option}={value}")
    told.refused(2, f"--{option}")
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(67)
@pytest.mark.parametrize("option", ["temperature=nan", "temperature=inf", "top-p=nan", "min-p=nan", "seed=-1"])
def test_67_choices_that_are_no_numbers(tmp_path: Path, whole_llama: Path, option: str) -> None:
    told = lorakit("generate", "--base", whole_llama, "--prompt", "a", "--out", tmp_path / "out.jsonl", f"--{option}")
    told.refused(2, f"--{option.split('=')[0]}")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.fault(68)
def test_68_latents_that_are_not_finite(sd: Path) -> None:
    path = sd / "base/unet/diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with untouched(sd):
        told = lorakit("generate", "--base", sd / "base", "--prompt", "a", "--out", sd / "out", *SMALL)
        told.refused(5, "not finite")


@pytest.mark.fault(69)
def test_69_a_prompt_that_is_too_long(tmp_path: Path, whole_sd: Path, whole_llama: Path) -> None:
    words = "rocket " * 600 + "lostword"
    told = lorakit("generate", "--base", whole_sd, "--prompt", words, "--out", tmp_path / "out", *SMALL)
    assert told.code == 0
    assert "its end is not read" in told.err
    assert "lostword" in told.err.replace(" ", "")
    lorakit("generate", "--base", whole_llama, "--prompt", words).refused(4, "prompt", "tokens")


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lorakit", "generate", *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def stop(running: subprocess.Popen[str], enough: Path, count: int, number: int) -> str:
    """Send a signal once ``count`` lines or pictures are at ``enough``; what the process said."""
    end = time.monotonic() + 240
    while time.monotonic() < end and running.poll() is None:
        done = len(list(enough.glob("*.png")))
        if enough.suffix == ".jsonl" and enough.exists():
            done = enough.stat().st_size
        if done >= count:
            break
        time.sleep(0.01)
    running.send_signal(number)
    return running.communicate(timeout=120)[1]


@pytest.mark.fault(70)
def test_70_an_interrupted_batch_of_pictures_goes_on(tmp_path: Path, whole_sd: Path) -> None:
    words = ("--base", whole_sd, "--prompt", "red", "--prompt", "blue", "--count", "20", *SMALL[:4], "--steps", "40")
    out = tmp_path / "out"
    running = start(*words, "--out", out)
    told = stop(running, out, 8, signal.SIGTERM)
    assert running.returncode == 75, told
    assert "--resume" in told
    assert "Traceback" not in told
    left = sorted(out.glob("*.png"))
    assert 8 <= len(left) < 40
    before = {path.name: path.read_bytes() for path in left}
    assert all(read_settings(path) for path in left)
    assert lorakit("generate", *words, "--out", out, "--resume").code == 0
    assert {name: (out / name).read_bytes() for name in before} == before
    jobs = [read_settings(path) or {} for path in sorted(out.glob("[0-9]*.png"))]
    assert sorted((job["prompt"], job["seed"]) for job in jobs) == [(p, s) for p in ("blue", "red") for s in range(20)]
    assert not list(out.glob(".tmp-*"))


@pytest.mark.fault(70, 66)
def test_70_an_interrupted_batch_of_answers_goes_on(tmp_path: Path, whole_llama: Path) -> None:
    prompts, out, whole = tmp_path / "prompts.txt", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    prompts.write_text("".join(f"What is {i}?\n" for i in range(40)))
    words = ("--base", whole_llama, "--prompts", prompts, "--max-new-tokens", "40", "--precision", "fp32")
    running = start(*words, "--out", out)
    told = stop(running, out, 200, signal.SIGINT)
    assert running.returncode == 130, told
    assert "--resume" in told
    lorakit("generate", *words, "--out", out).refused(7, str(out))
    out.write_bytes(out.read_bytes() + b'{"prompt": "What is')
    assert lorakit("generate", *words, "--out", out, "--resume").code == 0
    assert lorakit("generate", *words, "--out", whole).code == 0
    assert out.read_bytes() == whole.read_bytes()
    assert lorakit("generate", *words, "--out", out, "--resume").out == f"{out} has all answers\n"
    with untouched(tmp_path):
        again = ("generate", *words, "--out", out, "--resume", "--temperature", "0.1", "--seed", "3")
        lorakit(*again).refused(7, "made with another seed and temperature")
    other = tiny_llama(tmp_path / "other", tied=False, seed=1)
    with untouched(tmp_path):
        again = ("generate", "--base", other, *words[2:], "--out", out, "--resume")
        lorakit(*again).refused(7, "made with another base")
    out.write_text('{"prompt": "another"}\n')
    with untouched(tmp_path):
        lorakit("generate", *words, "--out", out, "--resume").refused(7, "other than the answers")
    (tmp_path / f"{out.name}.settings.json").unlink()
    lorakit("generate", *words, "--out", out, "--resume").refused(7, f"{out.name}.settings.json")


def pictures(out: Path) -> dict[str, tuple[str, int]]:
    read = {path.name: read_settings(path) for path in sorted(out.glob("[0-9]*.png"))}
    return {name: (settings["prompt"], settings["seed"]) for name, settings in read.items() if settings}


@pytest.mark.fault(70)
def test_70_of_equal_prompts_each_gets_its_picture(tmp_path: Path, whole_sd: Path) -> None:
    out = tmp_path / "out"
    words = ("generate", "--base", whole_sd, *SMALL, "--out", out, "--prompt", "a")
    assert lorakit(*words).code == 0
    assert lorakit(*words, "--prompt", "a", "--prompt", "b", "--resume").code == 0
    assert sorted(pictures(out).values()) == [("a", 0), ("a", 0), ("b", 0)]


@pytest.mark.fault(70)
def test_70_pictures_of_another_base_are_not_those_asked_for(tmp_path: Path, whole_sd: Path) -> None:
    out, base = tmp_path / "out", tmp_path / "base"
    shutil.copytree(whole_sd, base)
    words = ("generate", "--base", base, *SMALL, "--out", out, "--prompt", "a", "--resume")
    assert lorakit(*words).code == 0
    shutil.rmtree(base)
    tiny_sd(base, seed=1)
    assert lorakit(*words).code == 0
    assert len(pictures(out)) == 2


def test_two_batches_in_one_folder_keep_all_their_pictures(tmp_path: Path, whole_sd: Path) -> None:
    """As the second begins to draw, the first has its numbers: each takes the next that is free."""
    out = tmp_path / "out"
    (out).mkdir()
    (out / "².png").write_bytes(b"not a number")
    command = ("--base", whole_sd, *SMALL[:4], "--steps", "12", "--count", "6", "--out", out)
    running = [start(*command, "--prompt", prompt) for prompt in "ab"]
    for batch in running:
        told = batch.communicate(timeout=240)
        assert batch.returncode == 0, told
    made = pictures(out)
    assert sorted(made.values()) == [(prompt, seed) for prompt in "ab" for seed in range(6)]
    assert list(made) == [f"{number:04d}.png" for number in range(1, 13)]


@pytest.mark.parametrize(
    ("family", "option"),
    [("llama", ("--steps", "3")), ("llama", ("--width", "64")), ("sd", ("--temperature", "0"))],
)
def test_settings_of_the_other_family(family: str, option: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    base: Path = request.getfixturevalue(f"whole_{family}")
    lorakit("generate", "--base", base, "--prompt", "a", *option).refused(2, f"{option[0]}: is not for {base}")


def test_prompts_of_several_lines(tmp_path: Path, whole_llama: Path) -> None:
    prompts = ["one\ntwo", "three"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt, "id": 1}) + "\n" for prompt in prompts))
    words = ("--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "a.jsonl", "--max-new-tokens", "1")
    assert lorakit("generate", "--base", whole_llama, *words).code == 0
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == prompts


def test_the_prompt_that_is_no_good_is_told(tmp_path: Path, whole_llama: Path) -> None:
    (tmp_path / "prompts.txt").write_text("hallo\n" + "x " * 600 + "\nok\n")
    words = ("generate", "--base", whole_llama, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "a.jsonl")
    lorakit(*words).refused(4, f"prompt '{'x ' * 30}...': the prompt has", "tokens")


def test_answers_that_nothing_keeps_cannot_be_gone_on_after(whole_llama: Path) -> None:
    lorakit("generate", "--base", whole_llama, "--prompt", "a", "--resume").refused(2, "--resume: has no answers")


def test_a_raw_prompt_has_no_system_message(whole_llama: Path) -> None:
    words = ("generate", "--base", whole_llama, "--prompt", "a", "--raw", "--system", "b")
    lorakit(*words).refused(2, "--raw and --system do not go together")


def test_quantized_weights_answer_and_take_no_sum(whole_llama: Path) -> None:
    words = ("generate", "--base", whole_llama, "--prompt", "a", "--fuse", "--quantization", "nf4")
    lorakit(*words).refused(2, "--fuse and --quantization do not go together")
    told = lorakit(*words[:5], "--quantization", "nf4", "--max-new-tokens", "2")
    assert told.code == 0, told.err


def test_a_prompt_is_a_line_and_ends_at_nothing_else(tmp_path: Path, whole_llama: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("a\u2028b\r\nc\x0cd\n\n".encode())
    out = tmp_path / "out.jsonl"
    words = ("--base", whole_llama, "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", "1", "--out", out)
    assert lorakit("generate", *words).code == 0
    answered = [json.loads(line)["prompt"] for line in out.read_bytes().split(b"\n") if line]
    assert answered == ["a\u2028b", "c\x0cd"]


@pytest.mark.fault(66)
def test_66_two_batches_never_share_a_file_of_answers(tmp_path: Path, whole_llama: Path) -> None:
    (tmp_path / "p.txt").write_text("".join(f"What is {n}?\n" for n in range(8)))
    out = tmp_path / "a.jsonl"
    command = ("--base", whole_llama, "--prompts", tmp_path / "p.txt", "--max-new-tokens", "8", "--out", out)
    running = [start(*command) for _ in range(2)]
    told = [batch.communicate(timeout=240)[1] for batch in running]
    assert sorted(batch.returncode for batch in running) == [0, 7], told
    assert len(out.read_text().splitlines()) == 8
    with out.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with untouched(tmp_path):
            lorakit("generate", *command, "--resume").refused(7, "another process is adding to it")
