"""The Stable Diffusion task on a tiny real base: the loss by hand, equal draws on any layout, held-out, caches."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open

from lorakit.data.arrange import held_out_ids
from lorakit.data.cache import TensorCache
from lorakit.data.pictures import Picture
from lorakit.errors import DataError, ModelError, RecipeError
from lorakit.families.place import Place
from lorakit.families.sd.base import noise_schedule
from lorakit.families.sd.batches import TIMESTEPS
from lorakit.families.sd.drawing import DrawSettings
from lorakit.families.sd.generate import open_painter
from lorakit.families.sd.prepare import TextStates
from lorakit.families.sd.task import Learning, SDTask, load
from lorakit.numerics.order import Draw, Layout
from lorakit.recipe.schema import PictureData, SDAdapter, SDBase, SDOptimizer, SDSample, SDTrain
from lorakit.storage.bases import resolve
from tests.tiny import tiny_sd

CPU = Place(torch.device("cpu"), torch.float32)
COUNT = 12


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: tiny_sd(root / kind, kind) for kind in ("epsilon", "v_prediction")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(COUNT):
        size = (40, 64, 3) if i % 3 == 0 else (64, 64, 3)
        Image.fromarray(random.integers(0, 255, size, np.uint8)).save(root / f"{i:02d}.png")
        (root / f"{i:02d}.txt").write_text(f"picture {i}, red, green, blue")
    return root


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("LORAKIT_CACHE", str(root))
    return root


@pytest.fixture
def make(bases: dict[str, Path], folder: Path) -> Callable[..., SDTask]:
    def build(
        kind: str = "epsilon", layout: Layout = Layout(3, 8), adapter: Any = None, place: Place = CPU, **options: Any
    ) -> SDTask:
        data = {"path": str(folder), "resolution": 64, "bucket_step": 8, "held_out": 0.25}
        data |= {k: options.pop(k) for k in list(options) if k in PictureData.model_fields}
        train = SDTrain(**{k: options.pop(k) for k in list(options) if k in SDTrain.model_fields})
        sample = SDSample(**options.pop("sample", {}))
        assert not options
        return load(
            SDBase(model=str(bases[kind])),
            SDAdapter(rank=2, alpha=4, **(adapter or {})),
            PictureData(**data),
            Learning.of(train, SDOptimizer()),
            sample,
            layout,
            place,
        )

    return build


def _text(group: Any) -> torch.Tensor:
    """A group's captions, encoded or not."""
    return next(iter(group.text.values()))


