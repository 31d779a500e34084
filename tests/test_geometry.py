"""Models without values: the 7B shapes through the stages' functions; exact counts, no score."""

import pandas as pd
import pytest
import torch

from derm_compress.errors import DermError
from derm_compress.evaluate import latency, metrics
from derm_compress.evaluate.answers import answer_controls, answer_variants, plan_memory
from derm_compress.evaluate.quantized import measure_quantized
from derm_compress.files import Journal
from derm_compress.method.activation_analysis import activation_statistics, activation_surface
from derm_compress.method.assemble import materialize
from derm_compress.method.finetune import jobs as jobs_
from derm_compress.method.finetune import train
from derm_compress.method.finetune.jobs import fine_tune_all, fine_tune_jobs
from derm_compress.method.importance import measure
from derm_compress.method.importance.calibration import Calibration
from derm_compress.method.importance.embedder import Embedder
from derm_compress.method.importance.plans import pruning_plans
from derm_compress.method.pruning.depths import choose_operating_point
from derm_compress.method.pruning.plan import published_plan
from derm_compress.method.quantization import wanted as wanted_frames
from derm_compress.method.quantization.search import search_scales
from derm_compress.model import anatomy, loading, processors, removal
from derm_compress.model import variants as frames
from derm_compress.model.recipe import Recipe
from derm_compress.model.variants import pruned, to_heal
from derm_compress.report import tables
from derm_compress.report.results import Results  # fmt: skip

PAPER_B = {0: 7.063, 2: 6.659, 4: 6.254, 6: 5.85, 7: 5.647, 8: 5.444, 9: 5.242, 10: 5.04}
UNPRUNED, BLOCK = 7_063_427_072, 202_383_360


@pytest.fixture
def seven_b():
    model, processor = loading.load_base(loading.SEVEN_B, anatomy.META)
    return (
        model,
        processor,
        Recipe(loading.SEVEN_B, anatomy.fingerprint(model), len(anatomy.blocks(model))),
    )


def test_the_7b_shapes_have_the_published_counts_and_no_values(seven_b):
    model, processor, _ = seven_b
    assert sum(p.numel() for p in model.parameters()) == UNPRUNED and not anatomy.has_values(model)
    assert processor is None and {p.dtype for p in model.parameters()} == {torch.float16}
    processors.check_picture_size(processor, torch.zeros(1, 16, 16, 3).numpy())


def test_the_hub_ids_shapes_need_no_download():
    names = (loading.SEVEN_B, "llava-hf/llava-1.5-7b-hf")
    one, other = (loading.load_base(name, anatomy.META)[0] for name in names)
    assert anatomy.fingerprint(one) == anatomy.fingerprint(other)


def test_shapes_alone_are_not_run():
    with pytest.raises(DermError, match="set device: meta, or model: llava-hf/llava-1.5-7b-hf"):
        loading.load_base(loading.SEVEN_B)


def test_a_fingerprint_of_shapes_tells_depths_apart():
    deep, pico = (loading.load_base(name, anatomy.META)[0] for name in ("tiny", "pico"))
    before = anatomy.fingerprint(pico)
    assert before != anatomy.fingerprint(deep)
    removal.apply(pico, range(6))
    assert before != anatomy.fingerprint(pico)


def variants_of(recipe, store):
    """All variants of the study as its stages make them."""
    folder = store.root
    known = pruned(recipe, [published_plan()], [2, 4, 6, 7, 8, 9, 10])
    training = train.Training(rank=16, alpha=8, learning_rate=1e-3, steps=2, batch_size=2, seed=0)
    sources = to_heal(known, {"criterion": "published", "operating": 6, "deeper": 9})
    jobs = fine_tune_jobs(sources, training, anatomy.META)
    (folder / "scratch").mkdir()
    (folder / "adapters").mkdir()
    how = {"data": folder, "store": None, "scratch": folder / "scratch", "processes": 2}
    fine_tune_all(folder / "adapters", jobs, **how)
    healed = frames.healed(sources, store.ref("adapters"), folder / "adapters")
    every = pd.concat([sources, healed])
    methods = ["awq", "bitsandbytes", "rtn", "rtn_symmetric"]
    wanted = wanted_frames.asked(every.variant, methods, [4], 64)
    rounded = wanted_frames.quantized_variants(every, wanted, store.ref("scales"))
    return pd.concat([known, healed, rounded], ignore_index=True), jobs, sources, wanted, rounded


