"""The law of signals: the first waits for the step's end, the second does not, and afterwards nothing is left behind."""

from __future__ import annotations

import signal
import threading

import pytest

from qlora.errors import Stopped
from qlora.training.stopping import stoppable

KINDS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("kind", KINDS)
def test_first_signal_waits_and_second_stops(kind: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(kind)
    steps = []

    def run() -> None:
        with stoppable("qlora resume runs/a") as signals:
            signals.wait = True
            signal.raise_signal(kind)
            assert signals.arrived == kind
            steps.append("the step went on")
            signal.raise_signal(kind)
            steps.append("never")

    with pytest.raises(Stopped, match=rf"{kind.name} stopped the run; .* Go on with: qlora resume runs/a$") as stopped:
        run()
    assert steps == ["the step went on"]
    assert stopped.value.exit_status == 128 + kind
    assert "once more" in capsys.readouterr().err
    assert signal.getsignal(kind) == before


@pytest.mark.parametrize("kind", KINDS)
def test_between_steps_the_first_signal_stops(kind: signal.Signals) -> None:
    before = signal.getsignal(kind)
    with pytest.raises(Stopped, match=kind.name), stoppable("qlora resume runs/a"):
        signal.raise_signal(kind)
    assert signal.getsignal(kind) == before


def test_signals_outside_of_the_main_thread_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def body() -> None:
        with stoppable("…"):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before]