def first(task: SDTask, batches: int = 1) -> list[Any]:
    stream = task.batches("train", 0)
    return [next(stream) for _ in range(batches)]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_the_weighted_error_of_the_plain_unet(
    make: Callable[..., SDTask], bases: dict[str, Path], kind: str
) -> None:
    """Recompute it picture by picture with diffusers' own pieces; LoRA's B is 0 at the start, so the base is enough."""
    task = make(kind, min_snr_gamma=5.0)
    batch = first(task)[0]
    pipeline = StableDiffusionPipeline.from_pretrained(bases[kind])
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    total = 0.0
    for group in batch.groups:
        for noisy, t, target, text in zip(group.noisy, group.timesteps, group.target, _text(group), strict=True):
            with torch.no_grad():
                predicted = pipeline.unet(noisy[None], t, text[None]).sample[0]
            weight = snr[t].clamp(max=5) / (snr[t] if kind == "epsilon" else snr[t] + 1)
            total += float(weight) * float((predicted - target).double().square().mean())
    assert batch.count == 8
    assert len(batch.groups) == 2
    loss = task.loss(batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(total, rel=1e-4)


def test_noisy_latents_and_text_are_what_the_base_gives(
    make: Callable[..., SDTask], bases: dict[str, Path], folder: Path
) -> None:
    """From x_t and the target of v the latents come back; they are the VAE's, within its spread."""
    task = make("v_prediction", caption_dropout=0.0, held_out=0.0)
    pipeline = StableDiffusionPipeline.from_pretrained(bases["v_prediction"])
    alphas = DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod
    maker = task._loaded.maker
    square = task.examples.buckets.index((64, 64))
    same = [(i, e) for i, e in enumerate(task.examples.train) if e.bucket == square]
    for index, example in same[:4]:
        drawn = maker.draw(Draw(index, 77 + index))
        a = alphas[drawn.timestep]
        latents = a.sqrt() * drawn.noisy - (1 - a).sqrt() * drawn.target
        pixels = torch.from_numpy(np.asarray(Image.open(folder / example.id)).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            posterior = pipeline.vae.encode(pixels).latent_dist
        scale = pipeline.vae.config.scaling_factor
        away = (latents / scale - posterior.mean[0]) / posterior.std[0]
        assert away.shape == latents.shape
        assert float(away.mean()) == pytest.approx(0, abs=0.15)
        assert float(away.std()) == pytest.approx(1, abs=0.15)
        ids = pipeline.tokenizer(drawn.caption, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = pipeline.text_encoder(ids)[0]
        torch.testing.assert_close(maker.text([drawn.caption])["states"], expected, rtol=1e-4, atol=1e-5)


def test_every_layout_sees_the_same_draws_and_gives_the_same_gradient(make: Callable[..., SDTask]) -> None:
    layouts = {
        "1x8": [Layout(3, 8)],
        "2x4": [Layout(3, 8, 1, rank, 2) for rank in range(2)],
        "accumulation 8x1": [Layout(3, 8, 8)],
    }
    seen, gradients = {}, {}
    for name, ranks in layouts.items():
        rows, total, count = [], None, 0
        for layout in ranks:
            task = make(layout=layout, noise_offset=0.1, shuffle_tags=True)
            for parameter in (p for p in task.model.parameters() if p.requires_grad):
                with torch.no_grad():
                    parameter.add_(0.01 * torch.sin(torch.arange(parameter.numel()).reshape(parameter.shape)))
            for batch in first(task, layout.accumulation):
                task.loss(batch).backward()
                count += batch.count
                for group in batch.groups:
                    columns = zip(group.noisy, group.timesteps, group.target, _text(group), strict=True)
                    rows += [(int(t), n.sum().item(), g.sum().item(), x.sum().item()) for n, t, g, x in columns]
            flat = torch.cat([p.grad.flatten() for p in task.model.parameters() if p.requires_grad])
            total = flat if total is None else total + flat
        seen[name], gradients[name] = np.array(sorted(rows)), total / count
    for name in layouts:
        np.testing.assert_allclose(seen[name], seen["1x8"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(gradients[name], gradients["1x8"], rtol=1e-3, atol=1e-6)


def test_a_whole_trigger_stays_in_front_of_shuffled_tags(make: Callable[..., SDTask]) -> None:
    task = make(trigger="sks, style", shuffle_tags=True, keep_tags=1, caption_dropout=0.0)
    captions = [task._loaded.maker.draw(Draw(0, seed)).caption for seed in range(20)]
    first = task.examples.train[0].caption.split(", ")[2]
    assert {caption.rpartition(f"{first}, ")[0] for caption in captions} == {"sks, style, "}
    assert len(set(captions)) > 1


@pytest.mark.filterwarnings("default")  # dynamo's own
def test_compiled_blocks_give_the_same_loss_and_gradient(make: Callable[..., SDTask]) -> None:
    """With pictures of two sizes in a batch; what inductor makes of the graphs is PyTorch's own matter."""
    task = make()
    batch = first(task)[0]
    assert len(batch.groups) == 2
    found = []
    for _ in range(2):
        task.model.zero_grad()
        loss = task.loss(batch)
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in task.model.parameters() if p.requires_grad])))
        task.model.compile(backend="aot_eager")
    assert sum(m._compiled_call_impl is not None for m in task.model.modules()) == 4
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    (_, plain), (_, compiled) = found
    assert (compiled - plain).norm() <= 1e-5 * plain.norm()


def test_steps_differ_and_come_back(make: Callable[..., SDTask]) -> None:
    task = make()
    stream = task.batches("train", 0)
    noisy = [next(stream).groups[0].noisy.sum().item() for _ in range(4)]
    assert len(set(noisy)) == 4
    assert next(task.batches("train", 2)).groups[0].noisy.sum().item() == noisy[2]


def test_held_out_pictures_come_once_over_all_ranks(make: Callable[..., SDTask]) -> None:
    alone = list(make(layout=Layout(0, 5)).batches("held_out", 0))
    assert {name for batch in alone for name in batch.ids}.isdisjoint(
        e.id for e in make(layout=Layout(0, 5)).examples.train
    )
    assert sum(b.count for b in alone) == 3 * 8
    losses = {}
    for world in (1, 2, 3):
        total, count, numbers = 0.0, 0, []
        for rank in range(world):
            task = make(layout=Layout(0, 5 * world, 1, rank, world), noise_offset=0.5, min_snr_gamma=5.0)
            batches = list(task.batches("held_out", 0))
            numbers.append(len(batches))
            with torch.no_grad():
                total += sum(task.loss(b).item() for b in batches)
            count += sum(b.count for b in batches)
            assert all(task.loss(b).item() == 0 for b in batches if b.count == 0)
        assert len(set(numbers)) == 1
        assert count == 3 * 8
        losses[world] = total / count
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    assert losses[3] == pytest.approx(losses[1], rel=1e-5)


def test_a_held_out_picture_has_other_noise_at_each_timestep(make: Callable[..., SDTask]) -> None:
    task = make()
    maker, pictures = task._loaded.maker, task.examples.held_out
    noises = {maker.fixed(e, part, 1.0).target.numpy().tobytes() for e in pictures for part in range(TIMESTEPS)}
    assert len(noises) == TIMESTEPS * len(pictures)


def test_held_out_names_do_not_move_when_pictures_are_added() -> None:
    pictures = [Picture(f"{i}.png", "", lambda: b"") for i in range(200)]
    before, after = held_out_ids(pictures[:190], 0.1, 4), held_out_ids(pictures, 0.1, 4)
    assert (len(before), len(after)) == (19, 20)
    assert len(before & after) >= 15
    assert held_out_ids(pictures[:1], 0.5, 0) == set()
    assert held_out_ids(pictures, 0.0, 0) == set()


def test_a_second_run_computes_nothing_and_an_edit_is_noticed(
    make: Callable[..., SDTask], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "pictures"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    written: list[str] = []
    write = TensorCache.write

    def counting(self: TensorCache, key: str, tensors: Any) -> None:
        written.append(self.folder.name)
        write(self, key, tensors)

    monkeypatch.setattr(TensorCache, "write", counting)
    digest = make(path=str(copy)).fingerprint.digest
    assert (written.count("latents"), written.count("text")) == (COUNT, COUNT + 1)
    written.clear()
    assert make(path=str(copy)).fingerprint.digest == digest
    assert written == []
    (copy / "01.txt").write_text("another caption")
    edited = make(path=str(copy)).fingerprint.digest
    assert written == ["text"]
    Image.new("RGB", (64, 64), "red").save(copy / "02.png")
    again = make(path=str(copy)).fingerprint.digest
    assert written == ["text", "latents"]
    assert len({digest, edited, again}) == 3


def test_flip_repeats_and_the_random_crop(make: Callable[..., SDTask]) -> None:
    plain = make(held_out=0.0)
    more = make(held_out=0.0, flip=True, repeats=3)
    assert len(more.examples.train) == 6 * len(plain.examples.train)
    assert more.steps_per_epoch == 6 * COUNT / 8
    ours = more.examples.latents
    assert len({example.key for example in more.examples.train}) == 2 * COUNT
    assert {e.key for e in plain.examples.train} < {e.key for e in more.examples.train}
    assert ours.holds(more.examples.train[-1].key)
    square = make(held_out=0.0, buckets=False, crop="random")
    assert square.examples.buckets == ((64, 64),)
    other = make(held_out=0.0, buckets=False, crop="random", layout=Layout(4, 8))
    assert {e.key for e in square.examples.train}.isdisjoint(e.key for e in other.examples.train)


def test_captions_are_dropped_shuffled_and_triggered(make: Callable[..., SDTask]) -> None:
    task = make(caption_dropout=0.3, shuffle_tags=True, keep_tags=1, trigger="zwx", held_out=0.0)
    maker = task._loaded.maker
    captions = [maker.draw(Draw(0, seed)).caption for seed in range(400)]
    assert captions.count("") == pytest.approx(120, abs=30)
    kept = {c for c in captions if c}
    assert len(kept) == 6
    assert all(c.startswith("zwx, picture 0, ") for c in kept)


def test_text_encoder_lora_reads_token_ids_and_has_its_own_rate(make: Callable[..., SDTask]) -> None:
    task = make(adapter={"text_encoder": True})
    (unet, rate), (text, text_rate) = task.parameter_groups()
    assert (rate, text_rate) == (1e-4, 5e-5)
    assert len(text) == 2 * 4 * 2
    batch = first(task)[0]
    assert batch.groups[0].text["ids"].dtype == torch.int64
    frozen = make()
    difference = task.loss(batch).item() - frozen.loss(first(frozen)[0]).item()
    assert difference == pytest.approx(0, abs=1e-4)
    for parameter in text:
        with torch.no_grad():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    task.loss(batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in text)
    assert {k.split(".")[0] for k in task.adapter_state()} == {"unet", "text_encoder"}
    assert len(unet) + len(text) == len(task.adapter_state())


@pytest.mark.parametrize("text_encoder", [False, True])
def test_gradient_checkpointing_gives_the_same_gradient(make: Callable[..., SDTask], text_encoder: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        place = Place(torch.device("cpu"), torch.float32, checkpointing)
        task = make(place=place, adapter={"text_encoder": text_encoder})
        task.model.train()
        for parameter in (p for p in task.model.parameters() if p.requires_grad):
            with torch.no_grad():
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        task.loss(first(task)[0]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in task.model.parameters() if p.requires_grad]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_only_the_adapter_learns_and_learning_lowers_the_loss(make: Callable[..., SDTask]) -> None:
    task = make()
    before = {name: p.clone() for name, p in task.model.named_parameters() if not p.requires_grad}
    parameters = task.parameter_groups()[0][0]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    batch = first(task)[0]
    losses = []
    for _ in range(8):
        loss = task.loss(batch) / batch.count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in task.model.named_parameters() if n in before)


def test_state_goes_out_and_comes_back(make: Callable[..., SDTask]) -> None:
    task, other = make(), make(layout=Layout(9, 8))
    for parameter in task.parameter_groups()[0][0]:
        torch.nn.init.normal_(parameter)
    state = task.adapter_state()
    other.load_adapter_state(state)
    assert all(torch.equal(v, state[k]) for k, v in other.adapter_state().items())
    with pytest.raises(ModelError):
        other.load_adapter_state(dict(list(state.items())[1:]))
    with pytest.raises(ModelError):
        other.load_adapter_state(state | {"text_encoder.x.lora_A.weight": torch.zeros(1)})


@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_saved_adapter_draws_what_the_task_draws(
    make: Callable[..., SDTask], bases: dict[str, Path], tmp_path: Path, text_encoder: bool
) -> None:
    task = make(adapter={"text_encoder": text_encoder}, sample={"prompts": ["a red apple"], "steps": 3})
    for group, _ in task.parameter_groups():
        for parameter in group:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    task.save(tmp_path, "mine")
    task.sample(tmp_path)
    expected = np.asarray(Image.open(tmp_path / "000.png")).astype(int)
    components = {"unet", "text_encoder"} if text_encoder else {"unet"}
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == components
    location = resolve(str(bases["epsilon"]))
    for path in (tmp_path / "adapter", tmp_path / "mine.safetensors"):
        painter = open_painter(location, [(path, 1.0)], torch.device("cpu"), torch.float32)
        [(picture, _)] = painter.draw(["a red apple"], DrawSettings(steps=3))
        assert np.abs(np.asarray(picture) - expected).max() <= 1
    [(plain, _)] = open_painter(location, [], torch.device("cpu"), torch.float32).draw(
        ["a red apple"], DrawSettings(steps=3)
    )
    assert np.abs(np.asarray(plain) - expected).max() > 1


@pytest.mark.parametrize(("kind", "told"), [("epsilon", "epsilon"), ("v_prediction", "v")])
def test_the_kohya_file_says_what_its_base_predicts(
    make: Callable[..., SDTask], tmp_path: Path, kind: str, told: str
) -> None:
    make(kind).save(tmp_path, "mine")
    with safe_open(tmp_path / "mine.safetensors", "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == told


def test_a_base_without_its_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    base = tiny_sd(tmp_path / "base")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (base / "tokenizer" / name).unlink(missing_ok=True)
    learning = Learning.of(SDTrain(), SDOptimizer())
    data = PictureData(path=str(folder), resolution=64, bucket_step=8)
    with pytest.raises(ModelError, match=r"no vocab\.json"):
        load(SDBase(model=str(base)), SDAdapter(rank=2), data, learning, SDSample(), Layout(0, 4), CPU)


def test_samples_are_the_same_each_time_and_leave_no_trace(make: Callable[..., SDTask], tmp_path: Path) -> None:
    task = make(sample={"prompts": ["a red apple", "../../a cat"], "steps": 3, "seed": 5})
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        task.model.train()
        task.sample(tmp_path / name)
        assert task.model.unet.training
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["000.png", "001.png", "grid.png"]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in files)
    settings = json.loads(Image.open(tmp_path / "a" / "001.png").text["lorakit"])
    assert settings["prompt"] == "../../a cat"
    make().sample(tmp_path)
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"bucket_step": 6}, "data.bucket_step"),
        ({"buckets": False, "resolution": 63}, "data.resolution"),
        ({"resolution": 32, "bucket_step": 64}, "data.resolution"),
        ({"sample": {"prompts": ["x"], "width": 30}}, "sample.width"),
        ({"adapter": {"targets": ["to_q"], "text_encoder": True}}, "adapter.text_encoder"),
        ({"adapter": {"targets": ["q_proj"], "text_encoder": True}}, "adapter.targets"),
        ({"adapter": {"targets": []}}, "adapter.targets"),
    ],
)
def test_settings_that_do_not_fit_the_base(make: Callable[..., SDTask], options: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make(**options)
    assert caught.value.where == field


def test_bad_pictures_stop_or_are_listed(
    make: Callable[..., SDTask], folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "03.png").write_bytes((folder / "03.png").read_bytes()[:500])
    with pytest.raises(DataError, match="damaged or cut off") as caught:
        make(path=str(tmp_path))
    assert caught.value.where == "03.png"
    with caplog.at_level(logging.WARNING, "lorakit"):
        task = make(path=str(tmp_path), on_bad="skip", held_out=0.0)
    assert len(task.examples.train) == COUNT - 1
    assert "1 pictures left out: 03.png" in caplog.text


def test_equal_pictures_on_both_sides_are_told(
    make: Callable[..., SDTask], folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.png").write_bytes((folder / "00.png").read_bytes())
        (tmp_path / f"{name}.txt").write_text("red")
    with caplog.at_level(logging.WARNING, "lorakit"):
        make(path=str(tmp_path))
    assert "1 held-out pictures are trained on under other names" in caplog.text


def test_captions_that_are_cut_are_counted(
    make: Callable[..., SDTask], folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    length = make().parts.conditioning.tokenizers[0].model_max_length
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        (tmp_path / path.name).write_bytes(path.read_bytes())
        words = length - 2 + min(number, 3)  # beside the marks of beginning and end
        (tmp_path / path.with_suffix(".txt").name).write_text(" ".join("a" * words))
    with caplog.at_level(logging.WARNING, "lorakit"):
        task = make(path=str(tmp_path))
    ids = task.parts.conditioning.tokenizers[0]("a " * (length - 2))["input_ids"]
    assert len(ids) == length  # so that a word is a token
    cut = len(list(folder.glob("*.png"))) - 1
    assert f"{cut} captions are longer than {length - 2} tokens" in caplog.text


def test_zero_terminal_snr_with_epsilon_is_refused(tmp_path: Path, folder: Path) -> None:
    for kind, refused in (("epsilon", True), ("v_prediction", False)):
        base = tiny_sd(tmp_path / kind, kind)
        path = base / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}))
        arguments = (
            SDBase(model=str(base)),
            SDAdapter(rank=2),
            PictureData(path=str(folder), resolution=64, bucket_step=8),
            Learning.of(SDTrain(), SDOptimizer()),
            SDSample(),
            Layout(0, 4),
            CPU,
        )
        if refused:
            with pytest.raises(ModelError, match="zero terminal SNR"):
                load(*arguments)
        else:
            task = load(*arguments)
            assert torch.isfinite(task.loss(first(task)[0]))


