"""One line of progress now and then, readable in a log, a notebook and a terminal (no torch)."""

import os
import sys
import time
from pathlib import Path

LOG = "DERM_COMPRESS_LOG"  # the runner's name for the file that it shows lines of


def say(text: str) -> None:
    """Prints a line, and hands it to the runner if one listens; prints are for readers alone."""
    print(text, flush=True)
    if path := os.environ.get(LOG):
        with Path(path).open("a", encoding="utf-8") as log:
            log.write(text + "\n")


def mute() -> None:
    """For a process whose like beside it says the same."""
    os.environ.pop(LOG, None)
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  to the end of the process


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def track(iterable, what: str, total: int | None = None):
    """Yields the items and prints done, rate and time left: after ten seconds, then less often.

    A loop that ends before the first line is due prints nothing.
    """
    total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
    begun = last = time.monotonic()
    done, every, said = 0, 10.0, False
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - last >= every and done != total:
            say(f"{what}: {_line(done, total, now - begun)}")
            last, every, said = now, min(every * 1.5, 60.0), True
    if said:
        say(f"{what}: {done} in {clock(time.monotonic() - begun)}")


def _line(done: int, total: int | None, seconds: float) -> str:
    rate = done / seconds
    pace = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
    return (
        f"{done} of {total}, {pace}, {clock((total - done) / rate)} left"
        if total
        else f"{done}, {pace}"
    )
