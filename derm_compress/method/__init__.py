"""What changes a model (pruning, fine-tuning, quantization), and what is measured to decide how."""

from derm_compress.faces import face

FACE = {
    "activation_analysis": ["activation_statistics", "activation_surface"],
    "activations": ["block_errors", "projection_output", "projection_statistics", "tap"],
    "iterate": ["each_model"],
    "quantization.budgets": ["equal_bytes"],
    "quantization.forms": ["Form"],
    "quantization.grids": ["IntegerGrid", "NF4Grid"],
    "quantization.inputs": ["InputStatistics", "input_statistics"],
    "quantization.methods": ["METHODS", "quantizers"],
    "quantization.per_variant": ["quantization_errors", "scaled_channels", "search_scales"],
    "quantization.quantize": ["quantize"],
    "quantization.scaling": ["ALPHAS", "activation_scale", "search_scale"],
    "quantization.search": ["search_one"],
    "quantization.wanted": ["quantized_variants", "wanted_forms"],
}
__getattr__, __all__ = face(__name__, FACE)