def test_a_study_without_weights_has_sizes_and_no_score(seven_b, store, dataset, tmp_path):
    """What the eight notebooks call, in their order, on the true shapes."""
    model, processor, recipe = seven_b
    calibration = Calibration(model, processor, dataset.of("train")[:2], dataset.images, Embedder())
    measured = measure.measure_importance(["published"], calibration, Journal())
    scores = measure.importance_scores(measure.importance_values(measured), (0, 1, 31))
    told = {"protected": (0, 1, 31), "most": 9}
    plans = pruning_plans(["published"], measured, calibration, journal=Journal(), **told)
    variants, jobs, sources, wanted, rounded = variants_of(recipe, store)
    ask = {"items": dataset.of("test"), "images": dataset.images}
    ask |= {"store": store, "device": anatomy.META}
    answers = answer_variants(variants, **ask, batch_size=4, max_new_tokens=4)
    controls = answer_controls(variants, **ask, seed=0, batch_size=4, max_new_tokens=4)
    assert answers.empty and controls.empty and {"variant", "score", "answer"} <= set(answers)
    choice = choose_operating_point(metrics.depth_scores(answers, variants), published_plan())
    assert (choice["operating"], choice["deeper"]) == (6, 9) and "no scores" in choice["why"]
    how = ask | {"items": dataset.of("train")[:1]}
    assert activation_statistics(sources, batch_size=1, **how).empty
    assert activation_surface(sources, block=30, projection="q_proj", **how).empty
    sizes = {"batch_size": 1, "quantization_batch": 1, "max_new_tokens": 4}
    measure_quantized(tmp_path, rounded, unseen=how["items"], **ask, **sizes)
    assert pd.read_parquet(tmp_path / "errors.parquet").empty
    search_scales(tmp_path, wanted, sources, batch_size=1, **how)
    assert pd.read_parquet(tmp_path / "search.parquet").empty
    timed = latency.time_variants(variants, **ask)
    training = jobs_.training_costs(tmp_path / "scratch", jobs)
    assert training.seconds.isna().all() and (training.train_peak_gib > 4).all()
    results = Results(
        scores=scores, plans=plans, choice=choice, variants=variants, answers=answers,
        evaluation=answers, training=training, latency=timed,
        memory=plan_memory(variants),
    )  # fmt: skip
    check_tables(tables.build(results))


def check_tables(built):
    one = built["table1_pruning"].set_index("blocks_removed")
    sizes = {n: round((UNPRUNED - n * BLOCK) / 1e9, 9) for n in PAPER_B}
    assert one.params_b.round(9).to_dict() == sizes
    assert all(abs(one.params_b[n] - size) < 0.002 for n, size in PAPER_B.items())
    printed = one.dropna(subset=["paper_vram"])
    assert len(printed) == 7 and ((printed.vram_gib - printed.paper_vram).abs() < 0.25).all()
    for stem, frame in built.items():
        for column in frame.filter(regex=r"^(score|gain|difference)"):
            assert frame[column].isna().all(), (stem, column)
        for line in tables.to_csv(frame).splitlines()[1:]:
            assert "nan" not in line.lower(), stem
    assert (tables.readable(built["table4_efficiency"])["score, %"] == "no score").all()
    assert built["table3_quantization"].vram_gib.notna().all()
    assert built["table2_sft"].train_peak_gib.notna().all()


def test_criteria_that_look_at_weights_are_refused_by_name(dataset):
    model, processor = loading.load_base("pico", anatomy.META)
    calibration = Calibration(model, processor, dataset.of("train")[:1], dataset.images)
    with pytest.raises(DermError, match=r"\['magnitude', 'taylor'\] need weights"):
        wanted = ["last", "magnitude", "random-1", "taylor"]
        measure.measure_importance(wanted, calibration, Journal())
    measured = measure.measure_importance(["last", "random-1"], calibration, Journal())
    assert set(measured.ranking) == {"last", "random-1"} and measured.value.notna().all()


def test_adapters_and_rounding_change_no_shape(store):
    model, _ = loading.load_base("pico", anatomy.META)
    recipe = Recipe("pico", anatomy.fingerprint(model), 8).pruned([0, 1, 2, 7])
    recipe = recipe.then("adapter", ref="none", sha256="0", kept=[0, 1, 2, 7])
    rounded = recipe.then("quantize", method="rtn", bits=4, group_size=64)
    made, _ = materialize(rounded, store, anatomy.META)
    assert len(anatomy.blocks(made)) == 4 and not anatomy.has_values(made)
