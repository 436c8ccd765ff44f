"""Scores of answers: by hand for English and Chinese, and what holds for any two texts."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedseek.answers import answer_tokens, normalise, score_answer

TEXTS = st.text(st.sampled_from("the an A bc 北岸 1.,-!\n'。"), max_size=24)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The  U.S. Dollar,  rose!", "us dollar rose"),
        ("an apple a day; theatre", "apple day theatre"),
        ("well-known", "wellknown"),  # as SQuAD's own script: punctuation goes first, and leaves no blank
        ("$5 (five)", "5 five"),
        ("「北岸」银行。", "北岸银行"),
        ("“quoted” — dash", "quoted dash"),
        ("the a an", ""),
        ("", ""),
    ],
)
def test_texts_are_normalised_as_in_squad(text, wanted):
    assert normalise(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("余额 1000 元", ["余", "额", "1000", "元"]),
        ("ABC银行DEF", ["abc", "银", "行", "def"]),
        ("サクラ 桜", ["サ", "ク", "ラ", "桜"]),
        ("계좌 잔액", ["계좌", "잔액"]),  # Korean has blanks between words
        ("𠀀𠀁", ["𠀀", "𠀁"]),  # beyond 16 bits
        ("the", []),
    ],
)
def test_a_han_character_or_kana_is_a_token(text, wanted):
    assert answer_tokens(text) == wanted


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "f1", "rouge_l"),
    [
        ("The balance is 42.", "balance is 42", 1, 1, 1),
        ("balance 42", "the balance is 42", 0, 2 * 2 / 5, 2 * 2 / 5),
        ("42 is balance", "balance is 42", 0, 1, 2 * 1 / 6),  # every word, in the reverse order
        ("a b c d e", "b x d", 0, 2 * 2 / 7, 2 * 2 / 7),  # the article a is gone
        ("yes yes yes", "yes", 0, 2 / 4, 2 / 4),  # a word counts as often as both have it
        ("胸痛三天", "胸痛二天", 0, 2 * 3 / 8, 2 * 3 / 8),
        ("", "", 1, 1, 1),
        ("the", "", 1, 1, 1),
        ("", "something", 0, 0, 0),
        ("no", "yes", 0, 0, 0),
    ],
)
def test_scores_by_hand(answer, reference, exact, f1, rouge_l):
    scores = score_answer(answer, reference)
    assert (scores.exact, scores.f1, scores.rouge_l) == pytest.approx((exact, f1, rouge_l))


def longest_by_trying(first, second):
    """The longest subsequence of the first that is one of the second."""
    for size in range(min(len(first), len(second)), 0, -1):
        for picked in itertools.combinations(first, size):
            rest = iter(second)
            if all(token in rest for token in picked):
                return size
    return 0


@given(st.lists(st.sampled_from("xyz"), max_size=7), st.lists(st.sampled_from("xyz"), max_size=7))
def test_rouge_l_is_of_the_longest_common_subsequence(first, second):
    got = score_answer(" ".join(first), " ".join(second)).rouge_l
    size = len(first) + len(second)
    assert got == pytest.approx(2 * longest_by_trying(first, second) / size if size else 1.0)


@given(TEXTS, TEXTS)
def test_scores_are_symmetric_and_between_0_and_1(first, second):
    scores = score_answer(first, second)
    assert scores == score_answer(second, first)
    assert all(0 <= each <= 1 for each in (scores.exact, scores.f1, scores.rouge_l))
    assert scores.rouge_l <= scores.f1, "a common subsequence is made of common tokens"
    assert scores.exact <= scores.f1


@given(TEXTS)
def test_a_text_answers_itself(text):
    scores = score_answer(text, text)
    assert (scores.exact, scores.f1, scores.rouge_l) == (1, 1, 1)
