"""Transformers' classes, imported without the packages that it would load on sight: two seconds."""

import contextlib
import sys

UNUSED = ("hqq", "scipy", "sklearn")  # its own quantizer, losses and drafts; none is asked for here


@contextlib.contextmanager
def hidden(*names: str):
    """These packages look uninstalled inside the block, if nothing has asked for them before."""
    absent = [name for name in names if name not in sys.modules]
    if "transformers" in sys.modules:  # which has made up its mind
        absent = []
    sys.modules.update(dict.fromkeys(absent))
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)


def undocumented(made=None, **_):
    """What stands for auto_docstring under `python -OO`, where no docstring is left to complete."""
    return undocumented if made is None else made


if sys.flags.optimize > 1:
    with hidden(*UNUSED):
        from transformers import utils

    utils.auto_docstring = undocumented

with hidden(*UNUSED):
    from transformers import (  # noqa: F401  others import them from here
        AutoConfig,
        AutoProcessor,
        BitsAndBytesConfig,
        GenerationConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.utils import logging  # noqa: F401
