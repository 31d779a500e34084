import published_llava
import torch
from transformers import AutoProcessor, PreTrainedTokenizerFast

from derm_compress.data import dialogue
from derm_compress.evaluate import answers
from derm_compress.files import Journal
from derm_compress.model import prompts
from derm_compress.model.generation import generate

HOW = {"batch_size": 5, "max_new_tokens": 4}


def test_the_prompt_has_the_image_first_and_asks_the_papers_question(pico):
    assert (
        prompts.prompt(pico[1], "name")
        == "USER: <image>\nWhat is the name of the disease? ASSISTANT:"
    )


def test_inputs_expand_the_image_and_pad_on_the_left(pico, dataset):
    model, processor = pico
    texts = [prompts.prompt(processor, kind) for kind in ("name", "features")]
    inputs = prompts.prepare(processor, texts, dataset.images[:2], "cpu")
    assert (inputs["input_ids"] == model.config.image_token_index).sum(1).tolist() == [36, 36]
    mask = inputs["attention_mask"]
    assert (mask[:, -1] == 1).all() and (mask.diff(dim=1) >= 0).all() and (mask == 0).any()


def test_greedy_answers_equal_the_argmax_of_uncached_forwards(pico, dataset):
    model, processor = pico
    inputs = prompts.prepare(
        processor, [prompts.prompt(processor, "name")], dataset.images[:1], "cpu"
    )
    ids = inputs["input_ids"]
    with torch.inference_mode():
        for _ in range(4):
            held = {"pixel_values": inputs["pixel_values"], "attention_mask": torch.ones_like(ids)}
            ids = torch.cat([ids, model(input_ids=ids, **held).logits[:, -1:].argmax(-1)], 1)
    text = processor.tokenizer.decode(
        ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert generate(model, processor, inputs, max_new_tokens=4)[0] == [text.strip()]


def test_end_of_sequence_counts_and_ends_an_answer(pico, dataset):
    model, processor = pico
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[processor.tokenizer.eos_token_id] = 1.0
        model.model.language_model.norm.weight.zero_()
    inputs = prompts.prepare(
        processor, [prompts.prompt(processor, "name")], dataset.images[:1], "cpu"
    )
    # all logits are equal now, and the first of them is <unk>: the answer runs away
    assert generate(model, processor, inputs, max_new_tokens=3)[1:] == ([3], [False])
    processor.tokenizer.eos_token = "<unk>"
    assert generate(model, processor, inputs, max_new_tokens=3)[1:] == ([1], [True])


def test_answers_are_one_row_each_and_resume_from_the_journal(pico, dataset, tmp_path):
    model, processor = pico
    items = dataset.of("test")[:3]
    journal = Journal(tmp_path / "log.jsonl")
    whole = answers.answer(
        model, processor, items, dataset.images, variant="v", journal=journal, **HOW
    )
    assert len(whole) == 9
    lines = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join(lines[:5]) + lines[5][:20])  # killed while it wrote
    again = Journal(tmp_path / "log.jsonl")
    assert len(again.done) == 5
    resumed = answers.answer(
        model, processor, items, dataset.images, variant="v", journal=again, **HOW
    )
    assert resumed.equals(whole)


def test_calibration_reads_prompts_with_their_reference(pico, dataset):
    _, processor = pico
    (batch,) = prompts.calibration_batches(
        processor, dataset.of("train")[:1], dataset.images, batch_size=3, device="cpu"
    )
    texts = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert len(texts) == 3 and all(t.rstrip().endswith(".") for t in texts)


def test_answers_weigh_more_by_a_llama_tokenizer_too(dataset, tmp_path):
    published_llava.write_processor(tmp_path, size=72)
    processor, items = AutoProcessor.from_pretrained(tmp_path), dataset.of("train")[:2]
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=published_llava.tokenizer(), pad_token="<pad>"
    )
    (batch,) = prompts.calibration_batches(
        processor, items, dataset.images, batch_size=6, device="cpu", answer_weight=4.0
    )
    asked = [
        dialogue.reference(item.disease, item.facts, kind)
        for item in items
        for kind in dialogue.QUESTIONS
    ]
    for row, weights, told in zip(batch["input_ids"], batch["token_weights"], asked, strict=True):
        assert processor.tokenizer.decode(row[weights == 4]).strip() == told
        assert processor.tokenizer.decode(row[weights == 1]).endswith("ASSISTANT:")
