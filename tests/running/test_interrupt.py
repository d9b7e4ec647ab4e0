"""Ctrl-C: noted once, an echo of it ignored, a second one obeyed; afterwards the signals are as they were."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from splitllm.running.interrupt import SAME_SECONDS, StopSignal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_its_echo_ignored(number: signal.Signals) -> None:
    with StopSignal() as stop:
        assert not stop.asked
        signal.raise_signal(number)
        assert stop.asked
        signal.raise_signal(signal.SIGINT)
        assert stop.asked


def test_a_later_one_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with StopSignal():
        signal.raise_signal(signal.SIGINT)
        now += SAME_SECONDS + 0.1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignal():
        assert signal.getsignal(signal.SIGINT) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_another_thread_it_takes_no_signals() -> None:
    seen = []

    def work() -> None:
        with StopSignal() as stop:
            seen.append((stop.asked, signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
