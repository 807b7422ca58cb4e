"""The data side of InternLM-XComposer2: ids, labels, sizes and pixels against the released code's."""

import numpy as np
import pytest
import torch
from PIL import Image

from minicpm_tune.checkpoints.xcomposer2_geometry import tile_tokens
from minicpm_tune.data.row_parsing import parse_row
from minicpm_tune.data.slicing.xcomposer2 import TileRules
from minicpm_tune.data.turns import Media, Turn
from minicpm_tune.errors import DataError, RowError
from minicpm_tune.models.xcomposer2.vision import as_image, normalized
from support.golden_checkpoints import limited, processing
from support.rows import chat
from support.rows import turns_of as read_turns
from support.xcomposer2_cases import THREE, about, arrays, golden_images, rules, turns_of

END, NEWLINE, EOS = 574, 561, 2  # [UNUSED_TOKEN_145], "\n", </s> of the small tokenizer
PIXEL_TOLERANCE = 1e-6  # 0: the same uint8 values, normalized in fp32
# Cases in which the released training code writes what its own inference does not.
NOT_AS_INFERENCE = ("sys", "noph")
CASES = [(name, case) for name in THREE for case in about(name)["cases"] if case not in NOT_AS_INFERENCE]


def encoded(name, messages, images=()):
    return rules(name).encode(turns_of(messages), list(images))


@pytest.mark.parametrize(("name", "case"), CASES)
def test_ids_equal_the_released_ones(name, case):
    limit = about(name)["cases"][case]["max_length"]
    for number, row in enumerate(about(name)["cases"][case]["rows"]):
        sample = encoded(name, row["conversations"], golden_images(name, case, number))
        ids = sample["input_ids"].clone()
        for start, end in sample["image_bound"].tolist():
            ids[start:end] = -100
        read = arrays(name)
        real = read[f"{case}.{number}.attention_mask"] > 0
        assert ids[:limit].tolist() == read[f"{case}.{number}.input_ids"][real].tolist()


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_answers_and_their_end_are_supervised_and_nothing_else(name, case):
    for number, row in enumerate(about(name)["cases"][case]["rows"]):
        sample = encoded(name, row["conversations"], golden_images(name, case, number))
        learned = sample["labels"][sample["labels"] != -100]
        answers = [message["value"] for message in row["conversations"] if message["from"] == "assistant"]
        assert rules(name).tokenizer.decode(learned) == "".join(
            f"{text}[UNUSED_TOKEN_145]" for text in answers
        )
        released = arrays(name)[f"{case}.{number}.targets_untruncated"]
        if len(answers) == 1:  # with one answer the released labels add the line break and the text's end
            assert [*learned.tolist(), NEWLINE, EOS] == released[released != -100].tolist()


def test_a_system_turn_shifts_no_label():
    messages = about("xc2_7b")["cases"]["sys"]["rows"][0]["conversations"]
    sample = encoded("xc2_7b", messages)
    tokenizer = rules("xc2_7b").tokenizer
    assert tokenizer.decode(sample["labels"][sample["labels"] != -100]) == "I am a model.[UNUSED_TOKEN_145]"
    assert tokenizer.decode(sample["input_ids"]).startswith(
        "<s>[UNUSED_TOKEN_146]system\nYou are a helpful model.[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]user\n"
    )


@pytest.mark.parametrize("name", THREE)
def test_a_prompt_with_a_system_turn_is_the_released_chats_but_for_repeated_starts(name):
    asked = about(name)["chat"]
    (question, answer), *_ = asked["history"]
    turns = turns_of(
        [
            {"from": "system", "value": asked["meta_instruction"]},
            {"from": "user", "value": question},
            {"from": "assistant", "value": answer},
            {"from": "user", "value": asked["query"]},
        ]
    )
    sample = rules(name).encode_prompt(turns, golden_images(name, "chat"))
    [(start, end)] = sample["image_bound"].tolist()
    first, second = asked["part_ids"]
    assert sample["input_ids"][:start].tolist() == first
    assert sample["input_ids"][end:].tolist() == second[1:]  # without the <s> behind the image


@pytest.mark.parametrize("name", THREE)
def test_what_is_trained_stands_behind_the_prompt_of_inference(name):
    question = [Turn("user", ("What is it, ", Media("image", 0), " and ", Media("image", 1), "? "))]
    images = [Image.new("RGB", (90, 50), "red"), Image.new("RGB", (30, 80), "blue")]
    prompt = rules(name).encode_prompt(question, images)
    trained = rules(name).encode([*question, Turn("assistant", (" Two squares.",))], images)
    length = len(prompt["input_ids"])
    assert trained["input_ids"][:length].equal(prompt["input_ids"])
    assert (trained["labels"][:length] == -100).all()
    assert trained["labels"][length] != -100
    assert (trained["input_ids"] == 1).sum() == 1


def test_an_image_that_no_placeholder_mentions_goes_to_the_front_without_a_line_break():
    row = {"image": ["a.png"], "conversations": [
        {"from": "user", "value": "What is it?"}, {"from": "assistant", "value": "A cat."}]}  # fmt: skip
    end = processing("xc2_7b").generation.image_end
    assert parse_row(row, image_end=end).turns[0].parts == (Media("image", 0), "What is it?")


