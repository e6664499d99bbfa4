"""A merge that proves itself: what verifying finds, the receipt, the plan, the command line, and a killed merge."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lorakit.adapters.merging.change import Change
from lorakit.adapters.merging.merge import merge
from lorakit.adapters.merging.stream import OutFile, Summed, Tally, Written, write_file
from lorakit.adapters.merging.verify import Proof, ReadBack
from lorakit.cli import app
from lorakit.errors import LorakitError, ModelError
from lorakit.storage.atomic import new_folder, sweep_killed
from lorakit.storage.bases import resolve
from lorakit.storage.manifest import sha256
from tests.adapters.merging.test_merge_parts import adapter, planned
from tests.tiny import tiny_llama, tiny_sd


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, in bf16 and three shards, and two adapters a and b."""
    folder = tmp_path_factory.mktemp("proof")
    base = tiny_llama(folder / "base", dtype=torch.bfloat16, tied=False, max_shard_size="60KB")
    for seed, name in enumerate(("a", "b")):
        adapter(base, folder / name, seed=seed, target_modules=["q_proj", "down_proj"])
    return folder


def lorakit(*words: object) -> tuple[int, str]:
    """The command in this process: exit code, and what it printed."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(done.exception, LorakitError):
        return done.exception.exit_code, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


@pytest.fixture
def cores() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.mark.fault(62)
def test_every_kind_of_damage_is_found(models: Path, tmp_path: Path, cores: Executor) -> None:
    plan = planned(models / "base", [(models / "a", 1.0)], tmp_path / "out")
    out = next(f for f in plan.files.values() if any(s.change for t in f.tensors.values() for s in t.spans))
    path, proof = tmp_path / "model.safetensors", Proof()
    written = write_file(path, out, Tally(), lambda _: None, cores, proof)
    assert written.sha256 == sha256(path)
    changed = sum(span.change is not None for target in out.tensors.values() for span in target.spans)
    assert proof.checked.changed == changed > 0
    assert 0 < proof.checked.worst <= 1

    def read_back(written: Written, by_model: Sequence[str] = ()) -> int:
        """The bytes of what was looked at; some tensors are read by somebody else before."""
        read: list[int] = []
        back = ReadBack(path, out, written, read.append)
        for name in by_model:
            torch.testing.assert_close(back.rows(name, 0, back.slots[name].rows), rows_of(path, name), rtol=0, atol=0)
        back.finish()
        return sum(read)

    assert read_back(written) == read_back(written, list(out.tensors)[::-2]) == out.size
    whole, place = path.read_bytes(), len(out.header())
    for name, target in out.tensors.items():
        flip(path, place + 1)
        with pytest.raises(ModelError, match="read back") as caught:
            read_back(written)
        assert caught.value.where.endswith(name)
        back = ReadBack(path, out, written, lambda _: None)
        with pytest.raises(ModelError, match="read back"):
            back.rows(name, 0, target.slot.rows)
        path.write_bytes(whole)
        place += target.slot.bytes
    path.write_bytes(whole[:-1])
    with pytest.raises(ModelError):
        read_back(written)
    for tensors in (dict(reversed(out.tensors.items())), dict(list(out.tensors.items())[1:])):
        other = write_file(path, OutFile(tensors, out.metadata), Tally(), lambda _: None, cores)
        with pytest.raises(ModelError, match="planned"):
            read_back(other)


def rows_of(path: Path, name: str) -> torch.Tensor:
    tensor = load_file(path)[name]
    return tensor.reshape(tensor.shape[0] if tensor.dim() else 1, -1)


@pytest.mark.fault(62)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_sum_off_by_one_rounding_more_is_found(models: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """One more unit in the last place of a number, in one place of a tensor; in float32 what its sums may be off."""
    plan = planned(models / "base", [(models / "a", 1.0)], tmp_path / "out")
    key = "model.layers.0.self_attn.q_proj.weight"
    (span,) = next(file.tensors[key] for file in plan.files.values() if key in file.tensors).spans
    assert span.change is not None
    before = span.source.rows(key, span.first, span.last)
    total = before.float()
    span.change.add_(total, 0)
    right = Summed(key, span.change, 0, before, total.to(dtype))
    proof = Proof()
    proof(right)
    assert proof.checked.worst <= 1
    wrong = right.after.clone()
    wrong[5, 3] *= 1 + 2 * torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 1)
    with pytest.raises(ModelError, match="times as far") as caught:
        proof(right._replace(after=wrong))
    assert caught.value.where == key
    wrong[5, 3] = torch.nan
    with pytest.raises(ModelError, match="nan times as far"):
        proof(right._replace(after=wrong))


@pytest.mark.fault(62)
def test_what_does_not_verify_is_removed_and_exits_4(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = Change.add_

    def doubled(self: Change, rows: torch.Tensor, first: int) -> None:
        before = rows.clone()
        plain(self, rows, first)
        if self.dtype == torch.float32:
            rows.mul_(2).sub_(before)

    monkeypatch.setattr(Change, "add_", doubled)
    code, told = lorakit("merge", models / "base", models / "a", "out")
    assert (code, list(tmp_path.iterdir())) == (4, [])
    assert "does not verify" in told
    # Without the tensors' check the outputs tell.
    monkeypatch.setattr(Proof, "__call__", lambda *_: None)
    code, told = lorakit("merge", models / "base", models / "a", "out")
    assert (code, list(tmp_path.iterdir())) == (4, [])
    assert "logits of 3 prompts differ" in told


def test_receipt(models: Path, tmp_path: Path) -> None:
    code, told = lorakit("merge", models / "base", f"{models / 'a'}:0.5", models / "b", tmp_path / "out")
    assert code == 0
    assert "recomputed in float64" in told
    assert "logits of 3 prompts differ" in told
    receipt = json.loads((tmp_path / "out" / "merge_receipt.json").read_text())
    for name, digest in receipt["base"]["files"].items():
        assert digest == sha256(models / "base" / name)
    present = {path.name for path in (tmp_path / "out").iterdir()}
    assert receipt["out"].keys() == present - {"merge_receipt.json"}
    for name, digest in receipt["out"].items():
        assert digest == sha256(tmp_path / "out" / name)
    assert [(Path(a["path"]).name, a["weight"]) for a in receipt["adapters"]] == [("a", 0.5), ("b", 1.0)]
    for entry in receipt["adapters"]:
        assert sorted(entry["files"]) == [
            f"{Path(entry['path']).name}/adapter_{e}" for e in ("config.json", "model.safetensors")
        ]
        assert all(digest == sha256(models / name) for name, digest in entry["files"].items())
    assert 0 < receipt["largest_rounding"] < 0.01
    assert 0 < receipt["delta_lost_to_dtype"] < 0.1
    assert receipt["verified"]["tensors"]["recomputed"] == receipt["changed_tensors"] == 4
    assert receipt["verified"]["outputs"]["difference"] < 0.1
    code, told = lorakit("merge", models / "base", models / "a", tmp_path / "plain", "--no-verify")
    assert "verified" not in told
    assert json.loads((tmp_path / "plain" / "merge_receipt.json").read_text())["verified"] == {
        "tensors": None,
        "outputs": None,
    }


def test_an_adapter_and_a_base_from_a_hub_cache(models: Path, tmp_path: Path) -> None:
    """Where every file is a link to a blob that its SHA-256 names."""
    for name in ("base", "a"):
        blobs, snapshot = (tmp_path / f"models--me--{name}" / part for part in ("blobs", "snapshots/abc"))
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for file in (models / name).iterdir():
            blob = Path(shutil.copyfile(file, blobs / sha256(file)))
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    base, a = (tmp_path / f"models--me--{name}" / "snapshots" / "abc" for name in ("base", "a"))
    code, _ = lorakit("merge", base, a, tmp_path / "out")
    assert code == 0
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    receipt = json.loads((tmp_path / "out" / "merge_receipt.json").read_text())
    files = {**receipt["base"]["files"], **receipt["adapters"][0]["files"]}
    assert len(files) == 4  # two shards, the adapter's weights and its configuration
    for name, digest in files.items():
        assert digest == Path(os.path.realpath(a / Path(name).name if "adapter" in name else base / name)).name


def test_the_sum_as_an_adapter(models: Path, tmp_path: Path) -> None:
    specs = [f"{models / 'a'}:0.5", f"{models / 'b'}:-2"]
    for rank, exact in ((8, True), (3, False)):
        code, told = lorakit("merge", models / "base", *specs, tmp_path / str(rank), "--as-adapter", rank)
        assert code == 0
        assert ("keeps 100.00%" in told) == exact
        lora = load_file(tmp_path / str(rank) / "adapter_model.safetensors")
        parts = [(load_file(models / n / "adapter_model.safetensors"), w * 6 / 4) for n, w in (("a", 0.5), ("b", -2))]
        for key in [key for key in lora if "lora_A" in key]:
            other = key.replace("lora_A", "lora_B")
            total = sum(s * t[other].double() @ t[key].double() for t, s in parts)
            found = lora[other].double() @ lora[key].double()
            u, sizes, v = torch.linalg.svd(total)
            best = (u[:, :rank] * sizes[:rank]) @ v[:rank]
            torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)


def test_the_sum_as_an_adapter_is_planned_and_takes_no_other_options(models: Path, tmp_path: Path) -> None:
    words = ("merge", models / "base", models / "a", tmp_path / "out", "--as-adapter", 2)
    code, told = lorakit(*words, "--dry-run")
    assert (code, list(tmp_path.iterdir())) == (0, [])
    assert "would keep" in told
    (tmp_path / "out").mkdir()
    assert lorakit(*words, "--dry-run")[0] == 7
    (tmp_path / "out").rmdir()
    for option in (("--dtype", "float16"), ("--quant-base", "original"), ("--overwrite",), ("--no-verify",)):
        code, told = lorakit(*words, *option)
        assert code == 2
        assert f"{option[0]} do not go together" in told
    assert lorakit("merge", models / "base", models / "a", tmp_path / "out", "--scale", "nan")[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_dry_run_and_another_base(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, told = lorakit("merge", models / "base", f"{models / 'a'}:0.5", "out", "--scale", 0.5, "--dry-run")
    assert code == 0
    assert "x 0.25 (peft, rank 4)" in told
    assert "4 of 21 tensors" in told
    assert "out/model-00001-of-" in told
    assert list(tmp_path.iterdir()) == []
    files = {name: (models / "a" / f"adapter_{name}").read_bytes() for name in ("config.json", "model.safetensors")}
    other = tmp_path / "other"
    other.mkdir()
    for name, content in files.items():
        (other / f"adapter_{name}").write_bytes(content)
    tensors = load_file(other / "adapter_model.safetensors")
    for digest, expected in ((hashlib.sha256(b"x").hexdigest(), True), (_digest(models), False)):
        save_file(tensors, other / "adapter_model.safetensors", {"lorakit_base": f"another/base sha256:{digest}"})
        _, told = lorakit("merge", models / "base", other, "out", "--dry-run")
        assert ("not trained on these weights" in told) == expected
        code, told = lorakit("merge", models / "base", other, f"out-{expected}", "--no-verify")
        assert (code, "warning: " in told) == (0, expected)


def _digest(models: Path) -> str:
    from lorakit.storage.bases import digest

    return digest(resolve(str(models / "base")))


def test_what_a_living_process_writes_is_not_swept(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", manifest=False) as folder:
        sweep_killed(tmp_path / "out")
        assert folder.is_dir()
    leftover = tmp_path / ".tmp-out-x"
    leftover.mkdir()
    (tmp_path / ".tmp-out-y").symlink_to(tmp_path)
    sweep_killed(tmp_path / "out")
    assert not leftover.exists()
    assert os.path.lexists(tmp_path / ".tmp-out-y")


@pytest.mark.parametrize("name", ["out.ckpt", "out.SAFETENSORS", "out.gguf"])
def test_a_file_of_a_kind_that_is_not_written(models: Path, tmp_path: Path, name: str) -> None:
    code, told = lorakit("merge", models / "base", models / "a", tmp_path / name)
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert "a file whose name ends in .safetensors" in told


@pytest.mark.parametrize("options", [("--dry-run",), ("--no-verify",), ()])
def test_a_base_that_lacks_a_tensor_is_refused_by_the_plan(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Its adapter touches another one, so that nothing but the config asks for it."""
    sd = tiny_sd(tmp_path / "sd")
    unet = UNet2DConditionModel.from_pretrained(sd / "unet")
    tuned = get_peft_model(unet, LoraConfig(r=2, target_modules=["to_q"]))
    tuned.save_pretrained(tmp_path / "style" / "unet")
    llama = tiny_llama(tmp_path / "llama", tied=False)
    adapter(llama, tmp_path / "chats", target_modules=["q_proj"])
    for base, trained, file, name in (
        (llama, "chats", "model.safetensors", "model.layers.1.mlp.up_proj.weight"),
        (llama, "chats", "model.safetensors", "lm_head.weight"),
        (sd, "style", "unet/diffusion_pytorch_model.safetensors", "conv_norm_out.bias"),
        (sd, "style", "vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
    ):
        tensors = load_file(base / file)
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, base / file, {"format": "pt"})
        code, told = lorakit("merge", base, tmp_path / trained, tmp_path / "out", *options)
        assert (code, f"{name}: the base lacks it" in told) == (4, True), told
        assert not (tmp_path / "out").exists()
        save_file(tensors, base / file, {"format": "pt"})
        assert lorakit("merge", base, tmp_path / trained, tmp_path / "out", *options)[0] == 0
        if (tmp_path / "out").exists():
            shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"])
