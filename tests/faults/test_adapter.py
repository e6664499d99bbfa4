"""Faults 34 to 42: the adapter, by every command that takes one."""

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.adapters.files import read_adapter
from tests.faults.harness import Told, forked, lorakit, untouched
from tests.raw_gguf import RawGguf

Edit = Callable[..., None]
WEIGHTS = "adapter/adapter_model.safetensors"
CONFIG = "adapter/adapter_config.json"
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, whole_llama: Path) -> Path:
    """A run folder with an adapter of rank 4 for ``whole_llama``."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    (folder / "r.yaml").write_text(
        f"base: {{model: {whole_llama}}}\nadapter: {{rank: 4}}\ntrain: {{steps: 1, batch_size: 1}}\n"
        f"data: {{train: [{{path: {folder}/chats.jsonl}}], held_out: 0, max_tokens: 64}}\n"
        f"output: {{folder: {folder}/runs}}\ncompute: {{device: cpu, precision: fp32}}\n"
    )
    assert lorakit("train-llama", folder / "r.yaml").code == 0
    return folder / "runs/run"


@pytest.fixture
def here(tmp_path: Path, trained: Path) -> Path:
    """A copy of the adapter in a folder to break."""
    (tmp_path / "adapter").mkdir()
    for path in (trained / "adapter").iterdir():
        (tmp_path / "adapter" / path.name).write_bytes(path.read_bytes())
    return tmp_path


def commands(adapter: Path, base: Path) -> list[tuple[object, ...]]:
    out = adapter.parent
    return [
        ("generate", "--base", base, "--adapter", adapter, "--prompt", "a", "--out", out / "answers.jsonl"),
        ("merge", base, adapter, out / "merged"),
        ("convert", adapter, out / "converted.gguf", "--to", "gguf", "--base", base),
    ]


def refuse(adapter: Path, base: Path, *words: str) -> Told:
    """Every command refuses with exit code 4, quickly and in little memory, and leaves all as it is."""
    for command in commands(adapter, base):
        with untouched(adapter.parent):
            told = forked(*command, megabytes=200, seconds=10).refused(4, str(adapter), *words)
    return told


def change(folder: Path, **tensors: Tensor | None) -> None:
    path = folder / WEIGHTS
    table = load_file(path)
    for name, tensor in tensors.items():
        if tensor is None:
            del table[name]
        else:
            table[name] = tensor
    save_file(table, path)


@pytest.mark.fault(34)
def test_34_wrong_shape(here: Path, whole_llama: Path) -> None:
    change(here, **{f"{LAYER}.lora_A.weight": torch.zeros(4, 33)})
    refuse(here / "adapter", whole_llama, "layers.0.self_attn.q_proj", "(32, 33)", "(32, 32)")
    change(here, **{f"{LAYER}.lora_A.weight": torch.zeros(4, 32), f"{LAYER}.lora_B.weight": torch.zeros(32, 5)})
    refuse(here / "adapter", whole_llama, "layers.0.self_attn.q_proj", "do not multiply")
    change(here, **{f"{LAYER}.lora_B.weight": torch.zeros(32 * 4)})
    refuse(here / "adapter", whole_llama, "layers.0.self_attn.q_proj")


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{LAYER}.lora_A.weight", None),
        (f"{LAYER}.lora_B.weight", None),
        (f"{LAYER}.lora_C.weight", torch.zeros(4, 4)),
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", torch.zeros(4, 32)),
        (f"{LAYER}.lora_A.default.weight", torch.zeros(4, 32)),
    ],
)
def test_35_a_key_too_few_or_too_many(here: Path, whole_llama: Path, name: str, tensor: Tensor | None) -> None:
    change(here, **{name: tensor})
    refuse(here / "adapter", whole_llama, name.rpartition(".lora_")[0] or name)


@pytest.mark.fault(35)
def test_35_a_module_that_the_configuration_has_and_the_weights_lack(here: Path, whole_llama: Path) -> None:
    change(here, **{f"{LAYER}.lora_{letter}.weight": None for letter in "AB"})
    for command in commands(here / "adapter", whole_llama):
        lorakit(*command).refused(4, "model.layers.0.self_attn.q_proj", "the weights do not have it")


@pytest.mark.fault(36)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_36_not_finite(here: Path, whole_llama: Path, value: float) -> None:
    bad = torch.zeros(32, 4)
    bad[3, 1] = value
    change(here, **{f"{LAYER}.lora_B.weight": bad})
    refuse(here / "adapter", whole_llama, f"{LAYER}.lora_B.weight", "NaN or infinity")


@pytest.mark.fault(37)
def test_37_missing_alpha_is_the_rank_and_a_warning(tmp_path: Path, whole_sd: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.randn(4, 32), f"{name}.lora_up.weight": torch.randn(32, 4)}
    save_file(tensors, tmp_path / "without.safetensors")
    save_file({**tensors, f"{name}.alpha": torch.tensor(4.0)}, tmp_path / "with.safetensors")
    for kind in ("without", "with"):
        told = lorakit("merge", whole_sd, tmp_path / f"{kind}.safetensors", tmp_path / kind)
        assert told.code == 0, told.err
        assert ("no alpha for 1 modules" in told.err) is (kind == "without")
    merged = [
        (tmp_path / kind / "unet/diffusion_pytorch_model.safetensors").read_bytes() for kind in ("with", "without")
    ]
    assert merged[0] == merged[1]


@pytest.mark.fault(37)
def test_37_no_alpha_in_pefts_own_files_is_pefts_8(here: Path, whole_llama: Path) -> None:
    config = json.loads((here / CONFIG).read_text())
    for alpha in (8, None):
        (here / CONFIG).write_text(
            json.dumps({k: v for k, v in (config | {"lora_alpha": alpha}).items() if v is not None})
        )
        told = lorakit("merge", whole_llama, here / "adapter", here / f"out-{alpha}")
        assert told.code == 0, told.err
        assert ("no lora_alpha; PEFT's own 8 is taken" in told.err) is (alpha is None)
    receipts = [json.loads((here / f"out-{alpha}/merge_receipt.json").read_text())["out"] for alpha in (8, None)]
    assert receipts[0] == receipts[1]


@pytest.mark.fault(37)
def test_37_no_alpha_in_gguf_is_the_rank_and_a_warning(here: Path, whole_llama: Path) -> None:
    path = here / "x.gguf"
    assert lorakit("convert", here / "adapter", path, "--to", "gguf", "--base", whole_llama).code == 0
    raw = RawGguf.read(path)
    raw.keys = [(key, value) for key, value in raw.keys if key != b"adapter.lora.alpha"]
    raw.write(path)
    told = lorakit("merge", whole_llama, path, here / "out")
    assert told.code == 0, told.err
    assert "no alpha for" in told.err


@pytest.mark.fault(38)
def test_38_keys_of_several_formats_or_none(tmp_path: Path, whole_sd: Path) -> None:
    kohya, diffusers = "lora_unet_a.lora_down.weight", "unet.a.lora_A.weight"
    peft = "base_model.model.a.lora_A.weight"
    path = tmp_path / "x.safetensors"
    for keys, words in {
        (kohya, diffusers): ("keys of several formats", "kohya", "diffusers", kohya, diffusers),
        (kohya, peft): ("keys of several formats", "kohya", "peft"),
        ("model.a.weight",): ("no known adapter format", "model.a.weight"),
        (peft,): ("adapter_config.json",),
        ("lora_unet_a.hada_w1_a",): ("LoHa",),
        (): ("no tensors",),
    }.items():
        save_file({key: torch.zeros(4, 4) for key in keys}, path)
        told = lorakit("merge", whole_sd, path, tmp_path / "out")
        told.refused(4, str(path), *words)


@pytest.mark.fault(39)
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "pytorch_lora_weights.bin", "lora.ckpt"])
def test_39_pickles_are_never_opened(here: Path, whole_llama: Path, name: str, canary: Callable[[Path], Path]) -> None:
    left = canary(here / "adapter" / name)
    (here / WEIGHTS).unlink()
    refuse(here / "adapter", whole_llama, name, "pickle", "never opened")
    refuse(here / "adapter" / name, whole_llama, "pickle", "never opened")
    renamed = here / "renamed.safetensors"
    (here / "adapter" / name).rename(renamed)
    refuse(renamed, whole_llama, "not a whole safetensors file")
    assert not left.exists()


def header(path: Path, entries: object, data: bytes = b"", length: int | None = None) -> None:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.mark.fault(40)
def test_40_hostile_header(here: Path, whole_llama: Path) -> None:
    path = here / WEIGHTS
    for length in (2**63, 2**64 - 1, 2**40, 100_000_001):
        header(path, {}, length=length)
        refuse(here / "adapter", whole_llama, "adapter_model.safetensors", "claims")

    def entry(begin: int, end: int, *shape: int) -> dict[str, object]:
        return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}

    names = [f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"]
    for first, second, told in (
        (entry(0, 512, 4, 32), entry(256, 768, 32, 4), "overlaps"),
        (entry(0, 512, 4, 32), entry(0, 512, 32, 4), "overlaps"),
        (entry(0, 512, 4, 32), entry(1024, 1536, 32, 4), "hole"),
        (entry(0, 512, 4, 2**61), entry(512, 1024, 32, 4), "does not take"),
        (entry(512, 0, 4, 32), entry(512, 1024, 32, 4), "does not take"),
        (entry(0, 2**62, 2**60), entry(512, 1024, 32, 4), "overlaps"),
        (entry(0, 0, 2**62, 0), entry(0, 512, 32, 4), "truncated or overlong"),
    ):
        header(path, dict(zip(names, (first, second), strict=True)), b"\0" * 1536)
        done = forked(*commands(here / "adapter", whole_llama)[1], megabytes=200, seconds=10)
        done.refused(4, str(here / "adapter"), told)
    header(path, b'{"a":' * 200_000)
    refuse(here / "adapter", whole_llama, "broken safetensors header")
    header(path, json.dumps({f"base_model.model.{i}.lora_A.weight": entry(0, 0, 0) for i in range(300_000)}).encode())
    refuse(here / "adapter", whole_llama)


@pytest.mark.fault(40)
def test_40_header_takes_less_than_a_second(here: Path, whole_llama: Path) -> None:
    """Checked against what the same command takes for a sound adapter, so that imports do not count."""
    header(here / WEIGHTS, {}, length=2**63)
    command = commands(here / "adapter", whole_llama)[1]
    lorakit(*command)
    begin = time.monotonic()
    lorakit(*command).refused(4, "claims")
    assert time.monotonic() - begin < 1


@pytest.mark.fault(41)
@pytest.mark.parametrize("rank", [0, -1, 3, 64, 10**12, 4.5, "four", None, True, float("nan")])
def test_41_rank(here: Path, whole_llama: Path, edit: Edit, rank: object) -> None:
    edit(here / "adapter/adapter_config.json", r=rank)
    refuse(here / "adapter", whole_llama)


@pytest.mark.fault(41)
@pytest.mark.parametrize("rank", [0, 40])
def test_41_rank_of_the_tensors(here: Path, whole_llama: Path, edit: Edit, rank: int) -> None:
    change(here, **{f"{LAYER}.lora_A.weight": torch.zeros(rank, 32), f"{LAYER}.lora_B.weight": torch.zeros(32, rank)})
    edit(here / "adapter/adapter_config.json", rank_pattern={"layers.0.self_attn.q_proj": rank})
    refuse(here / "adapter", whole_llama, "q_proj", f"rank {rank}")


@pytest.mark.fault(42)
def test_42_the_base_that_an_adapter_names_is_not_loaded(here: Path, whole_llama: Path, edit: Edit) -> None:
    """It may name a hub id, a pipe, a folder with code: merging and generating look at none of them."""
    os.mkfifo(here / "pipe")
    (here / "code").mkdir()
    (here / "code/x.py").write_text(f"open({str(here / 'left')!r}, 'w')")
    for name in ("owner/name", str(here / "pipe"), str(here / "code"), "/dev/zero", 3, None, ["a"]):
        edit(here / "adapter/adapter_config.json", base_model_name_or_path=name)
        for command in commands(here / "adapter", whole_llama)[:2]:
            told = forked(*command, seconds=20)
            assert told.code == 0, told.err
            (here / "answers.jsonl").unlink(missing_ok=True)
            if command[0] == "merge":
                for path in (here / "merged").iterdir():
                    path.unlink()
                (here / "merged").rmdir()
    assert not (here / "left").exists()
    edit(here / "adapter/adapter_config.json", base_model_name_or_path=str(whole_llama))
    told = lorakit("convert", here / "adapter", here / "converted.gguf", "--to", "gguf")
    told.refused(4, "the layers of the base")
    assert f"--base {whole_llama}" in told.err


SECTIONS = {
    "llama": "adapter={rank: 4, dora: true, alpha_pattern: {q_proj: 5}}",
    "sd": "adapter={rank: 4, rslora: true, text_encoder: true, targets: [to_q, to_v, q_proj], "
    "alpha_pattern: {to_v: 3, layers.1.*: 7}, rank_pattern: {q_proj: 2}}",
}


@pytest.mark.parametrize("family", ["llama", "sd"])
def test_a_checkpoint_is_the_adapter_of_its_step(family: str, request: pytest.FixtureRequest) -> None:
    """Its file alone, which lacks alpha, would pass for another one."""
    folder: Path = request.getfixturevalue(family)
    assert lorakit(f"train-{family}", folder / "recipe.yaml", "--set", SECTIONS[family]).code == 0
    (run,) = (folder / "runs").iterdir()
    *_, saved = sorted((run / "checkpoints").iterdir())
    there, here = (read_adapter(path) for path in (run, saved))
    assert here.family == there.family
    assert here.components.keys() == there.components.keys()
    for name, deltas in there.components.items():
        assert here.components[name].keys() == deltas.keys()
        for module, delta in deltas.items():
            other = here.components[name][module]
            assert other.scale == delta.scale
            for one, two in ((other.A, delta.A), (other.B, delta.B), (other.magnitude, delta.magnitude)):
                assert one is two is None or torch.equal(one, two)
    assert here.metadata["lorakit_base"] == there.metadata["lorakit_base"]
    assert lorakit("merge", folder / "base", saved, folder / "out").code == 0
    lorakit("inspect", saved / "adapter.safetensors").refused(4, "one file of a checkpoint", str(saved))
    (saved / "adapter.safetensors").write_bytes((saved / "adapter.safetensors").read_bytes()[:-1] + b"!")
    lorakit("inspect", saved).refused(9, "differs from its manifest")


HOSTILE = [
    {"peft_type": "LOHA"}, {"peft_type": None}, {"modules_to_save": ["lm_head"]},
    {"lora_alpha": "much"}, {"lora_alpha": 0}, {"r": -1}, {"lora_alpha": 10**400},
    {"rank_pattern": {"(": 4}}, {"rank_pattern": ["q_proj"]}, {"rank_pattern": {"q_proj": "x"}},
    {"target_modules": "("}, {"target_modules": {"a": 1}}, {"target_modules": 3},
    {"use_rslora": "maybe", "lora_alpha": float("inf")},
]  # fmt: skip


@pytest.mark.parametrize("table", HOSTILE, ids=lambda table: next(iter(table)))
def test_a_hostile_configuration(here: Path, whole_llama: Path, edit: Edit, table: dict[str, object]) -> None:
    edit(here / "adapter/adapter_config.json", **table)
    refuse(here / "adapter", whole_llama)


ENDLESS = "(.*)*(.*)*(.*)*(.*)*(.*)*!|([a-z._0-9]+)+!|(.|.)*!"


@pytest.mark.parametrize(
    "table", [{"rank_pattern": {ENDLESS: 4}}, {"alpha_pattern": {ENDLESS: 4}}, {"target_modules": ENDLESS}]
)
def test_an_expression_that_would_run_for_years(here: Path, whole_llama: Path, edit: Edit, table: object) -> None:
    edit(here / "adapter/adapter_config.json", **table)
    for command in commands(here / "adapter", whole_llama):
        told = forked(*command, megabytes=300, seconds=20)
        assert told.code in (0, 4), told.err
        assert told.code == 0 or told.refused(4, "takes too long")


def test_a_configuration_that_is_none(here: Path, whole_llama: Path) -> None:
    config = here / "adapter/adapter_config.json"
    for text in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"null"):
        config.write_bytes(text)
        refuse(here / "adapter", whole_llama, "adapter_config.json")
    config.unlink()
    os.mkfifo(config)
    refuse(here / "adapter", whole_llama)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_may_not_be_read(here: Path, name: str) -> None:
    assert lorakit("inspect", here / "adapter").code == 0
    path = here / "adapter" / name
    for folder in (here, *here.parents):  # pytest's own are its user's alone
        if folder.name.startswith(("pytest-", "popen-", here.name)):
            folder.chmod(0o755)
    path.chmod(0)
    told = forked("inspect", here / "adapter", nobody=True)
    path.chmod(0o755)
    told.refused(6 if name.endswith(".safetensors") else 4, str(here / "adapter"), "Permission denied")
