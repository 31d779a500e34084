"""Allocations: the programme, bytes against files, and what becomes of a model."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from derm_compress.errors import DermError
from derm_compress.evaluate import allocate
from derm_compress.evaluate.export import export_model
from derm_compress.method.allocation import sizes
from derm_compress.method.allocation.allocation import JOINT, ROUNDING, RUNNING, Allocation
from derm_compress.method.allocation.candidates import allocated_variants, allocations, decided
from derm_compress.method.allocation.costs import linear_costs
from derm_compress.method.allocation.divergence import divergences
from derm_compress.method.allocation.programme import best_bits
from derm_compress.method.allocation.ways import Problem
from derm_compress.method.assemble import materialize
from derm_compress.method.importance.calibration import Calibration
from derm_compress.method.importance.scoring import answer_loss
from derm_compress.method.pruning.plan import Plan
from derm_compress.method.quantization import checkpoint, packed
from derm_compress.method.quantization.grids import grid_of
from derm_compress.method.quantization.methods import Form
from derm_compress.method.quantization.quantize import quantize_step
from derm_compress.model import anatomy, loading, shapes
from derm_compress.model.memory import GIB
from derm_compress.model.units import Unit

IDS = torch.arange(5, 25).view(1, -1)
LINEARS = [f"{i}.{name}" for i in range(8) for g in anatomy.SEPARATE.values() for name in g.linears]


def allocation(fingerprint, removed=(), bits=(), method="rtn", group_size=64):
    """Of the pico model, each linear of what stays with the next of these widths."""
    left = [name for name in LINEARS if int(name[0]) not in removed]
    widths = dict(zip(left, itertools.cycle(bits), strict=False))
    return Allocation("pico", fingerprint, 8, widths, removed, method, group_size)


def file_bytes(planned):
    return sum(size for part, size in planned.items() if part not in RUNNING)


def options(seed, linears=6):
    """A row for each of three linears of two blocks, and each of four widths."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(linears):
        block, name = divmod(i, 3)
        size, cost = 64 * int(draw.integers(3, 90)), draw.random(4).cumsum()[::-1]
        for bits, one in zip((2, 3, 4, 8), cost, strict=True):
            told = {"block": block, "linear": f"mlp.{name}_proj", "bits": bits}
            rows.append(told | {"cost": one, "bytes": size * bits // 8})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_is_what_trying_everything_finds(seed):
    table = options(seed)
    parts = [part for _, part in table.groupby(["block", "linear"])]
    tried = list(itertools.product(*(part.to_dict("records") for part in parts)))
    totals = [[sum(row[key] for row in rows) for key in ("cost", "bytes")] for rows in tried]
    costs, taken = np.array(totals).T
    for room in np.quantile(taken, [0.02, 0.3, 0.7]).astype(int):
        found = pd.Series(best_bits(table, room), name="bits").rename_axis("name").reset_index()
        named = table.assign(name=table.block.astype(str) + "." + table.linear)
        chosen = named.merge(found, on=["name", "bits"])
        assert len(chosen) == 6 and chosen.bytes.sum() <= room
        assert chosen.cost.sum() == pytest.approx(costs[taken <= room].min(), rel=1e-9)


def test_a_budget_holds_to_the_byte_or_its_least_is_named():
    table = options(9)
    least = int(table.groupby(["block", "linear"]).bytes.min().sum())
    assert set(best_bits(table, least).values()) == {2}
    with pytest.raises(DermError, match=f"needs {least} bytes"):
        best_bits(table, least - 1)


def test_queries_keys_and_values_share_a_width_unless_they_are_free():
    table = options(5)
    names = ["q_proj", "k_proj", "v_proj"]
    table["linear"] = [f"self_attn.{names[int(name[4])]}" for name in table.linear]
    room = int(table.groupby(["block", "linear"]).bytes.max().sum() * 0.6)
    tied, free = best_bits(table, room), best_bits(table, room, tied=False)
    for block in "01":
        assert len({bits for name, bits in tied.items() if name[0] == block}) == 1
    assert len(set(free.values())) > 2 and tied != free


@pytest.mark.parametrize("method", ROUNDING)
@pytest.mark.parametrize("shape", [(64, 192), (9, 64), (5, 48)])
def test_a_linears_bytes_are_those_that_it_holds(method, shape):
    torch.manual_seed(0)
    linear = torch.nn.Linear(*shape[::-1], bias=False).requires_grad_(False)
    for bits in (2, 3, 4, 8):
        held = grid_of(Form(method, bits, 16)).packed(linear)
        zeros = 0 if held.zeros is None else held.zeros.nbytes
        assert sizes.linear_bytes(shape, bits, method, 16) == (
            held.codes.nbytes,
            held.scales.nbytes + zeros,
        )


def test_planned_bytes_are_file_bytes_and_the_folder_says_the_same(recipe, store, tmp_path):
    """Two blocks gone, five widths: planned, exported, and opened again."""
    made = allocation(recipe.fingerprint, (3, 6), (2, 3, 4, 8, 16, 3))
    applied = made.applied(recipe, recipe.fingerprint)
    arch = shapes.architecture(loading.config_of("pico"))
    planned = sizes.planned_bytes(arch, made.removed, made.bits, "rtn", 64)
    folder = export_model(applied.to_json(), store, tmp_path / "out", half=True)
    stored = [load_file(path) for path in folder.glob("*.safetensors")]
    assert sum(t.nbytes for file in stored for t in file.values()) == file_bytes(planned)
    export_model(applied.to_json(), store, tmp_path / "full")
    opened, _ = checkpoint.load(tmp_path / "full")
    packed.use_kernels(opened, False)
    whole, _ = materialize(applied, store, quantize=quantize_step)
    with torch.no_grad():
        assert torch.equal(opened(input_ids=IDS).logits, whole(input_ids=IDS).logits)


def test_sixteen_bits_everywhere_are_the_model_bit_by_bit(recipe, store, pico):
    made = allocation(recipe.fingerprint, bits=[16])
    assert made.applied(recipe, recipe.fingerprint) == recipe
    forms = Form("rtn", linear_bits=dict.fromkeys(LINEARS, 16))
    same, _ = materialize(recipe.then("quantize", **forms.step), store, quantize=quantize_step)
    before = pico[0].state_dict()
    assert all(torch.equal(t, before[name]) for name, t in same.state_dict().items())


def test_an_allocation_survives_json_and_refuses_another_model(recipe):
    made = allocation(recipe.fingerprint, (2,), (3, 4))
    told = made.to_dict()
    assert told["removed"] == [2] and Allocation.from_json(json.dumps(told)) == made
    with pytest.raises(DermError, match="made for a model of 8 blocks .* allocate anew"):
        made.applied(recipe, "another")
    with pytest.raises(DermError, match="2.mlp.up_proj has bits, but no kept block"):
        Allocation.from_json(json.dumps(told | {"bits": {"2.mlp.up_proj": 4}}))


def test_a_7b_budget_means_the_same_share_of_16_bits():
    tiny, seven = shapes.architecture(loading.config_of("tiny")), shapes.llava_7b()
    whole = sum(sizes.around(seven, ()).values()) + 2 * seven.decoder_linears()
    own = sum(sizes.around(tiny, ()).values()) + 2 * tiny.decoder_linears()
    assert sizes.own_budget(whole / GIB, tiny, seven) == own
    with pytest.raises(DermError, match="1.63 around 7B's blocks"):
        sizes.own_budget(1.5, tiny, seven)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "awq"}, "awq searches whole blocks"),
        ({"linear_bits": {"0.mlp.up_proj": 5}}, "rtn has 2, 3, 4, 8, not 5"),
    ],
)
def test_widths_by_linear_are_for_methods_without_a_search(change, said):
    with pytest.raises(DermError, match=said):
        Form(**{"method": "rtn", "linear_bits": {"0.mlp.up_proj": 3}} | change)


