"""The one exception whose text is meant for the person at the keyboard."""

LONGEST = 1000  # characters of a line that people read


class DermError(Exception):
    """Says in a line what is wrong, where, and what to do; the command line exits with 2.

    What it repeats of files and models is shown without control characters.
    """

    def __init__(self, text: str):
        line = "".join(char if char.isprintable() else " " for char in str(text))
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…")

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


def first_line(error: Exception) -> str:
    """What an error says first, cut to a line; its kind where it says nothing."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else f"{line[:200]} …"
