"""A bound on what somebody else's program may take while it runs in this process."""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path

SECONDS, MORE = 5.0, 2**30  # of computing; bytes of memory on top of what is in use


@contextlib.contextmanager
def bounded():
    """Ends what takes longer by TimeoutError, what takes more by MemoryError.

    For the main thread on Linux; elsewhere it bounds nothing.
    """
    used = Path("/proc/self/statm")
    if not used.exists() or threading.current_thread() is not threading.main_thread():
        yield
        return
    import resource  # there is none on Windows

    pages = int(used.read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + MORE
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    handler = signal.signal(signal.SIGVTALRM, _stop)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        yield
    except MemoryError as error:
        raise MemoryError(f"it takes more than {MORE >> 20} MiB of memory") from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _stop(*_) -> None:
    raise TimeoutError(f"it takes more than {SECONDS:g} s")
