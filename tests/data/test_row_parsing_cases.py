"""Rows as people write them, from other programs and by hand: each comes out right, or is refused with the reason."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from dataset import SupervisedDataset
from minicpm_tune.errors import RowError
from support.golden_checkpoints import processing, supervised_text

CASES = json.loads((Path(__file__).parent / "cases" / "rows.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    Image.new("RGB", (60, 40), "red").save(folder / "a.png")
    Image.new("RGB", (40, 60), "blue").save(folder / "b.png")
    return folder


def opened(folder, text, generation, *, as_list, **options):
    path = folder / ("rows.json" if as_list else "rows.jsonl")
    path.write_text(f"[{text}]" if as_list else f"{text}\n", encoding="utf-8")
    return SupervisedDataset(path, processing(generation, **options))


@pytest.mark.parametrize("case", [c for c in CASES["rows"] if "prompt" in c], ids=lambda case: case["case"])
def test_a_row_is_used_as_it_is_meant(folder, case):
    options = case.get("options", {})
    rows = opened(folder, json.dumps(case["row"]), case["generation"], as_list=False, **options)
    sample, tokenizer = rows[0], rows.processing.tokenizer
    assert tokenizer.decode(sample["input_ids"]).replace("<unk>", "") == case["prompt"]
    assert supervised_text(sample, tokenizer) == case["learned"]
    assert [source.value for source in rows.parse(0).sources] == case["media"]
    assert (sample["pixel_values"].shape[2] > 0) == bool(case["media"])


@pytest.mark.parametrize("case", [c for c in CASES["rows"] if "refused" in c], ids=lambda case: case["case"])
def test_a_row_that_would_mean_something_else_is_refused(folder, case):
    rows = opened(folder, json.dumps(case["row"]), case["generation"], as_list=False)
    with pytest.raises(RowError, match=case["refused"]):
        rows.plan(0)


@pytest.mark.parametrize("as_list", [False, True], ids=["jsonl", "json"])
@pytest.mark.parametrize("case", CASES["raw"], ids=lambda case: case["case"])
def test_odd_json_is_the_row_s_own_problem(folder, case, as_list):
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    text = f"{case['text']},{good}" if as_list else f"{case['text']}\n{good}"
    rows = opened(folder, text, "v2_6", as_list=as_list, on_bad_row="skip")
    with pytest.raises(RowError, match=case["refused"]) as caught:
        rows.plan(0)
    assert re.search(r"rows\.jsonl?: row 0: ", str(rows.describe(0, caught.value)))
    assert rows[0]["origin"] is None
    assert rows[1]["origin"] == (0, 1)