@pytest.mark.parametrize("text", ["a [UNUSED_TOKEN_145] b", "[UNUSED_TOKEN_146]user", "</s>"])
def test_turn_marks_in_a_text_are_refused(text):
    with pytest.raises(RowError, match="which the model reads as structure"):
        processing("xc2_7b").encode(read_turns(chat(text, "Yes.")), [])


def test_tiles_have_the_released_sizes():
    for width, height, limit, expected in about("xc2_4khd_7b")["hd_transform_sizes_w_h"]:
        layout = TileRules(24, max_slice_nums=limit).layout(width, height)
        assert [layout.refined.width, layout.refined.height] == expected, (width, height, limit)
        assert layout.count - 1 <= limit


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (3, 2000)])
def test_extreme_shapes_are_used(size):
    layout = TileRules(24, max_slice_nums=16).layout(*size)
    assert layout.count - 1 <= 16
    out = np.empty((3, 14, 14 * np.prod(layout.tgt_sizes[0])), dtype=np.uint8)
    for bands in layout.slices(Image.new("RGB", size)):
        assert bands[0].size == out.size // 3


@pytest.mark.parametrize(("size", "expected"), [((24, 24), 144 * 2 + 1 + 24), ((48, 72), 144 * 7 + 1 + 36)])
def test_tokens_of_tiles(size, expected):
    assert tile_tokens(size, 24) == expected


@pytest.mark.parametrize("size", [(1000, 900), (900, 1000), (1000, 400)])
def test_cuts_lie_in_the_image_where_the_edges_of_tiles_do(size):
    layout = TileRules(24, max_slice_nums=16).layout(*size)
    for axis, cuts in enumerate(layout.cuts):
        assert cuts
        for cut in cuts:
            image = np.full((size[1], size[0], 3), 200, np.uint8)
            before = (
                (slice(None), slice(round(cut * size[0]))) if axis == 0 else (slice(round(cut * size[1])),)
            )
            image[before] = 0
            [red, *_] = next(layout.slices(Image.fromarray(image)))
            line = red[red.shape[0] // 2] if axis == 0 else red[:, red.shape[1] // 2]
            edge = int(((line > 100) & (line < 250)).argmax())  # black, then gray, and white around them
            assert min(edge % 336, -edge % 336) <= 1, (cut, edge)


@pytest.mark.parametrize(("name", "case"), [pair for pair in CASES if "img" in pair[1]])
def test_pixels_equal_the_released_ones(name, case):
    images = golden_images(name, case)
    sample = encoded(name, about(name)["cases"][case]["rows"][0]["conversations"], images)
    start = 0
    for number, (rows, columns) in enumerate(sample["tgt_sizes"].tolist()):
        end = start + 14 * rows * columns
        strip = sample["pixel_values"][:, :, start:end]
        found = normalized(as_image(strip, rows, columns)[None], torch.float32)[0]
        expected = arrays(name)[f"{case}.0.pix{number}_sub"]
        assert list(found.shape) == about(name)["cases"][case]["rows"][0]["images"][number]["pixel_shape"]
        assert np.abs(found[:, ::24, ::24].numpy() - expected).max() < PIXEL_TOLERANCE
        start = end


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("xc2_7b", {"img_size": 490}, "--img_size: found 490, expected 224"),
        ("xc2_vl_7b", {"img_size": 224}, "--img_size: found 224, expected 490"),
        ("xc2_vl_7b", {"hd_num": 16}, "--hd_num: found 16, expected -1"),
        ("xc2_4khd_7b", {"hd_num": -1}, "--hd_num: found -1, expected at least 1"),
        ("v2_6", {"img_size": 490}, "--img_size: MiniCPM-V 2.6 has none"),
        ("v4_6", {"hd_num": 16}, "--hd_num: MiniCPM-V 4.6 has none.*--max_slice_nums"),
    ],
)
def test_sizes_that_contradict_the_checkpoint_are_refused(name, options, message):
    with pytest.raises(DataError, match=message):
        processing(name, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("xc2_7b", {"img_size": 224, "hd_num": -1, "max_slice_nums": 9}),
        ("xc2_vl_7b", {"img_size": 490, "hd_num": -1}),
        ("xc2_4khd_7b", {"img_size": 490, "hd_num": 16, "max_slice_nums": 9}),
    ],
)
def test_the_guides_values_fit_their_checkpoints(name, options):
    assert processing(name, **options).rules.max_slice_nums == (16 if name == "xc2_4khd_7b" else 1)


def test_a_long_row_uses_fewer_tiles():
    row = list(read_turns(chat("What?", "A cat.")))
    row[0] = Turn("user", (Media("image", 0), "What?"))
    rules = processing("xc2_4khd_7b", hd_num=9)
    sample = limited(rules, 1000, overlength="shrink_slices").encode(row, [Image.new("RGB", (900, 900))])
    assert len(sample["input_ids"]) <= 1000
    assert sample["tgt_sizes"].tolist() == [[48, 48]]


def test_a_row_whose_image_leaves_no_room_for_the_answer_is_refused_with_the_reason():
    row = list(read_turns(chat("What?", "A cat.")))
    row[0] = Turn("user", (Media("image", 0), "What?"))
    with pytest.raises(
        RowError, match="none of the 4 tokens that --model_max_length 200 leaves is supervised"
    ):
        limited(processing("xc2_7b"), 200).encode(row, [Image.new("RGB", (90, 90))])
