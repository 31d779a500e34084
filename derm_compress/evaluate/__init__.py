from derm_compress.faces import face

FACE = {
    "answers": ["answer", "answer_variants", "answer_controls", "plan_memory", "table_variants"],
    "quantized": ["measure_quantized"],
    "losses": ["answer_losses"],
    "metrics": ["depth_scores", "paired_difference", "score_interval", "score_table"],
    "schema": ["read_answers"],
    "judges.rubric": ["rate", "score_by_rubric", "stated"],
    "judges.judge": ["choose_judge", "judge_all", "unread"],
    "judges.prompts": ["judge_prompt"],
    "judges.controls": ["judge_controls", "controls_table", "judge_quality"],
    "secondary": ["predictions"],
    "latency": ["time_variants"],
    "export": ["export_model"],
}
__getattr__, __all__ = face(__name__, FACE)