def test_zero_terminal_snr_is_told_where_a_scheduler_writes_2_to_the_minus_24() -> None:
    def schedule(last: float) -> torch.Tensor:
        return noise_schedule({"num_train_timesteps": 1, "trained_betas": [1 - last]}, "base")[0]

    with pytest.raises(ModelError, match="zero terminal SNR"):
        schedule(2**-24)
    assert schedule(2**-23).tolist() == [2**-23]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, set()),
        ({"adapter": {"text_encoder": True}}, {"text_encoder"}),
        ({"shuffle_tags": True}, {"text_encoder"}),
        ({"sample": {"prompts": ["a cat"]}}, {"vae", "text_encoder"}),
    ],
)
def test_what_no_step_needs_gives_its_memory_back(
    make: Callable[..., SDTask], options: dict[str, Any], kept: set[str]
) -> None:
    task = make(**options)
    modules = {"vae": task.parts.vae, **task.parts.conditioning.encoders}
    assert {name for name, module in modules.items() if not next(module.parameters()).is_meta} == kept
    assert torch.isfinite(task.loss(first(task)[0]))


def test_cached_text_states_are_the_encoders(make: Callable[..., SDTask]) -> None:
    task = make(sample={"prompts": ["a cat"]})
    captions = ["a red apple", "", "a red apple"]
    cached, fresh = TextStates(task.parts, cached=True), TextStates(task.parts, cached=False)
    cached.fill(captions)
    torch.testing.assert_close(cached.states(captions), fresh.states(captions), rtol=1e-5, atol=1e-6)
