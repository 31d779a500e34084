"""The one exception whose text is meant for the person at the keyboard."""


class DermError(Exception):
    """Says in a line what is wrong, where, and what to do; the command line exits with 2."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


def first_line(error: Exception) -> str:
    """What an error says first, cut to a line; its kind where it says nothing."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else f"{line[:200]} …"
