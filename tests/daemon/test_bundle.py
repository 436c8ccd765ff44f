"""The bundle of every run carries no code, and is the same bytes everywhere."""

import hashlib
import io
import tomllib
import zipfile

from fedseek.daemon.bundle import bundle_digest, code_free_bundle


def test_the_bundle_is_the_one_that_sites_allow():
    """A change here is a change of protocol: every site has to allow the new digest first."""
    assert bundle_digest(code_free_bundle()) == "dba308e6c195f21203e12c68ebcdb16861b2e622b8a31728d804e60af67ebce6"


def test_its_digest_is_plain_sha_256():
    assert bundle_digest(b"x") == hashlib.sha256(b"x").hexdigest()


def test_there_is_a_description_in_it_and_nothing_else():
    with zipfile.ZipFile(io.BytesIO(code_free_bundle())) as archive:
        assert archive.namelist() == ["pyproject.toml"]
        described = tomllib.loads(archive.read("pyproject.toml").decode())
    assert described["project"]["dependencies"] == []
    assert set(described["tool"]["flwr"]["app"]["components"].values()) == {"fedseek_carries_no_code:none"}


def test_what_it_names_does_not_exist():
    from importlib.util import find_spec

    assert find_spec("fedseek_carries_no_code") is None
