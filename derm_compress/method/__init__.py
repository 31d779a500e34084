"""What changes a model (pruning, fine-tuning, quantization), and what is measured to decide how."""

from derm_compress.faces import face

FACE = {
    "activation_analysis": ["activation_inputs", "activation_statistics", "activation_surface"],
    "activations": ["projection_output", "projections", "tap"],
    "allocation.candidates": [
        "allocated_variants",
        "allocations",
        "decided",
        "held_bytes",
        "to_answer",
    ],
    "allocation.costs": ["bit_costs", "linear_costs"],
    "allocation.divergence": ["divergence", "divergences"],
    "allocation.programme": ["best_bits"],
    "allocation.sizes": ["linear_bytes", "own_budgets"],
    "allocation.ways": ["Problem", "drop_depths", "problem_of"],
    "assemble": ["materialize"],
    "finetune.jobs": ["Job", "fine_tune_all", "fine_tune_jobs", "loss_curves", "training_costs"],
    "finetune.train": ["TARGETS", "Training", "attach", "one_step", "training_batch"],
    "importance.calibration": ["Calibration"],
    "importance.embedder": ["Embedder"],
    "importance.measure": [
        "importance_draws",
        "importance_scores",
        "importance_values",
        "measure_importance",
        "protected_blocks",
    ],
    "importance.plans": ["control_plan", "pruning_plans"],
    "importance.rankings": ["criteria_used"],
    "importance.scoring": ["answer_loss", "output_similarity"],
    "pruning.controls": ["removal_controls"],
    "pruning.depths": ["choose_operating_point", "plan_depths"],
    "pruning.plan": ["read_control", "read_plans"],
    "pruning.replace_me": ["fit_maps", "nearest"],
    "quantization.grids": ["IntegerGrid"],
    "quantization.nf4": ["NF4Grid"],
    "quantization.quantize": ["quantize_step"],
    "quantization.scaling": ["ALPHAS", "InputStatistics", "search_scale"],
    "quantization.search": ["search_scales"],
    "quantization.source_grid": ["rounded_anew"],
    "quantization.wanted": ["control_forms", "equal_bytes", "quantized_variants", "wanted_forms"],
}
__getattr__, __all__ = face(__name__, FACE)
