"""What a run says where there is no terminal: plain lines, the last step among them."""

import logging
import os
import pty
import sys

import pytest

from lorakit.commands.progress import Terminal, warnings_to


def test_plain_lines_with_step_loss_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal() as terminal:
        terminal.start(total=3, done=1)
        terminal.held_out(1, 2.5, {"perplexity": 12.18})
        for step in (2, 3):
            terminal.step(step, 1.0)
    told = capsys.readouterr().err
    assert "held-out loss after 1 steps: 2.5000  perplexity 12.18" in told
    assert "step 3/3  loss 1.0000" in told
    assert "0.0 min left" in told
    assert terminal.trained


def test_a_line_is_one_however_long_and_said_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/pictures/[red]/" + 100 * "long "
    with Terminal() as terminal:
        terminal.stage(f"loading {path}")
    assert capsys.readouterr().err == f"loading {path}\n"


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(quiet=True) as terminal, warnings_to(terminal.console):
        terminal.start(total=1, done=0)
        terminal.step(1, 1.0)
        logging.getLogger("lorakit").warning("once")
    assert capsys.readouterr().err == ""


def test_warnings_are_told_while_a_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal() as terminal, warnings_to(terminal.console):
        logging.getLogger("lorakit").warning("3 rows were cut")
    assert "lorakit: warning: 3 rows were cut" in capsys.readouterr().err


def test_a_quiet_one_leaves_stderr_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that shows no bar must still be able to say that another is lost."""
    keeper, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setenv("TERM", "xterm")
        with Terminal(quiet=True) as quiet:
            quiet.start(3, 0)
            print("a rank is lost", file=sys.stderr, flush=True)
            assert b"a rank is lost" in os.read(keeper, 4096)
    os.close(keeper)