@pytest.fixture(scope="module")
def problem():
    arch = shapes.architecture(loading.config_of("pico"))
    plan = Plan("last", tuple(map(Unit, [6, 5, 4, 3, 2])), (0, 1, 7), 8)
    return Problem("pico", anatomy.fingerprint(loading.load_base("pico")[0]), arch, plan)


def test_a_width_costs_what_its_change_does_to_the_loss_at_most(pico, dataset):
    c = Calibration(*pico, dataset.of("train")[:1], dataset.images)
    found = {(r["block"], r["linear"], r["bits"]): r["cost"] for r in linear_costs(c, "rtn", 64)}
    weight = anatomy.blocks(pico[0])[5].mlp.up_proj.weight
    answer_loss(c, c.items[0]).backward()
    change = grid_of(Form("rtn", 3)).rounded(weight.detach()) - weight
    assert found[5, "mlp.up_proj", 3] == pytest.approx((weight.grad * change).abs().sum().item())
    costs = [found[5, "mlp.up_proj", bits] for bits in (2, 3, 4, 8, 16)]
    assert costs == sorted(costs, reverse=True) and costs[-1] == 0 and len(found) == 8 * 7 * 5


def costs_of(problem, depths):
    """As if every weight counted alike, the first blocks' more."""
    rows = []
    for n in depths:
        for block, name in problem.linears(n):
            size = np.prod(problem.arch.linears[name]) / (1 + block)
            told = {"units_removed": n, "block": block, "linear": name}
            rows += [told | {"bits": b, "cost": size / 2**b * (b < 16)} for b in (2, 3, 4, 8, 16)]
    return pd.DataFrame(rows)