def test_a_base_with_numbers_that_are_not_finite(models: Path, tmp_path: Path, number: float, name: str) -> None:
    """In a tensor that the adapter changes, and in one that it does not."""
    base = Path(shutil.copytree(models / "base", tmp_path / "base"))
    file = base / json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][-1, -1] = number
    save_file(tensors, file, {"format": "pt"})
    for options in ((), ("--no-verify",), ("--dtype", "float32")):
        code, told = lorakit("merge", base, models / "a", tmp_path / "out", *options)
        assert (code, told) == (4, f"{name}: NaN or infinity in the base")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight", ["3e38", "-1e300"])
def test_a_weight_that_float32_does_not_hold_is_refused(models: Path, tmp_path: Path, weight: str) -> None:
    """3e38 times alpha / rank = 1.5."""
    words = ("merge", models / "base", f"{models / 'a'}:{weight}", tmp_path / "out")
    for more in ((), ("--dry-run",)):
        told = f"{models / 'a'}: taken {float(weight):g} times, its change is more than float32 holds"
        assert lorakit(*words, *more) == (4, told)
    told = "model.layers.0.mlp.down_proj: the sum is more than float32 holds"
    assert lorakit(*words, "--as-adapter", 2) == (4, told)
    assert list(tmp_path.iterdir()) == []


