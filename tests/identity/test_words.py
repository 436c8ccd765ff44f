import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedseek.errors import Malformed
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.words import fingerprint_words, parse_fingerprint, words_of

DIGESTS = st.binary(min_size=32, max_size=32)
ENTRY = SiteIdentity.generate("仁济医院", "hospital").public()


@pytest.mark.parametrize(
    ("address", "words"),  # IPv4 addresses of the paper
    [
        ("7f000001", "lusab-babad"),
        ("3f54dcc1", "gutih-tugad"),
        ("3f760723", "gutuk-bisog"),
        ("8c62c18d", "mudof-sakat"),
        ("40ff06c8", "haguz-biram"),
    ],
)
def test_words_are_those_of_the_paper(address, words):
    said = fingerprint_words(bytes.fromhex(address) * 8)
    assert said == " ".join([f"{words}-{words}"] * 4)


def test_there_are_sixteen_words_of_five_letters_four_a_group():
    groups = fingerprint_words(bytes(range(32))).split(" ")
    assert [len(group.split("-")) for group in groups] == [4] * 4
    assert {len(word) for group in groups for word in group.split("-")} == {5}


@given(DIGESTS)
def test_words_and_hexadecimal_say_the_whole_digest(digest):
    words = fingerprint_words(digest)
    assert parse_fingerprint(words) == digest
    assert parse_fingerprint(digest.hex()) == digest


@given(DIGESTS, st.integers(0, 255))
def test_every_bit_changes_the_words(digest, bit):
    other = (int.from_bytes(digest, "big") ^ 1 << bit).to_bytes(32, "big")
    assert fingerprint_words(other) != fingerprint_words(digest)


def test_the_words_of_an_entry_are_its_fingerprint():
    assert parse_fingerprint(words_of(ENTRY)) == ENTRY.digest() == parse_fingerprint(ENTRY.fingerprint())
    assert words_of(msgspec.structs.replace(ENTRY, kind="bank")) != words_of(ENTRY)


@pytest.mark.parametrize("change", [str.upper, lambda text: text.replace("-", "  \n"), lambda text: f" {text}:\t"])
def test_how_it_is_written_does_not_matter(change):
    assert parse_fingerprint(change(words_of(ENTRY))) == ENTRY.digest()
    assert parse_fingerprint(change(ENTRY.fingerprint())) == ENTRY.digest()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lusab",
        words_of(ENTRY)[:-1],
        words_of(ENTRY) + "b",
        words_of(ENTRY) + "-lusab",
        "c" + words_of(ENTRY)[1:],
        "ab" * 31,
        "ab" * 33,
        "g" + "a" * 63,
        " " * 2000 + words_of(ENTRY),
        "\uff10" * 64,
    ],
    ids=range(11),
)
def test_what_is_no_fingerprint_is_refused(text):
    with pytest.raises(Malformed, match="wanted 16 words"):
        parse_fingerprint(text)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_digest_has_32_bytes(size):
    with pytest.raises(ValueError, match="wanted 32"):
        fingerprint_words(bytes(size))
