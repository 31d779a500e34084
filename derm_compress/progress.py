"""One line of progress now and then, readable in a log, a notebook and a terminal (no torch)."""

import time


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def track(iterable, what: str, total: int | None = None, *, every: float = 10.0):
    """Yields the items and prints done, rate and time left: after `every` seconds, then less often.

    A loop that ends before the first line is due prints nothing.
    """
    total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
    begun = last = time.monotonic()
    done, said = 0, False
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - last >= every and done != total:
            print(f"{what}: {_line(done, total, now - begun)}", flush=True)
            last, every, said = now, min(every * 1.5, 60.0), True
    if said:
        print(f"{what}: {done} in {clock(time.monotonic() - begun)}", flush=True)


def _line(done: int, total: int | None, seconds: float) -> str:
    rate = done / seconds
    pace = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
    return (
        f"{done} of {total}, {pace}, {clock((total - done) / rate)} left"
        if total
        else f"{done}, {pace}"
    )
