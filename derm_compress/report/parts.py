"""The report's parts in the paper's order, with their captions: {stem: (label, question, findings)}. No torch."""

from derm_compress.evaluate.judges import controls
from derm_compress.report import (
    contradictions,
    findings,
    quantization_findings,
    ranking_findings,
    side_by_side,
    statistics_findings,
    verdicts,
)

QUESTION = "How far can a multimodal medical model be compressed, and what does it cost?"
CAPTION = "score with its 95 % interval, n answers; what the paper has stands beside it"
CAPTIONS = {  # of the tables that need another one
    "table3_quantization": f"{CAPTION}; output error: relative, on training pictures that no search saw. "
    "awq-duo: scales know weights' magnitudes too; -clip: ranges are clipped; -text: calibrated without pictures; "
    "-double: scales in 8 bits",
    "table4_efficiency": f"{CAPTION}; times are medians with their quartiles",
    "extra_agreement": "Spearman's rank correlation over unprotected blocks; 95 % interval over draws of the items",
    "extra_calibration_size": "two disjoint draws of so many pictures; 95 % of the draws lie within the brackets",
    "extra_criteria": "score before SFT with its 95 % interval, n answers",
    "extra_criteria_tests": "the study's criterion minus its rival in points, paired, 95 % interval, p by sign flips; "
    "over pictures: that another random order would differ too is not in it",
    "extra_quantization_tests": "difference: minus AWQ of the same model and width; minus 16 bits: minus the model "
    "that was quantized; points, paired, 95 % interval, p by sign flips, corrected over all of one width (Holm)",
    "extra_errors": "relative error of each block's output by method, on training pictures that no search saw; "
    "blocks are counted as in the unpruned model",
    "extra_equal_bytes": "score with its 95 % interval; difference: minus all blocks at the budget's width, healed "
    "alike, paired; where two widths are mixed, the blocks that the plan would remove last get the wider one",
    "extra_cliffs": "the steepest fall between neighbouring depths, per block; its interval is of the step that was "
    "chosen for being the steepest; level until: the last depth before the first whose paired interval to the "
    "unpruned one lies below 0",
    "extra_sublayers": "without single attentions or MLPs; difference: to the nearest whole-block model, paired",
    "extra_measured": "weights as planned (16 bits or fewer) and as run (a CPU takes 32 for 16); one process runs all; "
    "its peak: while this model was timed (on Linux)",
    "extra_judges": "marks of 1 to 4 for answers whose worth is known; n answers",
    "extra_verdicts": "paper: what it claims; ours: with its 95 % interval where there are answers; verdicts by the "
    "rules above",
    "extra_side_by_side": "each cell of Tables 1 to 5: the paper's, ours with its 95 % interval (of times: quartiles), "
    "and what the verdict rests on",
    "extra_contradictions": "computed from the paper's printed numbers and the exact shapes of llava-1.5-7b",
    "extra_planner": "the paper's VRAM beside planned weights, in both units; peak: of a question, in Table 2 training",
    "extra_latency": "medians with their quartiles; floor: what a step reads over the measured bandwidth",
    "extra_comparisons": "setting minus the full pipeline, paired, 95 % interval over images; p by sign flips",
    "extra_power": "the smallest true paired difference that is found with a power of 80 % at the 5 % level",
    "extra_seeds": "mean over SFT seeds with a 95 % interval over images; training: what chance does not explain",
    "extra_diagnosis": "answers to the name question; 95 % interval over images",
    "extra_secondary": "test pictures, 95 % intervals over images; similarity: of embeddings, computed for the "
    "variants of notebook 08 on test pictures alone; runaway: answers that never end",
    "extra_baselines": "score with its 95 % interval, n answers; base answered the test pictures alone",
}
BRIEF = [
    "setting",
    "score",
    "score_lo",
    "score_hi",
    "n",
    "paper_score",
    "vram_gib_7b",
    "paper_vram",
]
LONG_TABLE, LONG_PAPER_TABLE = (
    16,
    40,
)  # rows from which a table beside the paper's, or one of them, is folded
OPEN = ("extra_verdicts", "extra_contradictions")  # but these
RUBRIC_LIMITS = "The rubric counts stated facts; it judges neither safety nor negation nor grammar."


def model_judged(results) -> bool:
    """Whether a model gave the scores; the rubric's then stand beside them."""
    return results.evaluation is not None and "rubric" in results.evaluation


