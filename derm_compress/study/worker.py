"""One notebook in a process of its own: papermill executes it."""

import contextlib
import json
import os
import sys
import threading

QUIET = "rfc3987_syntax"  # jsonschema compiles this grammar for two seconds; no notebook needs it


def main(request: dict) -> int:
    """Executes request["notebook"]; the exit code: 1 where a cell or the kernel failed."""
    printed = os.fdopen(os.dup(1), "w", buffering=1)
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # the kernel writes there once more what comes back as its output
        os.dup2(silence, stream)
    sys.modules[QUIET] = None
    from papermill.exceptions import PapermillExecutionError
    from papermill.execute import execute_notebook

    try:
        execute_notebook(
            request["notebook"],
            request["output"],
            request["parameters"],
            kernel_name="python3",
            language="python",
            cwd=request["cwd"],
            progress_bar=False,
            shutdown_kernel="immediate",
        )
    except PapermillExecutionError:
        return 1  # the notebook has the cell's error
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0], file=printed)
        return 1
    return 0


def end_with_runner() -> None:
    """Ends the kernel, all that it has started and this process once the runner is no more."""
    import psutil

    os.read(0, 1)  # nothing comes but the end; sys.stdin would be locked at exit
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_runner, daemon=True).start()
    sys.exit(main(json.loads(sys.argv[1])))
