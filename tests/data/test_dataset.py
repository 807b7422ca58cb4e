"""SupervisedDataset: rows as samples, bad rows, and the check before training."""

import json

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dataset import SupervisedDataset, data_collator
from minicpm_tune.data.bad_rows import BadRowLog
from minicpm_tune.data.row_check import check_rows
from minicpm_tune.errors import DataError
from minicpm_tune.settings.data_arguments import DataArguments
from support.golden_checkpoints import processing, supervised_text
from support.paths import IMAGES
from support.rows import BAD_ROWS, WIDE, chat, good, write_rows


def data(tmp_path, rows, name="v2_6", **options):
    return SupervisedDataset(write_rows(tmp_path, rows), processing(name, **options))


def test_a_sample_knows_its_row(tmp_path):
    rows = data(tmp_path, [good(0), good(1)])
    assert rows[1]["origin"] == (0, 1)
    assert supervised_text(rows[1], rows.processing.tokenizer) == "Answer 1.<|im_end|>"
    assert rows[1]["pixel_values"].dtype == torch.uint8
    assert (len(rows), rows.mixture.row_count, rows.mixture.epoch_order(seed=0, epoch=0, shuffle=False)) == (
        2,
        2,
        [0, 1],
    )


def test_images_are_found_beside_the_data_file_or_in_the_image_folder(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    assert len(data(tmp_path, [good(image="a.png")])[0]["tgt_sizes"]) == 1
    (tmp_path / "sub").mkdir()
    rows = data(tmp_path / "sub", [good(image="a.png")], image_folder=str(tmp_path))
    assert len(rows[0]["tgt_sizes"]) == 1


# --- the check ---


def test_the_check_names_file_row_id_and_remedy_of_every_bad_row(tmp_path):
    rows = data(tmp_path, BAD_ROWS, model_max_length=512)
    with pytest.raises(DataError) as caught:
        check_rows(rows)
    lines = str(caught.value).splitlines()
    assert lines[0] == "5 of 6 rows can't be used:"
    file = tmp_path / "train.json"
    assert lines[1].startswith(f"  {file}: row 1 (id 'roles'): turn 0 has role 'cat', expected 'user'")
    assert lines[2].startswith(f"  {file}: row 2 (id 'good-2'): image 'missing.png' not found")
    assert lines[3].startswith(f"  {file}: row 3 (id 'many'): turn 0 mentions <image_07>")
    assert lines[4].startswith(f"  {file}: row 4: turn 1 contains '<|im_end|>'")
    assert lines[5].startswith(
        f"  {file}: row 5 (id 'long'): none of the 512 tokens that --model_max_length 512"
    )
    assert (
        lines[6]
        == "Fix them (finetune/inspect_data.py lists all), or pass --on_bad_row skip to leave them out."
    )


def test_the_check_shows_twenty_problems_and_the_total(tmp_path):
    rows = data(tmp_path, [{"id": number} for number in range(25)])
    with pytest.raises(DataError) as caught:
        check_rows(rows)
    lines = str(caught.value).splitlines()
    assert lines[0] == "25 of 25 rows can't be used:"
    assert len(lines) == 1 + 20 + 2
    assert lines[21] == "  ... and 5 more"


def test_several_processes_find_the_same(tmp_path):
    rows = data(tmp_path, BAD_ROWS * 8, model_max_length=512, on_bad_row="skip")
    assert check_rows(rows, workers=2).tolist() == check_rows(rows, workers=0).tolist()


def test_lengths_are_those_of_the_samples(tmp_path):
    rows = data(tmp_path, [good(0), good(1, WIDE), BAD_ROWS[1]], on_bad_row="skip")
    assert check_rows(rows).tolist() == [len(rows[index]["input_ids"]) for index in range(3)]


def test_a_damaged_image_is_found_by_decoding_when_there_are_few_rows(tmp_path):
    whole = (IMAGES / "wide.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    rows = [good(0), good(1, "half.png")]
    with pytest.raises(DataError, match=r"row 1 .*half.png' can't be decoded"):
        check_rows(data(tmp_path, rows))
    check_rows(data(tmp_path, rows, check_images="header"))


# --- bad rows in training ---


def test_an_image_that_became_unreadable_contributes_nothing_and_is_listed(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    rows = data(tmp_path, [good(0), good(1, "a.png"), good(2)])
    check_rows(rows)
    rows.bad_rows = BadRowLog(tmp_path / "out" / "bad_rows.jsonl")
    (tmp_path / "a.png").unlink()
    for _ in range(2):  # met in two epochs, listed once
        batch = data_collator([rows[index] for index in range(3)])
    assert batch["provenance"].rows == [(0, 0), None, (0, 2)]
    assert (batch["labels"][1] == -100).all()
    assert (batch["labels"][0] != -100).any()
    assert len(batch["tgt_sizes"]) == 2
    assert len((tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()) == 1
    [listed] = rows.bad_rows.read()
    assert (listed["file"], listed["row"], listed["id"]) == (str(tmp_path / "train.json"), 1, "good-1")
    assert listed["kind"] == "missing image"
    assert "not found" in listed["reason"]
    assert rows.bad_rows.summary().startswith("bad rows: 1 contributed nothing (1 missing image); listed in")


def test_another_bad_row_met_in_training_stops_it_unless_skipped(tmp_path):
    with pytest.raises(DataError, match=r"row 1 \(id 'roles'\): turn 0 has role 'cat'"):
        data(tmp_path, BAD_ROWS)[1]
    rows = data(tmp_path, BAD_ROWS, on_bad_row="skip")
    assert rows[1]["origin"] is None
    assert not (rows[1]["labels"] != -100).any()


def test_rows_that_the_check_left_out_are_never_opened_again(tmp_path):
    rows = data(tmp_path, BAD_ROWS, on_bad_row="skip", model_max_length=512)
    rows.bad_rows = BadRowLog(tmp_path / "bad_rows.jsonl")
    check_rows(rows)
    assert [entry["row"] for entry in rows.bad_rows.read()] == [1, 2, 3, 4, 5]
    rows.parse = lambda _: pytest.fail("opened")
    assert all(rows[index]["origin"] is None for index in range(1, 6))


def test_dropped_rows_are_counted_even_when_bad_rows_are_errors(tmp_path):
    rows = data(tmp_path, [good(0), BAD_ROWS[5]], model_max_length=512, overlength="drop")
    rows.bad_rows = BadRowLog(tmp_path / "bad_rows.jsonl")
    check_rows(rows)
    assert rows[1]["origin"] is None
    assert [entry["kind"] for entry in rows.bad_rows.read()] == ["over-long"]


def test_a_data_set_with_no_usable_row_is_refused_even_when_skipping(tmp_path):
    with pytest.raises(DataError, match="No row is left to train on"):
        check_rows(data(tmp_path, BAD_ROWS[1:2], on_bad_row="skip"))


def test_workers_share_one_list_of_bad_rows(tmp_path):
    rows = data(tmp_path, [good(number, "gone.png") for number in range(12)] + [good(12)], on_bad_row="skip")
    rows.bad_rows = BadRowLog(tmp_path / "bad_rows.jsonl")
    loader = DataLoader(rows, batch_size=3, num_workers=2, collate_fn=data_collator)
    batches = list(loader)
    assert [row for batch in batches for row in batch["provenance"].rows] == [None] * 12 + [(0, 12)]
    assert sorted(entry["row"] for entry in rows.bad_rows.read()) == list(range(12))


def test_no_bad_rows_are_said_too(tmp_path):
    assert BadRowLog(tmp_path / "none.jsonl").summary() == "bad rows: none"


@pytest.mark.parametrize("name", ["overlength", "on_bad_row", "exif_orientation", "check_images"])
def test_unknown_choices_are_refused(name):
    with pytest.raises(DataError, match=f"--{name}: found 'sometimes', expected one of"):
        DataArguments(**{name: "sometimes"})


def test_videos_are_refused_where_the_model_knows_none(tmp_path):
    row = {"video": ["a.png"], "conversations": chat("What?", "x")}
    with pytest.raises(DataError, match=r"expected images: MiniCPM-V 2\.0 was not trained on video"):
        check_rows(data(tmp_path, [row], "v2"))


# --- batches ---


@pytest.mark.parametrize("name", ["v2", "v2_6", "v4_5", "v4_7"])
def test_a_batch_holds_every_sample_and_nothing_else(name, tmp_path):
    rows = data(tmp_path, [good(0, WIDE), {"conversations": chat("Hi", "Yes, of course.")}, good(2)], name)
    samples = [rows[index] for index in range(3)] + [rows.processing.padding_sample()]
    batch = data_collator(samples, pad_token_id=7)
    width = batch["input_ids"].shape[1]
    slices = runs = columns = 0
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        for key, fill in (("input_ids", 7), ("labels", -100), ("mm_token_type_ids", 0)):
            if key in sample:
                assert batch[key][row, :length].tolist() == sample[key].tolist()
                assert (batch[key][row, length:] == fill).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (width - length)
        bound = batch["image_bound"][runs : runs + len(sample["image_bound"])]
        assert (bound[:, 0] == row).all()
        assert bound[:, 1:].tolist() == sample["image_bound"].tolist()
        pixels = sample["pixel_values"]
        assert torch.equal(batch["pixel_values"][:, :, columns : columns + pixels.shape[2]], pixels)
        assert (
            batch["tgt_sizes"][slices : slices + len(sample["tgt_sizes"])].tolist()
            == sample["tgt_sizes"].tolist()
        )
        slices, runs, columns = (
            slices + len(sample["tgt_sizes"]),
            runs + len(bound),
            columns + pixels.shape[2],
        )
    assert (slices, columns) == (len(batch["tgt_sizes"]), batch["pixel_values"].shape[2])
    assert batch["provenance"].rows == [(0, 0), (0, 1), (0, 2), None]
    assert "temporal_ids" not in batch


def test_prompts_can_be_batched_without_labels():
    from minicpm_tune.data.row_parsing import parse_row

    turns = parse_row({"conversations": chat("Hi", "x")}).turns[:1]
    batch = data_collator([processing("v2_6").encode_prompt(turns, [])] * 2)
    assert "labels" not in batch
    assert "provenance" not in batch


def test_bad_row_lines_are_json(tmp_path):
    rows = data(tmp_path, BAD_ROWS, on_bad_row="skip", model_max_length=512)
    rows.bad_rows = BadRowLog(tmp_path / "bad_rows.jsonl")
    check_rows(rows)
    for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == {"file", "row", "id", "kind", "reason"}