PARTS = {  # in the paper's order: label, question, and what the numbers say to it
    "fig1_pipeline": ("Figure 1", "The pipeline", None),
    "fig2_block_removal": ("Figure 2", "Which blocks are tried, and which go?", None),
    "fig3_layer_importance": (
        "Figure 3", "How much does each block matter?",
        lambda results: ranking_findings.findings_order(results) + ranking_findings.findings_drafts(results),
    ),
    "extra_agreement": ("Beside Figure 3", "Do the criteria agree?", ranking_findings.findings_agreement),
    "extra_calibration_size": (
        "Beside Figure 3", "How many pictures are enough, and do they change the ranking?",
        lambda results: ranking_findings.findings_calibration(results) + ranking_findings.findings_images(results),
    ),
    "fig4_activations": ("Figure 4", "Where do activations stand out?", quantization_findings.findings_activations),
    "extra_activations": (
        "Beside Figure 4", "And in every other block and projection?", quantization_findings.findings_outliers
    ),
    "table1_pruning": ("Table 1", "What does pruning alone cost, at each depth?", findings.findings_depths),
    "extra_criteria": ("Beside Table 1", "Does the criterion beat its rivals?", ranking_findings.findings_rivals),
    "extra_criteria_tests": ("Beside Table 1", "How sure is each comparison?", None),
    "extra_cliffs": ("Beside Table 1", "Where does the score fall?", ranking_findings.findings_cliffs),
    "extra_sublayers": (
        "Beside Table 1", "Do single attentions or MLPs give more than whole blocks?",
        ranking_findings.findings_sublayers,
    ),
    "table2_sft": ("Table 2", "What does SFT heal, beyond what it gives the unpruned model?", findings.findings_sft),
    "extra_seeds": ("Beside Table 2", "How much is training noise?", statistics_findings.findings_seeds),
    "table3_quantization": (
        "Table 3", "What do fewer bits cost, by method?", quantization_findings.findings_quantization
    ),
    "extra_quantization_tests": ("Beside Table 3", "How sure is each comparison of methods?", None),
    "extra_errors": ("Beside Table 3", "Where do errors arise, and do they cost answers?", None),
    "extra_alpha": ("Beside Table 3", "What does AWQ scale?", quantization_findings.findings_scales),
    "extra_equal_bytes": (
        "Beside Table 3", "Fewer blocks or fewer bits, at equal bytes?", quantization_findings.findings_equal_bytes
    ),
    "table4_efficiency": ("Table 4", "What does the whole pipeline gain in memory and time?", None),
    "extra_planner": (
        "Beside Table 4", "Does the memory plan give the paper's figures?", statistics_findings.findings_planner
    ),
    "extra_measured": ("Beside Table 4", "What does a running model take?", None),
    "extra_latency": (
        "Beside Table 4", "How far is decoding from its floor?", statistics_findings.findings_latency
    ),
    "pareto": ("Beside Table 4", "What is the best score for the memory, and for the time?", None),
    "table5_ablation": ("Table 5", "Which part matters?", lambda results: findings.findings_evaluation(results)[1:]),
    "extra_comparisons": (
        "Beside Tables 4 and 5", "How sure is each difference?", statistics_findings.findings_comparisons
    ),
    "extra_power": (
        "Beside Tables 4 and 5", "What difference could be seen at all?", statistics_findings.findings_power
    ),
    "extra_diagnosis": ("Beside Table 5", "Which disease is named?", statistics_findings.findings_diagnosis),
    "extra_secondary": (
        "Beside Table 5", "What do scores say that no judge gives?", statistics_findings.findings_secondary
    ),
    "extra_baselines": ("Beside Table 5", "Does the score come from fine-tuning and from seeing?", None),
    "fig5_case_studies": ("Figure 5", "What do the models say?", None),
    "fig6_judge_prompt": (
        "Figure 6", "How are answers judged?", lambda results: [] if model_judged(results) else [RUBRIC_LIMITS]
    ),
    "extra_judges": (
        "Beside Figure 6", "Is the judge any good?",
        lambda results: controls.judge_findings(results.judge_controls, results.evaluation),
    ),
    "fig7_iterative_pruning": ("Figure 7", "How do answers change while blocks go?", None),
    "extra_verdicts": ("The paper's claims", "Which of them hold?", None),
    "extra_side_by_side": ("The paper's tables", "Which cells are reproduced?", None),
    "extra_contradictions": ("The paper itself", "Where does it disagree with itself?", None),
}  # fmt: skip
SAID_OF = {  # sentences that a finished table suffices for
    "extra_verdicts": verdicts.findings,
    "extra_side_by_side": side_by_side.findings,
    "extra_contradictions": contradictions.findings,
}
