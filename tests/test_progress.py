"""The progress reporter with a clock of our own, on a terminal and elsewhere."""

import io

import pytest

from pyinfer.progress import Progress, format_amount, format_seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self):
        """What a person sees: carriage returns overwrite."""
        lines = []
        for text in self.getvalue().split("\n"):
            line = ""
            for part in text.split("\r"):
                line = part + line[len(part) :]
            lines.append(line.rstrip())
        return lines


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run(stream, steps, unit="bytes"):
    """Report (seconds since the start, done, total) one by one."""
    clock = Clock()
    progress = Progress(stream, "loading", unit, clock=clock)
    for seconds, done, total in steps:
        clock.now = 100.0 + seconds
        progress(done, total)
    return progress


def test_a_bar_with_amount_rate_and_time_left():
    terminal = Terminal()
    run(terminal, [(0, 0, 4 << 20), (1, 1 << 20, 4 << 20)])
    bar = "[####...............]"  # what 79 columns have left
    assert terminal.screen() == [f"loading  {bar}   25 %  1.0 MiB of 4.0 MiB  1.0 MiB/s  0:03 left"]


def test_no_bar_where_there_is_no_room():
    terminal = Terminal()
    run(terminal, [(0, 0, 100_000), (2, 50_000, 100_000)], "very long words for things")
    assert terminal.screen()[0].startswith(
        "loading   50 %  50000 of 100000 very long words for things  25000"
    )
    assert len(terminal.screen()[0]) == 79


def test_tokens():
    terminal = Terminal()
    run(terminal, [(0, 0, 1000), (2, 500, 1000)], "tokens")
    assert "]   50 %  500 of 1000 tokens  250 tokens/s  0:02 left" in terminal.screen()[0]


def test_a_resumed_work_is_rated_by_what_was_done_now():
    stream = io.StringIO()
    run(stream, [(0, 90, 100), (10, 95, 100)], "files")
    assert stream.getvalue() == "loading   95 %  95 of 100 files  0 files/s  0:10 left\n"


def test_the_line_is_erased_at_the_end():
    terminal = Terminal()
    with run(terminal, [(0, 0, 100), (1, 10, 100), (2, 100, 100)]):
        pass
    assert terminal.screen() == [""]


def test_a_shorter_line_leaves_nothing_of_a_longer_one():
    terminal = Terminal()
    run(terminal, [(0, 0, 0), (1, 123456789, 0), (2, 1, 0)], "tokens")
    assert terminal.screen() == ["loading  1 tokens  0 tokens/s"]


def test_quick_work_shows_nothing_on_a_terminal():
    terminal = Terminal()
    with run(terminal, [(0, 0, 10), (0.1, 5, 10), (0.2, 10, 10)]):
        pass
    assert terminal.getvalue() == ""


def test_it_is_redrawn_at_most_ten_times_a_second():
    terminal = Terminal()
    run(terminal, [(n / 1000, n, 1000) for n in range(1001)])
    assert 5 <= terminal.getvalue().count("\r") <= 8


def test_elsewhere_a_line_now_and_then():
    stream = io.StringIO()
    with run(stream, [(n / 10, n, 200) for n in range(200)]):
        pass
    lines = stream.getvalue().splitlines()
    assert [line.split("%")[0] for line in lines] == [
        "loading   10 ",
        "loading   35 ",
        "loading   60 ",
        "loading   85 ",
    ]
    assert "\r" not in stream.getvalue()


def test_elsewhere_short_work_shows_nothing():
    stream = io.StringIO()
    with run(stream, [(0, 0, 10), (1, 5, 10), (1.9, 10, 10)]):
        pass
    assert stream.getvalue() == ""


def test_an_unknown_total():
    stream = io.StringIO()
    run(stream, [(0, 0, 0), (2, 2048, 0)])
    assert stream.getvalue() == "loading  2.0 KiB  1.0 KiB/s\n"


def test_it_can_be_used_again():
    terminal = Terminal()
    progress = run(terminal, [(0, 0, 10), (1, 5, 10)])
    progress.close()
    progress(0, 10)
    assert terminal.screen() == [""]


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1.5 * 2**20, "1.5 MiB"),
        (3 * 2**30, "3.0 GiB"),
        (2**51, "2048.0 TiB"),
    ],
)
def test_amounts(amount, text):
    assert format_amount(amount, "bytes") == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")]
)
def test_times(seconds, text):
    assert format_seconds(seconds) == text
