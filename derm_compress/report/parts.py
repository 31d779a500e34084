"""The report's parts in the paper's order: what each asks, what its cells mean. No torch."""

from __future__ import annotations

from dataclasses import dataclass

QUESTION = "How far can a multimodal medical model be compressed, and what does it cost?"
SCORES = "score with its 95 % interval, n answers; what the paper has stands beside it"


@dataclass(frozen=True)
class Part:
    """A table, a figure or both, of one stem; a table of more than `shown` rows is folded."""

    stem: str
    label: str
    question: str
    caption: str = SCORES
    shown: int = 16


PARTS = (
    Part("fig1_pipeline", "Figure 1", "The pipeline"),
    Part("fig2_block_removal", "Figure 2", "Which blocks are tried, and which go?"),
    Part("fig3_layer_importance", "Figure 3", "How much does each block matter?"),
    Part(
        "extra_agreement",
        "Beside Figure 3",
        "Do the criteria agree?",
        "Spearman's rank correlation over unprotected blocks; 95 % interval over draws of pictures",
    ),
    Part(
        "extra_calibration_size",
        "Beside Figure 3",
        "How many pictures are enough?",
        "two disjoint draws of so many pictures; 95 % of the draws lie within the brackets",
    ),
    Part("fig4_activations", "Figure 4", "Where do activations stand out?"),
    Part("extra_activations", "Beside Figure 4", "And in every other block and projection?"),
    Part("table1_pruning", "Table 1", "What does pruning alone cost, at each depth?", shown=40),
    Part(
        "extra_criteria",
        "Beside Table 1",
        "Does the criterion beat its rivals?",
        "score before SFT with its 95 % interval, n answers",
    ),
    Part(
        "extra_criteria_tests",
        "Beside Table 1",
        "How sure is each comparison?",
        "the study's criterion minus its rival in points, paired, 95 % interval, p by sign flips "
        "over pictures; that another random order would differ too is not in it",
    ),
    Part(
        "extra_cliffs",
        "Beside Table 1",
        "Where does the score fall?",
        "the steepest fall between neighbouring depths, per block, with the interval of that step, "
        "which was chosen for being the steepest; level until: the last depth before the first "
        "whose paired interval to the unpruned model lies below 0",
    ),
    Part(
        "extra_sublayers",
        "Beside Table 1",
        "Do single attentions or MLPs give more than whole blocks?",
        "without single attentions or MLPs; difference: to the nearest whole-block model, paired",
    ),
    Part(
        "table2_sft",
        "Table 2",
        "What does SFT heal, beyond what it gives the unpruned model?",
        shown=40,
    ),
    Part(
        "extra_seeds",
        "Beside Table 2",
        "How much is training noise?",
        "mean over SFT seeds with a 95 % interval over pictures; training: beyond chance",
    ),
    Part(
        "table3_quantization",
        "Table 3",
        "What do fewer bits cost, by method?",
        f"{SCORES}; output error: relative, on training pictures that no search saw. awq-duo: "
        "scales know weights' magnitudes too; -clip: ranges are clipped; -text: calibrated "
        "without pictures; -double: scales in 8 bits",
        shown=40,
    ),
    Part(
        "extra_quantization_tests",
        "Beside Table 3",
        "How sure is each comparison of methods?",
        "difference: minus AWQ of the same model and width; minus 16 bits: minus the model that "
        "was quantized; points, paired, 95 % interval, p by sign flips, Holm's over one width",
    ),
    Part(
        "extra_errors",
        "Beside Table 3",
        "Where do errors arise, and do they cost answers?",
        "relative error of each block's output by method, on training pictures that no search saw; "
        "blocks are counted as in the unpruned model",
    ),
    Part("extra_alpha", "Beside Table 3", "What does AWQ scale?"),
    Part(
        "extra_equal_bytes",
        "Beside Table 3",
        "Fewer blocks or fewer bits, at equal bytes?",
        "score with its 95 % interval; difference: minus all blocks at the budget's width, healed "
        "alike, paired; of two widths, the blocks that would go last get the wider one",
    ),
    Part(
        "table4_efficiency",
        "Table 4",
        "What does the whole pipeline gain in memory and time?",
        f"{SCORES}; times are medians with their quartiles",
        shown=40,
    ),
    Part(
        "extra_measured",
        "Beside Table 4",
        "What does a running model take?",
        "weights as planned (16 bits or fewer) and as run (a CPU takes 32 for 16); one process "
        "runs all; its peak: while this model was timed (on Linux)",
    ),
    Part(
        "extra_latency",
        "Beside Table 4",
        "How far is decoding from its floor?",
        "medians with their quartiles; floor: what a step reads over the measured bandwidth; "
        "packed weights that no kernel of the device reads are decoded at every step",
    ),
    Part("pareto", "Beside Table 4", "What is the best score for the memory, and for the time?"),
    Part("table5_ablation", "Table 5", "Which part matters?", shown=40),
    Part(
        "extra_comparisons",
        "Beside Tables 4 and 5",
        "How sure is each difference?",
        "setting minus the full pipeline, paired, 95 % interval over pictures; p by sign flips",
    ),
    Part(
        "extra_power",
        "Beside Tables 4 and 5",
        "What difference could be seen at all?",
        "the smallest true paired difference that is found with a power of 80 % at the 5 % level",
    ),
    Part(
        "extra_diagnosis",
        "Beside Table 5",
        "Which disease is named?",
        "answers to the name question; 95 % interval over pictures",
    ),
    Part(
        "extra_secondary",
        "Beside Table 5",
        "What do scores say that no judge gives?",
        "test pictures, 95 % intervals; similarity: of embeddings, of notebook 08's variants "
        "alone; runaway: answers that never end",
    ),
    Part(
        "extra_baselines",
        "Beside Table 5",
        "Does the score come from fine-tuning and from seeing?",
        "score with its 95 % interval, n answers; base answered the test pictures alone",
    ),
    Part("fig5_case_studies", "Figure 5", "What do the models say?"),
    Part("fig6_judge_prompt", "Figure 6", "How are answers judged?"),
    Part(
        "extra_judges",
        "Beside Figure 6",
        "Is the judge any good?",
        "marks of 1 to 4 for answers whose worth is known; n answers",
    ),
    Part("fig7_iterative_pruning", "Figure 7", "How do answers change while blocks go?"),
    Part(
        "extra_verdicts",
        "The paper's claims",
        "Which of them hold?",
        "what the paper claims, and ours with its 95 % interval; verdicts by the rules above",
        shown=99,
    ),
    Part(
        "extra_side_by_side",
        "The paper's tables",
        "Which cells are reproduced?",
        "the paper's, ours with its 95 % interval (of times: quartiles), and what the verdict "
        "rests on",
    ),
)
