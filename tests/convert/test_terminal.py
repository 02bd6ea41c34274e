"""What the commands of pyinfer-convert share: exit codes, and signals that wait for a good moment."""

from __future__ import annotations

import contextlib
import signal
import threading

import pytest

from pyinfer.errors import InputError
from pyinfer_convert.terminal import Signals, exit_code, handled, note


@pytest.fixture(autouse=True)
def usual_handlers():
    """SIGINT and SIGTERM end the process, whatever started the tests; restored afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in before:
        assert signal.getsignal(number) == signal.SIG_DFL
        signal.signal(number, before[number])


def raising(error: BaseException):
    def work(signals: Signals) -> None:
        raise error

    return work


def test_work_that_is_done_is_0(capsys):
    assert exit_code(lambda signals: note("fine"), "nothing", verbose=False) == 0
    assert capsys.readouterr() == ("", "fine\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [(InputError("this is bad"), "this is bad"), (OSError("disk"), "disk"), (MemoryError(), "MemoryError")],
)
def test_errors_of_the_input_are_1_and_a_sentence(capsys, error, said):
    assert exit_code(raising(error), "nothing", verbose=False) == 1
    assert capsys.readouterr() == ("", f"error: {said}\n")
    assert exit_code(raising(error), "nothing", verbose=True) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith(f"error: {said}\n")


def test_faults_of_the_program_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        exit_code(raising(ZeroDivisionError()), "nothing", verbose=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_its_number(capsys, number):
    def work(signals: Signals) -> None:
        signal.raise_signal(number)
        note("not reached")

    assert exit_code(work, "half is there", verbose=True) == 128 + number
    assert capsys.readouterr() == ("", "\ninterrupted; half is there\n")


def test_an_error_behind_a_signal_is_the_signal(capsys):
    """Writing to a terminal that is gone fails, too."""

    def work(signals: Signals) -> None:
        with signals.held():
            signal.raise_signal(signal.SIGTERM)
            raise OSError("no terminal")

    assert exit_code(work, "", verbose=False) == 128 + signal.SIGTERM
    assert capsys.readouterr() == ("", "")


def test_while_held_the_first_signal_waits_for_a_check():
    signals, seen = Signals(), []
    progress = signals.checked(lambda done, total: seen.append((done, total)))
    with handled(signals):
        with signals.held():
            progress(1, 3)
            signal.raise_signal(signal.SIGTERM)
            seen.append("goes on")
            with pytest.raises(KeyboardInterrupt):
                progress(2, 3)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)  # the second one does not wait
        assert not signals.holding
    assert seen == [(1, 3), "goes on"] and signals.received == signal.SIGINT


def test_holding_ends_with_an_error():
    signals = Signals()
    with contextlib.suppress(InputError), signals.held():
        raise InputError("bad")
    assert not signals.holding


def test_other_threads_have_no_handlers():
    codes = []
    work = threading.Thread(target=lambda: codes.append(exit_code(lambda signals: None, "", verbose=False)))
    work.start()
    work.join()
    assert codes == [0]
