"""The metrics against values worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpm_tune.answering.metrics import (
    anls,
    box_scores,
    corpus_scores,
    count_edits,
    edit_distance,
    exact_match,
    rouge_l,
    score,
    without_thoughts,
    words,
)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("two", "two", (1, 1, 1)),
        (" two\n cats ", "two cats", (1, 1, 1)),
        ("Two", "two", (0, 1, 1)),  # case counts for the exact match alone
        ("twos", "two", (0, 0.75, 0)),
        ("tw", "four", (0, 0, 0)),  # 4 edits of 4
        ("abcd", "abxy", (0, 0.5, 0)),  # exactly the threshold
        ("abcde", "abxyz", (0, 0, 0)),  # 0.4 is below it
        ("", "", (1, 1, 1)),
        ("", "two", (0, 0, 0)),
        ("a red cat", "a cat, red", (0, 0, 2 / 3)),  # "a red" or "a cat" in order, 2 of 3 and 3 words
        ("两只猫", "三只猫", (0, 2 / 3, 2 / 3)),
    ],
)
def test_metrics_of_one_answer(prediction, answer, expected):
    found = exact_match(prediction, answer), anls(prediction, answer), rouge_l(prediction, answer)
    assert found == pytest.approx(expected)


def test_rouge_weighs_precision_and_recall_alike():
    # 3 words in common, precision 3/3, recall 3/5
    assert rouge_l("the cat sat", "the cat sat down there") == pytest.approx(2 * 1 * 0.6 / 1.6)


def test_words_fold_case_width_and_punctuation():
    assert words("\uff34wo, cats_and 3\u00b2 猫犬ナ!") == ["two", "cats", "and", "32", "猫", "犬", "ナ"]


def test_thoughts_do_not_count():
    assert score("<think>\nthree? no\n</think>\n\ntwo", "<think>hm</think>two") == {
        "exact_match": 1, "anls": 1, "rouge_l": 1,
    }  # fmt: skip
    assert without_thoughts("so it is </think> two") == "two"
    assert without_thoughts("two") == "two"


# Words and rates as jiwer 4.0.0 counts them on texts that are normalized by hand.
@pytest.mark.parametrize(
    ("prediction", "answer", "words", "characters"),
    [
        ("Two cats and a dog.", "two cats and one dog", (1, 5), (3, 16)),
        ("two cats", "two cats and one dog", (3, 5), (9, 16)),
        ("well two fat cats", "two cats", (2, 2), (7, 7)),
        ("", "two cats", (2, 2), (7, 7)),
        ("It\u2019s 5 o'clock", "it's five o'clock!", (1, 3), (4, 15)),
        ("两只狗。", "三只狗", (1, 3), (1, 3)),  # Chinese: both count characters
        ("我有 iPhone", "我有 iPad", (1, 3), (4, 6)),
        ("हिन्दी", "हिंदी", (1, 1), (2, 5)),  # vowel signs belong to their word
        ("<think>two?</think> three", "three", (0, 1), (0, 5)),
    ],
)
def test_error_rates_count_edits_of_words_and_of_characters(prediction, answer, words, characters):
    assert count_edits(prediction, answer) == {"wer": words, "cer": characters}


def test_means_are_over_rows_and_error_rates_over_all_words():
    rows = [
        {"scores": {"exact_match": 1, "anls": 1, "rouge_l": 0.5}, "edits": {"wer": (1, 1), "cer": [0, 4]}},
        {"scores": {"exact_match": 0, "anls": 0.5, "rouge_l": 0.5}, "edits": {"wer": (0, 9), "cer": [3, 8]}},
        {"scores": None},
        {"scores": {"exact_match": 1, "anls": 1, "rouge_l": 1}},  # a row without audio
    ]
    expected = {"exact_match": 2 / 3, "anls": 2.5 / 3, "rouge_l": 2 / 3, "wer": 0.1, "cer": 0.25}
    assert corpus_scores(rows) == pytest.approx(expected)
    assert corpus_scores([]) == {}
    assert (
        corpus_scores([{"scores": {}, "edits": {"wer": (0, 0)}}]) == {}
    )  # an answer without a word has no rate


@given(st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_edit_distance_is_the_fewest_edits(first, second):
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    assert edit_distance(first, second) == slow(first, second)


A, B = "<box>0 0 10 10</box>", "<box>20 20 30 30</box>"


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        (A, A, (1, 1, 0)),
        ("It is here.", A, (0, 0, 1)),
        (B + A, A + B, (1, 1, 0)),  # their order is of no matter
        (A + A, A + B, (0.5, 0.5, 0)),  # a box has one partner
        (A + B, A, (1, 1, 1)),
        ("<box>0 0 10 5</box>", A, (1, 0.5, 0)),  # exactly the threshold
        ("<box>0 0 10 4</box>", A, (0, 0.4, 0)),
        ("<box>10 0 0 10</box>", A, (0, 0, 0)),  # turned corners
        (f"<ref>cat</ref>{A}", f"<ref>dog</ref>{A}", (0, 0, 0)),
        (f"<ref>dog</ref>{A}", A, (1, 1, 0)),  # a name on one side only is of no matter
        (f"<think>{B}</think>{A}", A, (1, 1, 0)),
    ],
)
def test_metrics_of_boxes(prediction, answer, expected):
    found = box_scores(prediction, answer)
    assert (found["iou_50"], found["mean_iou"], found["box_count_error"]) == pytest.approx(expected)


def test_answers_without_boxes_have_no_metrics_of_boxes_and_points_have_a_count():
    assert "iou_50" not in box_scores(A, "two")
    assert box_scores("two", "<point>1 2</point>").get("box_count_error") == 1
    assert "iou_50" not in box_scores("two", "<point>1 2</point>")
    assert box_scores("at [0, 0, 10, 10]", "[0, 0, 10, 10]", form="brackets")["iou_50"] == 1
    lines = [
        {"scores": box_scores(A, A)},
        {"scores": box_scores("two", "two")},
        {"scores": box_scores("no", B)},
    ]
    assert corpus_scores(lines)["iou_50"] == 0.5