def test_a_module_saved_whole_that_is_not_finite_is_refused_by_the_plan(models: Path, tmp_path: Path) -> None:
    adapter(models / "base", tmp_path / "c", target_modules=["q_proj"], modules_to_save=["lm_head"])
    file, key = tmp_path / "c" / "adapter_model.safetensors", "base_model.model.lm_head.weight"
    tensors = load_file(file)
    tensors[key][-1, -1] = float("nan")
    save_file(tensors, file)
    code, told = lorakit("merge", models / "base", tmp_path / "c", tmp_path / "out", "--dry-run")
    assert (code, told) == (4, f"{file}: {key}: NaN or infinity")


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5, 1e-7, 1e-9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_share_lost_is_that_of_the_exact_sum(tmp_path: Path, dtype: torch.dtype, size: float) -> None:
    """Changes down to what float32 itself does not see beside the weight, against numpy's float64."""
    base = tiny_llama(tmp_path / "base", dtype=dtype, tied=False)
    adapter(base, tmp_path / "a", target_modules=["q_proj", "down_proj"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    lora = {name: tensor * (size if "lora_B" in name else 1) for name, tensor in load_file(file).items()}
    save_file(lora, file)
    report = merge(planned(base, [(tmp_path / "a", 1.0)], tmp_path / "out"))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    error = change = largest = 0.0
    for key in [name for name in lora if "lora_B" in name]:
        name = key.removeprefix("base_model.model.").replace("lora_B.", "")
        b, a = (lora[k].double().numpy() for k in (key, key.replace("lora_B", "lora_A")))
        delta = 6 / 4 * b @ a
        off = after[name].double().numpy() - (before[name].double().numpy() + delta)
        error, change = error + (off**2).sum(), change + (delta**2).sum()
        largest = max(largest, abs(off).max())
    assert report.lost == pytest.approx((error / change) ** 0.5, rel=0.01, abs=1e-7)
    assert report.rounding == pytest.approx(largest, rel=0.01, abs=2**-26)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_share_lost_of_dora_and_of_whole_tensors_is_exact_too(
    tmp_path: Path, dtype: torch.dtype, size: float
) -> None:
    base = tiny_llama(tmp_path / "base", dtype=dtype, tied=False)
    adapter(base, tmp_path / "a", target_modules=["q_proj"], use_dora=True, modules_to_save=["down_proj"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    before, saved = load_file(base / "model.safetensors"), load_file(file)
    exact = {}
    for key, tensor in saved.items():
        name = key.removeprefix("base_model.model.")
        if "lora_" not in key:
            weight = before[name].float()
            saved[key] = weight + size * (tensor - weight)
            exact[name] = before[name].double() + 0.3 * (saved[key].double() - before[name].double())
        elif "lora_B" in key:
            saved[key] = tensor * size
    for key in [key for key in saved if "lora_B" in key]:
        b, a, m = (saved[key.replace("lora_B.weight", part)].double() for part in
                   ("lora_B.weight", "lora_A.weight", "lora_magnitude_vector"))  # fmt: skip
        name = key.removeprefix("base_model.model.").replace("lora_B.", "")
        direction = before[name].double() + 0.3 * 6 / 4 * b @ a
        exact[name] = direction * (m / direction.norm(dim=1))[:, None]
    save_file(saved, file)
    report = merge(planned(base, [(tmp_path / "a", 0.3)], tmp_path / "out"))
    after = load_file(tmp_path / "out" / "model.safetensors")
    error = sum(float((after[name].double() - total).square().sum()) for name, total in exact.items())
    change = sum(float((total - before[name].double()).square().sum()) for name, total in exact.items())
    assert report.changed == len(exact) == 4
    assert report.lost == pytest.approx((error / change) ** 0.5, rel=0.02)


def test_a_shard_that_is_removed_meanwhile_is_named(models: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(models / "base", tmp_path / "base"))
    plan = planned(base, [(models / "a", 1.0)], tmp_path / "out")
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match="was removed meanwhile") as caught:
        merge(plan)
    assert caught.value.where == str(shard)
    assert not (tmp_path / "out").exists()