def test_every_way_keeps_the_budget_and_the_nearest_to_the_model_is_chosen(
    problem, recipe, store, dataset
):
    costs = costs_of(problem, [0, 2])
    budget = sum(problem.uniform(1, 4).bytes.values())
    asked = allocations(problem, costs, {3.0: budget}, operating=2)
    tried = asked[asked.way != "probe"]
    assert set(tried.way) == {
        *("candidate", "bits alone", "drops alone", "uniform", "last blocks wide"),
        *("paper's pipeline", "random"),
    }
    assert (tried.bytes_planned <= budget).all()
    assert tried[tried.way == "drops alone"].units_removed.item() == 1
    best = (
        tried[tried.way.isin(["bits alone", "uniform", "last blocks wide"])].set_index("way").cost
    )
    assert best.idxmin() == "bits alone"
    some = asked[asked.way.isin(["candidate", "probe"])]
    variants = allocated_variants(some, problem, recipe, [0, 2])
    items = dataset.of("train")[:1]
    how = {"store": store, "device": "cpu", "batch_size": 12, "quantize": quantize_step}
    kl = divergences(variants, items, dataset.images, **how)
    kl = kl.set_index("variant").kl
    assert kl["original"] == 0 and (kl.drop("original") > 0).all()
    table = decided(some, kl.reset_index())
    chosen = table[table.way == JOINT].iloc[0]
    assert chosen.kl == table[table.way == "candidate"].kl.min()
    probe = table[table.way == "probe"].iloc[0]
    assert probe.predicted == pytest.approx(probe.kl)


def test_a_folder_within_a_budget(problem, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(allocate, "DEPTHS", (0, 8))
    read = dataset.of("train")
    given = read[:1], read[1:2], dataset.images
    least = sum(problem.uniform(2, 2).bytes.values())
    with pytest.raises(DermError, match=f"too few; the smallest that is feasible is {least}"):
        allocate.allocate_folder("pico", tmp_path / "x", (least - 1) / GIB, *given, ranking="last")
    budget = sum(problem.uniform(1, 3).bytes.values())
    made = allocate.allocate_folder("pico", tmp_path / "x", budget / GIB, *given, ranking="last")
    assert sum(made.bytes.values()) <= budget
    assert Allocation.from_json((tmp_path / "x" / allocate.ALLOCATION).read_text()) == made
    stored = load_file(tmp_path / "x" / "packed.safetensors").values()
    assert sum(t.nbytes for t in stored) == file_bytes(made.bytes)
    assert len(anatomy.blocks(checkpoint.load(tmp_path / "x")[0])) == len(made.kept)
