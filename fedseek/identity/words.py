"""A fingerprint in words that two people can read to each other on the phone.

Proquints (D. S. Wilkerson, arXiv:0901.4016): 16 bits are five letters, consonant and vowel in turn, so every word can
be spoken in most languages, and none has to be looked up. All 256 bits are in the words: with fewer, somebody could
look for a second key whose words are the same.

>>> fingerprint_words(bytes.fromhex("7f000001" * 8)).split()[0]
'lusab-babad-lusab-babad'
"""

from __future__ import annotations

import re
from typing import Final

from fedseek.errors import Malformed
from fedseek.identity.roster import DIGEST_BYTES, RosterEntry

_CONSONANTS: Final = "bdfghjklmnprstvz"  # four bits each
_VOWELS: Final = "aiou"  # two bits each
_WORDS: Final = DIGEST_BYTES // 2
_WORDS_A_GROUP: Final = 4
_HEX: Final = re.compile(rf"[0-9a-f]{{{2 * DIGEST_BYTES}}}")
_PROQUINTS: Final = re.compile(rf"([{_CONSONANTS}][{_VOWELS}][{_CONSONANTS}][{_VOWELS}][{_CONSONANTS}]){{{_WORDS}}}")
_SEPARATORS: Final = re.compile(r"[\s:\-]+")
MAX_FINGERPRINT_CHARS: Final = 1000


def fingerprint_words(digest: bytes) -> str:
    """Sixteen words for a digest of 32 bytes: four groups with a space between, of four words with a hyphen between."""
    if len(digest) != DIGEST_BYTES:
        raise ValueError(f"digest has {len(digest)} bytes, wanted {DIGEST_BYTES}")
    words = [_word(int.from_bytes(digest[at : at + 2], "big")) for at in range(0, DIGEST_BYTES, 2)]
    groups = (words[at : at + _WORDS_A_GROUP] for at in range(0, _WORDS, _WORDS_A_GROUP))
    return " ".join("-".join(group) for group in groups)


def words_of(entry: RosterEntry) -> str:
    """The words of a roster entry: the same 256 bits as ``entry.fingerprint()``."""
    return fingerprint_words(entry.digest())


def parse_fingerprint(text: str) -> bytes:
    """The digest of a fingerprint that somebody typed or pasted, in words or in hexadecimal.

    Upper case counts as lower case; spaces, line breaks, hyphens and colons may stand anywhere.

    Raises:
        Malformed: it is neither, or has a letter, digit or word too few or too many.
    """
    letters = _SEPARATORS.sub("", text[:MAX_FINGERPRINT_CHARS]).lower()
    if len(text) <= MAX_FINGERPRINT_CHARS:
        if _HEX.fullmatch(letters):
            return bytes.fromhex(letters)
        if _PROQUINTS.fullmatch(letters):
            return b"".join(_number(letters[at : at + 5]).to_bytes(2, "big") for at in range(0, len(letters), 5))
    raise Malformed(
        f"fingerprint of {len(letters)} letters and digits is not one of ours, "
        f"wanted {_WORDS} words of 5 letters or {2 * DIGEST_BYTES} hexadecimal digits",
        hint="copy all of it; a word is consonant, vowel, consonant, vowel, consonant",
    )


def _word(number: int) -> str:
    """Five letters for 16 bits: 4, 2, 4, 2, 4 bits, the highest first."""
    return "".join(
        alphabet[number >> shift & len(alphabet) - 1]
        for alphabet, shift in ((_CONSONANTS, 12), (_VOWELS, 10), (_CONSONANTS, 6), (_VOWELS, 4), (_CONSONANTS, 0))
    )


def _number(word: str) -> int:
    number = 0
    for place, letter in enumerate(word):
        alphabet, bits = (_VOWELS, 2) if place % 2 else (_CONSONANTS, 4)
        number = number << bits | alphabet.index(letter)
    return number
