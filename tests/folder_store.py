"""A store for tests of what reads one: in a module of its own, as other processes import it."""


class FolderStore:
    """Resolves every reference below one folder, as study's Store does for finished stages."""

    KEY = f"00_stage/{64 * '0'}"

    def __init__(self, root):
        self.root = root

    def ref(self, name):
        """A reference that recipes take: stage/key/name."""
        return f"{self.KEY}/{name}"

    def resolve(self, ref):
        return self.root / ref.removeprefix(f"{self.KEY}/")
