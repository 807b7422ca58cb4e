"""Every generation's samples against the released processors, token by token and byte by byte."""

import hashlib
import json

import pytest
from PIL import Image

from dataset import SupervisedDataset
from minicpm_tune.data.row_parsing import parse_row
from support.golden_checkpoints import WITH_GOLDENS, processing, supervised_text
from support.paths import GOLDENS, IMAGES
from support.rows import write_rows

TURN_END = {"v2_5": "<|eot_id|>"}


def golden_cases(name):
    return json.loads((GOLDENS / name / "processor.json").read_text(encoding="utf-8"))["cases"]


def as_official_row(case):
    """A golden's messages in the official form: images by numbered placeholders."""
    images, messages = {}, []
    for message in case["messages"]:
        content = message["content"]
        while "<image>" in content:
            key = f"<image_{len(images):02d}>"
            content = content.replace("<image>", key, 1)
            images[key] = str(IMAGES / f"{case['images'][len(images)]}.png")
        messages.append({"role": message["role"], "content": content})
    return {"id": "0", "image": images, "conversations": messages}


def pixel_hashes(sample):
    hashes, start = [], 0
    for rows, columns in sample["tgt_sizes"].tolist():
        end = start + 14 * rows * columns
        strip = sample["pixel_values"][:, :, start:end].contiguous()
        hashes.append(
            {"shape": list(strip.shape), "sha256": hashlib.sha256(strip.numpy().tobytes()).hexdigest()}
        )
        start = end
    assert start == sample["pixel_values"].shape[2]
    return hashes


ALL_CASES = [(name, case) for name in WITH_GOLDENS for case in golden_cases(name)]


@pytest.mark.parametrize(("name", "case_name"), ALL_CASES)
def test_samples_equal_the_released_processor(name, case_name, tmp_path):
    case = golden_cases(name)[case_name]
    prepared = processing(name)
    path = write_rows(tmp_path, [as_official_row(case)])
    sample = SupervisedDataset(path, prepared)[0]

    prompt = case["generation_ids"]
    assert sample["input_ids"][: len(prompt)].tolist() == prompt
    assert sample["tgt_sizes"].tolist() == case.get("tgt_sizes", case.get("target_sizes"))
    if "image_bound" in case:
        assert sample["image_bound"].tolist() == case["image_bound"]
    if "pixels" in case:
        expected_pixels = [{"shape": one["shape"], "sha256": one["sha256"]} for one in case["pixels"]]
        assert pixel_hashes(sample) == expected_pixels
    end = TURN_END.get(name, "<|im_end|>")
    answers = [message["content"] for message in case["messages"] if message["role"] == "assistant"]
    assert supervised_text(sample, prepared.tokenizer) == "".join(answer + end for answer in answers)


@pytest.mark.parametrize("name", [name for name in WITH_GOLDENS if name not in ("v4_6", "v4_7")])
def test_the_whole_conversation_equals_the_released_rendering(name, tmp_path):
    cases = golden_cases(name)
    dataset = SupervisedDataset(
        write_rows(tmp_path, [as_official_row(case) for case in cases.values()]), processing(name)
    )
    for index, case in enumerate(cases.values()):
        ids = dataset[index]["input_ids"].tolist()
        expected = case["input_ids"]
        if name == "v2_5":  # its template always appends the header of another answer
            assert len(expected) - len(ids) == 4
            expected = expected[: len(ids)]
        assert ids == expected


@pytest.mark.parametrize(("name", "case_name"), ALL_CASES)
def test_generation_prompts_equal_the_released_processor(name, case_name):
    case = golden_cases(name)[case_name]
    conversation = parse_row(as_official_row(case))
    images = [Image.open(source.value).convert("RGB") for source in conversation.sources]
    prompt = processing(name).encode_prompt(conversation.turns[:-1], images)
    assert prompt["input_ids"].tolist() == case["generation_ids"]
    assert "labels" not in prompt


def test_token_types_of_4_7_equal_the_released_processor(tmp_path):
    case = golden_cases("v4_7")["two_images"]
    sample = SupervisedDataset(write_rows(tmp_path, [as_official_row(case)]), processing("v4_7"))[0]
    length = len(case["generation_ids"]) - 6  # without the think block
    assert sample["mm_token_type_ids"][:length].tolist() == case["mm_token_type_ids"][:length]
    assert sample["mm_token_type_ids"].sum() == sum(case["mm_token_type_ids"])
