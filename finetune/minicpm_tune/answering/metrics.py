"""How well an answer matches the expected one: exact match, ANLS, ROUGE-L, overlap of boxes, WER and CER of speech.

Those of texts and boxes give one answer a number, and a data set their mean over the answers that have it; but for
``box_count_error`` it is from 0 to 1. An error rate of a data set is the number of edits in all answers by the number
of words (WER) or characters (CER) in all expected ones, so a long answer weighs more than a short one; it can be
above 1.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from minicpm_tune.data.grounding import NamedBox, intersection_over_union, read_boxes

ANLS_THRESHOLD = 0.5
BOX_THRESHOLD = 0.5  # of intersection over union; the usual one
# What a model thought before its answer (V-4.5 and later); the opening tag may be part of the prompt.
_THOUGHTS = re.compile(r"\A.*</think>\s*", re.DOTALL)
# Scripts without spaces between words: every character is a word. Else a run of letters and digits is one.
_SCRIPTS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\U00020000-\U0003134f"
_SPACELESS = re.compile(f"[{_SCRIPTS}]")
_WORDS = re.compile(f"[{_SCRIPTS}]|[^\\W_{_SCRIPTS}]+")


def without_thoughts(text: str) -> str:
    """The answer alone, without the model's thinking in front of it.

    Example:
        >>> without_thoughts("<think>Two? Three.</think> Three.")
        'Three.'
    """
    return _THOUGHTS.sub("", text)


def exact_match(prediction: str, answer: str) -> float:
    """1 when the two texts differ in white space at most, else 0.

    Example:
        >>> exact_match(" two  cats", "two cats"), exact_match("Two cats", "two cats")
        (1.0, 0.0)
    """
    return float(_plain(prediction) == _plain(answer))


def anls(prediction: str, answer: str) -> float:
    """Average normalized Levenshtein similarity (ANLS) of one answer: small slips cost little, larger ones all.

    1 - edits / length of the longer text, or 0 when that is below one half; case does not count.

    Source: "Scene Text Visual Question Answering" (arXiv:1905.13648), section 4, threshold 0.5.

    Example:
        >>> anls("Tow cats", "two cats"), anls("dog", "two cats")
        (0.75, 0.0)
    """
    first, second = _plain(prediction).casefold(), _plain(answer).casefold()
    longer = max(len(first), len(second))
    similarity = 1.0 if longer == 0 else 1 - edit_distance(first, second) / longer
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def rouge_l(prediction: str, answer: str) -> float:
    """F1 of the longest common subsequence of words; a Chinese, Japanese or Thai character is a word.

    Source: "ROUGE: A Package for Automatic Evaluation of Summaries" (Lin, 2004), section 3, with precision
    and recall weighed alike; without stemming.

    Example:
        >>> round(rouge_l("the cat sat", "the cat sat down"), 3)
        0.857
    """
    first, second = words(prediction), words(answer)
    if not first or not second:
        return float(first == second)
    common = _common_subsequence(first, second)
    return 2 * common / (len(first) + len(second))


def spoken_words(text: str) -> list[str]:
    """What the word error rate counts: words in lower case, without punctuation.

    Unicode's compatible forms are one (NFKC), punctuation and symbols stand for a space, but an apostrophe inside a
    word stays. A Chinese, Japanese or Thai character is a word, so for these languages the rate is that of characters.

    Example:
        >>> spoken_words("Don't, he said: 三只猫!")
        ["don't", 'he', 'said', '三', '只', '猫']
    """
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    kept = "".join(letter if letter == "'" or _is_spoken(letter) else " " for letter in plain)
    runs = (word.strip("'") for word in _SPACELESS.sub(r" \g<0> ", kept).split())
    return [word for word in runs if word]


def spoken_characters(text: str) -> list[str]:
    """What the character error rate counts: the characters of ``spoken_words``, spaces left out.

    Example:
        >>> "".join(spoken_characters("Two cats."))
        'twocats'
    """
    return list("".join(spoken_words(text)))


METRICS = {"exact_match": exact_match, "anls": anls, "rouge_l": rouge_l}
BOX_METRICS = ("iou_50", "mean_iou", "box_count_error")
ERROR_RATES = {"wer": spoken_words, "cer": spoken_characters}


def score(prediction: str, answer: str, names: Collection[str] = tuple(METRICS)) -> dict[str, float]:
    """The metrics of one answer, its thinking left out on both sides."""
    pair = without_thoughts(prediction), without_thoughts(answer)
    return {name: metric(*pair) for name, metric in METRICS.items() if name in names}


def box_scores(
    prediction: str, answer: str, names: Collection[str] = BOX_METRICS, *, form: str = "tags"
) -> dict[str, float]:
    """How well the boxes of an answer match the expected ones; nothing where none are expected.

    ``iou_50`` is the share of expected boxes whose partner overlaps them by at least one half (intersection over
    union), ``mean_iou`` the mean overlap of the expected boxes, 0 for one without a partner. Partners are found
    greedily: the pair with the largest overlap first, each box once, a named box only with one of that name or
    without any. ``box_count_error`` is how many boxes or points there are too many or too few.

    Args:
        prediction: The model's answer.
        answer: The expected answer.
        names: Which of them to give.
        form: ``Generation.box_form``.

    Example:
        >>> box_scores("<box>0 0 10 10</box>", "<box>0 0 10 10</box><box>20 20 30 30</box>")
        {'iou_50': 0.5, 'mean_iou': 0.5, 'box_count_error': 1.0}
    """
    texts = without_thoughts(prediction), without_thoughts(answer)
    found, expected = (read_boxes(text, form) for text in texts)
    if not expected:
        return {}
    areas, others = ([box for box in each if len(box.values) == 4] for each in (expected, found))
    scores = {"box_count_error": float(abs(len(found) - len(expected)))}
    if areas:
        overlaps = _greedy_overlaps(areas, others)
        hits = sum(overlap >= BOX_THRESHOLD for overlap in overlaps)
        scores |= {"iou_50": hits / len(areas), "mean_iou": sum(overlaps) / len(areas)}
    return {name: scores[name] for name in BOX_METRICS if name in scores and name in names}


def _greedy_overlaps(expected: Sequence[NamedBox], found: Sequence[NamedBox]) -> list[float]:
    """The overlaps of expected boxes with their partners; those without a partner have none."""
    pairs = [
        (intersection_over_union(first.values, second.values), one, other)
        for one, first in enumerate(expected)
        for other, second in enumerate(found)
        if first.name == second.name or not (first.name and second.name)
    ]
    overlaps: list[float] = []
    used: set[tuple[int, int]] = set()
    for overlap, one, other in sorted(pairs, reverse=True):
        if overlap > 0 and not {(0, one), (1, other)} & used:
            used |= {(0, one), (1, other)}
            overlaps.append(overlap)
    return overlaps


def count_edits(
    prediction: str, answer: str, names: Collection[str] = tuple(ERROR_RATES)
) -> dict[str, tuple[int, int]]:
    """For each error rate the edits of one answer, and the length of the expected one; thinking left out.

    Example:
        >>> count_edits("two cat", "Two cats.")
        {'wer': (1, 2), 'cer': (1, 7)}
    """
    pair = without_thoughts(prediction), without_thoughts(answer)
    cut = {name: tuple(map(units, pair)) for name, units in ERROR_RATES.items() if name in names}
    return {name: (edit_distance(given, expected), len(expected)) for name, (given, expected) in cut.items()}


def corpus_scores(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The scores of a data set.

    Args:
        lines: Its answers: of each ``scores``, the metrics by name, and where it is speech ``edits``, see
            ``count_edits``. Either may be missing or None.

    Returns:
        Of every metric the mean, and of every error rate all edits by all lengths. What no answer has is left out.
    """
    rows = list(lines)
    found = {}
    for name in (*METRICS, *BOX_METRICS):
        values = [row["scores"][name] for row in rows if name in (row.get("scores") or ())]
        if values:
            found[name] = sum(values) / len(values)
    for name in ERROR_RATES:
        counts = [row["edits"][name] for row in rows if name in (row.get("edits") or ())]
        length = sum(length for _, length in counts)
        if length:
            found[name] = sum(edits for edits, _ in counts) / length
    return found


def words(text: str) -> list[str]:
    """A text's words in lower case, punctuation left out.

    Example:
        >>> words("Two cats, 两只猫!")
        ['two', 'cats', '两', '只', '猫']
    """
    return _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Fewest insertions, deletions and replacements that turn one text, or list of words, into the other."""
    row = list(range(len(second) + 1))
    for index, character in enumerate(first, start=1):
        before, row[0] = row[0], index
        for place, other in enumerate(second, start=1):
            cost = min(row[place] + 1, row[place - 1] + 1, before + (character != other))
            before, row[place] = row[place], cost
    return row[-1]


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, start=1):
            length = before + 1 if word == other else max(row[place], row[place - 1])
            before, row[place] = row[place], length
    return row[-1]


def _is_spoken(letter: str) -> bool:
    """Whether a character is neither punctuation nor a symbol, by its Unicode category."""
    return unicodedata.category(letter)[0] not in "PSC"


def _plain(text: str) -> str:
    return " ".join(text.split())
