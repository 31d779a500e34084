"""Models: their anatomy, loading, recipes and variants, prompts, memory planned and measured."""

from derm_compress.faces import face

FACE = {
    "anatomy": ["blocks", "decoder", "fingerprint", "has_values", "linears"],
    "devices": ["let_go"],
    "generation": ["generate"],
    "loading": ["check_model", "load_base", "with_values"],
    "memory": ["plan_variants"],
    "processors": ["check_picture_size"],
    "prompts": ["calibration_batches", "encode", "prepare", "prompt"],
    "recipe": ["Recipe", "read_recipe"],
    "removal": ["without"],
    "shapes": ["Architecture", "architecture", "llava_7b"],
    "units": ["Unit"],
    "variants": [
        "HEALED",
        "ORIGINAL",
        "healed",
        "named",
        "paper_depth",
        "pruned",
        "read_choice",
        "read_variants",
        "roles",
        "to_heal",
    ],
}
__getattr__, __all__ = face(__name__, FACE)
