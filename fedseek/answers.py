"""Answers: how close a text that a model wrote is to the one that was wanted.

Exact match and F1 are those of SQuAD v1.1 (P. Rajpurkar et al., "SQuAD: 100,000+ questions for machine comprehension of
text", EMNLP 2016, section 6.1, and the evaluation script that goes with it); ROUGE-L is C.-Y. Lin, "ROUGE: a package for
automatic evaluation of summaries", 2004, section 3.1. All three look at texts after SQuAD's normalisation.

SQuAD is English. Of other scripts: punctuation is what Unicode calls so besides ASCII's; and since Chinese and Japanese
put no blanks between words, a Han character or a kana is a token by itself.

>>> score_answer("The balance is low.", "balance is LOW")
AnswerScores(exact=1.0, f1=1.0, rouge_l=1.0)
>>> score_answer("low is the balance", "the balance is low").rouge_l  # the same words in another order
0.3333333333333333
>>> answer_tokens("北岸银行,账户 A-12")
['北', '岸', '银', '行', '账', '户', 'a12']
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
# kana, Han (with its extensions and compatibility forms): scripts that are written without blanks
_ALONE: Final = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """Of one answer, or the sums over several: each 0 to 1 an answer.

    Attributes:
        exact: 1 where the normalised texts are equal, else 0.
        f1: harmonic mean of precision and recall of the tokens, in any order.
        rouge_l: the same of the longest common subsequence of tokens.
    """

    exact: float
    f1: float
    rouge_l: float


def score_answer(answer: str, reference: str) -> AnswerScores:
    """Compare an answer with the one reference there is; each score is symmetric, and 1 for equal texts.

    Of two texts without a token both scores are 1, of one such and another 0, as in SQuAD.
    """
    got, wanted = answer_tokens(answer), answer_tokens(reference)
    common = sum((Counter(got) & Counter(wanted)).values())
    return AnswerScores(
        exact=float(normalise(answer) == normalise(reference)),
        f1=_f_measure(common, len(got), len(wanted)),
        rouge_l=_f_measure(_longest_common(got, wanted), len(got), len(wanted)),
    )


def normalise(text: str) -> str:
    """Lower case, without punctuation, English articles and needless blanks; in SQuAD's order.

    >>> normalise("An  answer: 'The U.S.A.'!")
    'answer usa'
    """
    lower = "".join(char for char in text.lower() if not _is_punctuation(char))
    return " ".join(_ARTICLES.sub(" ", lower).split())


def answer_tokens(text: str) -> list[str]:
    """The words of the normalised text, and each Han character or kana by itself."""
    return _ALONE.sub(r" \1 ", normalise(text)).split()


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")


def _f_measure(common: int, got: int, wanted: int) -> float:
    """2 P R / (P + R) with P = common / got and R = common / wanted."""
    return 2 * common / (got + wanted) if got + wanted else 1.0


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, by the classic table, of which one row is kept."""
    row = [0] * (len(second) + 1)
    for one in first:
        diagonal = 0
        for place, other in enumerate(second, start=1):
            above = row[place]
            row[place] = diagonal + 1 if one == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]
