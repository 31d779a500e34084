"""Models: their anatomy, loading, recipes and variants, prompts, memory planned and measured."""

from derm_compress.faces import face

FACE = {
    "anatomy": ["blocks", "decoder", "fingerprint"],
    "devices": ["let_go"],
    "generation": ["say"],
    "loading": ["load_base", "with_values"],
    "processors": ["check_picture_size"],
    "prompts": ["calibration_batches", "encode"],
    "recipe": ["Recipe", "read_recipe"],
    "removal": ["without"],
    "units": ["Unit"],
    "variants": [
        "ORIGINAL",
        "healed",
        "mended",
        "named",
        "paper_depth",
        "pruned",
        "read_choice",
        "read_variants",
        "recipe_of",
        "roles",
        "to_heal",
        "to_quantize",
    ],
}
__getattr__, __all__ = face(__name__, FACE)
