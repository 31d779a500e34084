import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from derm_compress.method.finetune import train
from derm_compress.model import graphs, loading, writing
from derm_compress.model.graphs import Recorded

WAITS = {  # what a recording cannot hold: a look at values, or sizes that depend on them
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::lift_fresh",
    "aten::masked_select",
    "aten::is_nonzero",
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="records on a GPU alone")


class Recordable(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        by_mask = name.startswith("aten::index") and any(
            index is not None and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        assert name.split(".")[0] not in WAITS and not by_mask, name
        return function(*args, **(kwargs or {}))


def checked(function):
    def work(*inputs):
        with Recordable():
            return function(*inputs)

    return work


@pytest.mark.parametrize("base", ["nf4", "half"])
def test_gradients_are_those_of_the_model_and_can_be_recorded(dataset, monkeypatch, base):
    model, processor = loading.load_base("pico")
    training = train.Training(
        rank=4, alpha=8, learning_rate=1e-2, steps=4, batch_size=3, seed=0, base=base
    )
    tuned = train.attach(model, training).train()
    weights = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.01)
    some = dataset.of("train")[:3]
    batch = train.training_batch(model, processor, some, dataset.images, np.random.default_rng(0))
    with train.autocast("cpu", base):
        loss = tuned(**batch, use_cache=False).loss
    loss.backward()
    expected = [weight.grad.clone() for weight in weights]
    work = train.gradients_of(tuned, optimizer, base=base)
    with torch.no_grad(), train.autocast("cpu", base):
        x = train.embedded(model, batch)
    asked = x, batch["attention_mask"], batch["labels"]
    found = work(*asked)
    assert torch.equal(found[0], loss)
    assert all(torch.equal(*pair) for pair in zip(found[1:], expected, strict=True))
    assert any(gradient.abs().sum() > 0 for gradient in expected)
    # transformers asks, and then makes its mask without looking at it
    monkeypatch.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True)
    assert torch.allclose(checked(work)(*asked)[0], loss, rtol=1e-3)


@pytest.mark.parametrize("units", [(), (1, 3)])
def test_answers_of_lines_that_are_all_read_are_the_same(pico, dataset, monkeypatch, units):
    """As on a GPU, whose every step is the same work, which can be recorded."""
    from derm_compress.method.importance import calibration

    items, seen = dataset.of("train")[:3], []
    c = calibration.Calibration(*pico, items, dataset.images, batch_size=5, max_new_tokens=9)

    def answers():
        return {answer.key: answer.tokens for answer, _ in c.answers(units)}

    plain = answers()

    class Whole(writing.Writer):
        def __init__(self, *args, **how):
            super().__init__(*args, **how)
            self.cache.whole, self.read = True, checked(self.forward)

        def predict(self, guessed):
            said = super().predict(guessed)
            seen.append(len(said[0]))
            return said

    monkeypatch.setattr("derm_compress.method.importance.drafts.Writer", Whole)
    assert answers() == plain and min(seen) < max(seen)


def test_on_a_cpu_a_function_is_called_as_it_is():
    calls = []
    work = Recorded(lambda x: (calls.append(x), x + 1)[1:], "adding")
    assert [work(torch.tensor(i))[0].item() for i in range(3)] == [1, 2, 3] and len(calls) == 3


class OnGpu:
    """As much of a tensor on a GPU as is looked at."""

    device, dtype = torch.device("cuda"), None

    def __init__(self, size):
        self.shape = (size,)


@pytest.mark.parametrize(("full", "sizes"), [("recording", (1, 1, 1)), (3, (1, 1, 2, 2))])
def test_recordings_are_given_up_where_memory_is_exceeded(full, sizes, monkeypatch, capsys):
    """While one is made, or by the first work of another shape beside those that are there."""
    calls = []

    def work(x):
        calls.append(x)
        if len(calls) == full:
            raise torch.OutOfMemoryError
        return (x.shape,)

    def recording(function, inputs, pool):
        if full == "recording":
            raise torch.OutOfMemoryError
        return function

    monkeypatch.setattr(graphs, "Recording", recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    recorded = Recorded(work, "adding")
    assert [recorded(OnGpu(size))[0] for size in sizes] == [(size,) for size in sizes]
    assert recorded.given_up and not recorded.ways
    assert capsys.readouterr().out.count("adding: without CUDA graphs from here on") == 1


def test_where_nothing_is_recorded_want_of_memory_is_the_callers(capsys):
    def work(x):
        raise torch.OutOfMemoryError

    recorded = Recorded(work, "adding")
    with pytest.raises(torch.OutOfMemoryError):
        recorded(OnGpu(1))
    assert not recorded.given_up and not capsys.readouterr().out


@needs_gpu
def test_a_recording_gives_what_the_function_gives():
    calls = []

    def work(x, y):
        calls.append(x.shape)
        return (x @ y).relu(), x.sum()

    recorded = Recorded(work, "multiplying")
    for size in (3, 5, 3, 5, 3, 5):
        x, y = torch.randn(size, 4, device="cuda"), torch.randn(4, 2, device="cuda")
        product, total = recorded(x, y)
        assert torch.allclose(product, (x @ y).relu()) and torch.allclose(total, x.sum())
    assert len(calls) == 2 * 3  # each once as it is, once before and once while it is recorded


@needs_gpu
def test_what_cannot_be_recorded_is_called_as_it_is(capsys):
    recorded = Recorded(lambda x: (x * x.max().item(),), "looking")
    for _ in range(3):
        assert recorded(torch.ones(2, device="cuda"))[0].tolist() == [1, 1]
    assert "looking: without a CUDA graph" in capsys.readouterr().out
