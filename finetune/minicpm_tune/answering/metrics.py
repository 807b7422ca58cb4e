"""How well an answer matches the expected one: exact match, ANLS, ROUGE-L.

Every metric gives one answer a number from 0 to 1; a data set gets their mean.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

ANLS_THRESHOLD = 0.5
# What a model thought before its answer (V-4.5 and later); the opening tag may be part of the prompt.
_THOUGHTS = re.compile(r"\A.*</think>\s*", re.DOTALL)
# Scripts without spaces between words: every character is a word. Else a run of letters and digits is one.
_WORDS = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\U00020000-\U0003134f]|"
    "[^\\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\U00020000-\U0003134f]+"
)


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


METRICS = {"exact_match": exact_match, "anls": anls, "rouge_l": rouge_l}


def score(prediction: str, answer: str) -> dict[str, float]:
    """Every metric of one answer, its thinking left out on both sides."""
    pair = without_thoughts(prediction), without_thoughts(answer)
    return {name: metric(*pair) for name, metric in METRICS.items()}


def mean_scores(scores: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every metric; nothing when there are no scores."""
    rows = list(scores)
    return {name: sum(row[name] for row in rows) / len(rows) for name in METRICS} if rows else {}


def words(text: str) -> list[str]:
    """A text's words in lower case, punctuation left out.

    Example:
        >>> words("Two cats, 两只猫!")
        ['two', 'cats', '两', '只', '猫']
    """
    return _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())


def edit_distance(first: str, second: str) -> int:
    """Fewest insertions, deletions and replacements of characters that turn one text into the other."""
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


def _plain(text: str) -> str:
    return " ".join(text.split())
