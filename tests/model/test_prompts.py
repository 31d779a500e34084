"""What a model is asked, what it answers greedily, and what calibration reads."""

import published_llava
import torch
from asking import inputs_of
from transformers import AutoProcessor, PreTrainedTokenizerFast

from derm_compress.data import dialogue
from derm_compress.evaluate import answers
from derm_compress.files import Journal
from derm_compress.model import prompts
from derm_compress.model.generation import generate


def test_inputs_expand_the_image_and_pad_on_the_left(pico, dataset):
    model, processor = pico
    asked = prompts.prompt(processor, "name")
    assert asked == "USER: <image>\nWhat is the name of the disease? ASSISTANT:"
    inputs = inputs_of(processor, dataset)
    assert (inputs["input_ids"] == model.config.image_token_index).sum(1).tolist() == [36, 36]
    mask = inputs["attention_mask"]
    assert (mask[:, -1] == 1).all() and (mask.diff(dim=1) >= 0).all() and (mask == 0).any()


def test_greedy_answers_equal_the_argmax_of_uncached_forwards(pico, dataset):
    model, processor = pico
    inputs = inputs_of(processor, dataset, 1)
    ids = inputs["input_ids"]
    start = ids.shape[1]
    with torch.inference_mode():
        for _ in range(4):
            held = {"pixel_values": inputs["pixel_values"], "attention_mask": torch.ones_like(ids)}
            ids = torch.cat([ids, model(input_ids=ids, **held).logits[:, -1:].argmax(-1)], 1)
    text = processor.tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert generate(model, processor, inputs, max_new_tokens=4)[0] == [text.strip()]


def test_end_of_sequence_counts_and_ends_an_answer(pico, dataset):
    model, processor = pico
    with torch.no_grad():
        model.model.language_model.norm.weight.zero_()
    inputs = inputs_of(processor, dataset, 1)
    # all logits are equal now, and the first of them is <unk>: the answer runs away
    assert generate(model, processor, inputs, max_new_tokens=3)[1:] == ([3], [False])
    processor.tokenizer.eos_token = "<unk>"
    assert generate(model, processor, inputs, max_new_tokens=3)[1:] == ([1], [True])


def test_answers_are_one_row_each_and_resume_from_the_journal(pico, dataset, tmp_path):
    log = tmp_path / "log.jsonl"

    def answered(journal):
        how = {"variant": "v", "batch_size": 5, "max_new_tokens": 4, "journal": journal}
        return answers.answer(*pico, dataset.of("test")[:3], dataset.images, **how)

    whole = answered(Journal(log))
    assert len(whole) == 9
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:5]) + lines[5][:20])  # killed while it wrote
    again = Journal(log)
    assert len(again.done) == 5 and answered(again).equals(whole)


def test_calibration_reads_prompts_with_their_reference(pico, dataset):
    how = {"batch_size": 3, "device": "cpu"}
    items, tokenizer = dataset.of("train")[:1], pico[1].tokenizer
    (batch,) = prompts.calibration_batches(pico[1], items, dataset.images, **how)
    texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert len(texts) == 3 and all(t.rstrip().endswith(".") for t in texts)


def test_answers_weigh_more_by_a_llama_tokenizer_too(dataset, tmp_path):
    published_llava.write_processor(tmp_path, size=72)
    processor, items = AutoProcessor.from_pretrained(tmp_path), dataset.of("train")[:2]
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=published_llava.tokenizer(), pad_token="<pad>", eos_token="</s>"
    )
    how = {"batch_size": 6, "device": "cpu", "answer_weight": 4.0}
    (batch,) = prompts.calibration_batches(processor, items, dataset.images, **how)
    told = [dialogue.reference(i.disease, i.facts, k) for i in items for k in dialogue.QUESTIONS]
    for row, weights, answer in zip(batch["input_ids"], batch["token_weights"], told, strict=True):
        assert processor.tokenizer.decode(row[weights == 4]).strip() == answer
        assert processor.tokenizer.decode(row[weights == 1]).endswith("ASSISTANT:")
