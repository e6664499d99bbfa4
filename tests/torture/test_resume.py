"""The short form of ``make torture``: real runs of the command line, really killed, beside runs never stopped."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.torture import runs, trace
from tests.torture.cases import STOPS
from tests.torture.killing import Bench, Tally
from tests.torture.merging import MergeBench
from tests.torture.warm import Pair, Warm

traced = pytest.mark.skipif(not trace.supported(), reason="no tracing here: it takes Linux on x86-64")


def check(tally: Tally, kills: int = 1) -> None:
    assert tally.told == []
    assert (tally.resumed, tally.divergent, tally.lost) == (tally.kills, 0, 0)
    assert tally.kills >= kills


@pytest.mark.parametrize("seed", [2, 4, 12])
@pytest.mark.fault(43)
def test_random_kills_of_a_llama(llama: Bench, seed: int) -> None:
    """Seeds whose first kill falls into a run's first third: on a busy machine the straight run is timed too long."""
    check(llama.random_kills(seed))


@pytest.mark.fault(43)
def test_random_kills_of_a_stable_diffusion(sd: Bench) -> None:
    check(sd.random_kills(2))


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.fault(43, 44)
def test_a_run_stopped_at_a_chosen_moment_goes_on_bit_for_bit(llama: Bench, stop: str) -> None:
    check(llama.stopped(stop, *STOPS[stop]))


def test_the_state_of_lora_is_really_in_8_bit(llama: Bench, sd: Bench) -> None:
    for bench in (llama, sd):
        path = bench.reference.straight / f"checkpoints/step-{runs.STEPS:06d}/optimizer.safetensors"
        moments = [v for k, v in load_file(path).items() if k.split(".")[1] in ("state1", "state2")]
        assert len(moments) == 2 * (1 if bench is llama else 2)  # of each rate
        assert {str(moment.dtype) for moment in moments} == {"torch.uint8"}


@pytest.mark.fault(51)
def test_two_ranks_one_killed_in_mid_accumulation(folder: Path, warm: Warm) -> None:
    bench = Bench("llama", folder, Pair(warm), "-2")
    check(bench.stopped("ranks", *STOPS["killed in mid-accumulation"]))


@traced
@pytest.mark.fault(43)
def test_killed_at_operations_of_a_save(llama: Bench) -> None:
    """Every tenth operation of the second save, which also removes an older checkpoint."""
    touched = [number for number, (_, path, _) in enumerate(llama.operations()) if "step-000004" in path]
    assert len(touched) > 20
    for number in touched[::10]:
        check(llama.kill_at(number, torn=True))


@traced
@pytest.mark.fault(46, 58)
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_a_disk_that_breaks_or_is_full_in_a_save(llama: Bench, error: str) -> None:
    """The kernel's own answer to an operation of the second save; torture tries them all."""
    touched = [number for number, (_, path, _) in enumerate(llama.operations()) if "step-000004" in path]
    assert len(touched) > 20
    for number in touched[3::16]:
        check(llama.fail_at(number, error))


@traced
@pytest.mark.fault(44, 45)
def test_a_second_signal_in_a_save(llama: Bench) -> None:
    touched = [number for number, (_, path, _) in enumerate(llama.operations()) if "step-000004" in path]
    check(llama.stop_twice(touched[len(touched) // 2]))


@traced
@pytest.mark.fault(59)
@pytest.mark.parametrize("over", [False, True])
def test_a_merge_killed_leaves_the_old_model_or_the_new_one(llama: Bench, over: bool) -> None:
    merging = MergeBench(llama, over=over)
    operations = merging.operations()
    assert len(operations) > 15
    assert trace.unsynced(operations, "out") == []
    for number in range(over, len(operations), 11):
        check(merging.kill_at(number, torn=number % 2 == 0))


@traced
@pytest.mark.fault(59)
@pytest.mark.parametrize("over", [False, True])
def test_a_merge_into_a_single_file(sd: Bench, over: bool) -> None:
    merging = MergeBench(sd, over=over, out="out.safetensors")
    operations = merging.operations()
    assert len(operations) > 15
    assert trace.unsynced(operations, "out.safetensors") == []
    for number in range(over, len(operations), 9):
        check(merging.kill_at(number, torn=number % 2 == 0))
        check(merging.fail_at(number, "EIO"))


@traced
def test_all_is_flushed_before_it_is_renamed(llama: Bench, sd: Bench) -> None:
    for bench in (llama, sd):
        operations = bench.operations()
        assert trace.unsynced(operations, "run") == []
        assert len([1 for call, _, to in operations if call == "rename" and "checkpoints/step-" in to]) == 4


@traced
def test_the_harness_sees_a_missing_flush(folder: Path, warm: Warm) -> None:
    bench = Bench("llama", folder, warm, "-fsync", without="fsync")
    faults = trace.unsynced(bench.operations(), "run")
    told = [line for line in faults if "checkpoints/step-000002" in line]
    assert any("optimizer.safetensors was not flushed before its rename" in line for line in told), faults
    assert any("renamed and its folder" in line for line in told), faults


def test_the_harness_sees_a_resume_that_is_not_exact(folder: Path, warm: Warm) -> None:
    """Runs that are never stopped are alike without the seeds of each step too; the resumed one differs."""
    tally = Bench("llama", folder, warm, "-rng", without="rng").bitten()
    assert tally.told == []
    assert tally.resumed == 1
