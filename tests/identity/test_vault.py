import copy
import os
import pickle
import stat
import unicodedata

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from hypothesis import given
from hypothesis import strategies as st

from fedseek.errors import CustodyError, Malformed, TooLarge, WrongKey
from fedseek.identity import vault
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.secret_files import read_secret_file, write_secret_file
from fedseek.identity.signing import join_fields
from fedseek.identity.vault import (
    AT_REST_OVERHEAD_BYTES,
    IdentityFile,
    StorageKey,
    load_identity,
    new_salt,
    open_at_rest,
    save_identity,
    seal_at_rest,
    unlock,
)

PASSPHRASE = "北岸银行的密码短语共十二字以上"  # noqa: S105
SALT = bytes(range(16))
KEY = StorageKey.generate()
BANK = SiteIdentity.generate("北岸银行", "bank")


@pytest.fixture
def open_umask():
    """Files come out as open as the code lets them."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# storage keys


def test_a_passphrase_gives_the_key_that_scrypt_says():
    key = StorageKey.from_passphrase(PASSPHRASE, salt=SALT)
    independent = Scrypt(salt=SALT, length=32, n=131072, r=8, p=1).derive(PASSPHRASE.encode())
    sealed = seal_at_rest(key, b"secret", purpose="p")
    assert open_at_rest(StorageKey(independent), sealed, purpose="p") == b"secret"
    assert key.salt == SALT


def test_two_ways_to_type_the_same_passphrase_are_one():
    composed, decomposed = (unicodedata.normalize(form, "Zürich-Café-Übergänge") for form in ("NFC", "NFD"))
    assert composed != decomposed
    sealed = seal_at_rest(StorageKey.from_passphrase(composed, salt=SALT), b"secret", purpose="p")
    assert open_at_rest(StorageKey.from_passphrase(decomposed, salt=SALT), sealed, purpose="p") == b"secret"


@pytest.mark.parametrize("passphrase", ["", "elevenchars", "é" * 11, "e\u0301" * 11])
def test_a_short_passphrase_is_refused_and_not_quoted(passphrase):
    with pytest.raises(CustodyError, match="wanted at least 12") as caught:
        StorageKey.from_passphrase(passphrase, salt=SALT)
    assert not passphrase or passphrase not in str(caught.value)


def test_a_passphrase_that_is_no_text_is_refused_and_not_quoted():
    with pytest.raises(CustodyError, match="not valid Unicode") as caught:
        StorageKey.from_passphrase("long enough \udcff", salt=SALT)
    assert "long enough" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("salt", [b"", bytes(15), bytes(17)])
def test_a_salt_of_another_length_is_a_mistake(salt):
    with pytest.raises(ValueError, match="wanted 16"):
        StorageKey.from_passphrase(PASSPHRASE, salt=salt)


def test_fresh_keys_and_salts_are_fresh():
    assert new_salt() != new_salt()
    with pytest.raises(WrongKey):
        open_at_rest(StorageKey.generate(), seal_at_rest(KEY, b"", purpose="p"), purpose="p")


def test_a_storage_key_does_not_print():
    raw = os.urandom(32)
    for text in (repr(StorageKey(raw)), str(StorageKey(raw)), f"{[StorageKey(raw)]}"):
        assert "redacted" in text
        assert raw.hex() not in text
        assert repr(raw) not in text


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy, lambda key: pickle.dumps(key, 0)])
def test_a_storage_key_is_not_pickled_or_copied(duplicate):
    with pytest.raises(TypeError):
        duplicate(StorageKey.generate())


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_storage_key_has_32_bytes(size):
    with pytest.raises(ValueError, match="wanted 32"):
        StorageKey(bytes(size))


# key files


@pytest.mark.usefixtures("open_umask")
def test_a_key_file_is_for_its_owner_only_and_gives_the_key_again(tmp_path):
    path = tmp_path / "站点.key"
    sealed = seal_at_rest(StorageKey.create_key_file(path), b"secret", purpose="p")
    assert mode(path) == 0o600
    assert len(path.read_bytes()) == 32
    assert open_at_rest(StorageKey.from_key_file(path), sealed, purpose="p") == b"secret"
    assert StorageKey.from_key_file(path).salt is None


def test_a_key_file_is_never_overwritten(tmp_path):
    path = tmp_path / "key"
    StorageKey.create_key_file(path)
    before = path.read_bytes()
    with pytest.raises(CustodyError, match="exists"):
        StorageKey.create_key_file(path)
    assert path.read_bytes() == before


def test_a_key_file_is_not_made_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CustodyError):
        StorageKey.create_key_file(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_a_key_file_that_cannot_be_written_whole_is_not_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail_to_sync)
    with pytest.raises(CustodyError, match="No space left"):
        StorageKey.create_key_file(tmp_path / "key")
    assert names(tmp_path) == []


@pytest.mark.parametrize("open_to", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o666])
def test_a_key_file_open_to_others_is_refused(tmp_path, open_to):
    path = tmp_path / "key"
    StorageKey.create_key_file(path)
    path.chmod(open_to)
    with pytest.raises(CustodyError, match=rf"(?s)mode {open_to:04o}.*chmod 600 .*key") as caught:
        StorageKey.from_key_file(path)
    assert path.read_bytes().hex() not in str(caught.value)


@pytest.mark.parametrize("size", [0, 31, 33, 5000])
def test_a_key_file_of_another_length_is_refused(tmp_path, size):
    write_secret_file(tmp_path / "key", bytes(size))
    with pytest.raises(CustodyError, match=f"got {size} bytes, wanted 32"):
        StorageKey.from_key_file(tmp_path / "key")


def test_a_key_file_behind_a_link_is_refused(tmp_path):
    StorageKey.create_key_file(tmp_path / "key")
    (tmp_path / "link").symlink_to(tmp_path / "key")
    with pytest.raises(CustodyError, match="symbolic link"):
        StorageKey.from_key_file(tmp_path / "link")


@pytest.mark.parametrize("make", [lambda path: path.mkdir(mode=0o700), lambda path: os.mkfifo(path, 0o600)])
def test_a_folder_or_a_pipe_is_no_key_file(tmp_path, make):
    make(tmp_path / "key")
    with pytest.raises(CustodyError, match="plain file"):
        StorageKey.from_key_file(tmp_path / "key")


def test_a_key_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CustodyError, match=r"北岸\.key cannot be read: No such file"):
        StorageKey.from_key_file(tmp_path / "北岸.key")


# sealing


@given(secret=st.binary(max_size=300), purpose=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_what_is_sealed_opens(secret, purpose):
    sealed = seal_at_rest(KEY, secret, purpose=purpose)
    assert len(sealed) == len(secret) + AT_REST_OVERHEAD_BYTES
    assert open_at_rest(KEY, sealed, purpose=purpose) == secret


def test_the_form_is_header_nonce_and_aes_gcm_over_the_purpose():
    raw = os.urandom(32)
    sealed = seal_at_rest(StorageKey(raw), b"secret", purpose="状态")
    assert sealed[:4] == b"FSK1"
    bound = join_fields(b"fedseek/at-rest/v1", "状态".encode())
    assert AESGCM(raw).decrypt(sealed[4:16], sealed[16:], bound) == b"secret"


def test_sealing_twice_gives_two_nonces_and_no_stretch_of_the_secret():
    secret = os.urandom(4096)
    one, two = seal_at_rest(KEY, secret, purpose="p"), seal_at_rest(KEY, secret, purpose="p")
    assert one[4:16] != two[4:16]
    assert not any(secret[start : start + 16] in one for start in range(0, 4080, 16))


def test_a_seal_does_not_open_for_another_purpose_or_key():
    sealed = seal_at_rest(KEY, b"secret", purpose="a")
    with pytest.raises(WrongKey, match="wrong passphrase or key file, or it was altered"):
        open_at_rest(KEY, sealed, purpose="b")
    with pytest.raises(WrongKey, match="wrong passphrase or key file, or it was altered"):
        open_at_rest(StorageKey.generate(), sealed, purpose="a")


def test_a_seal_altered_in_any_bit_does_not_open():
    sealed = seal_at_rest(KEY, b"secret", purpose="p")
    for at in range(8 * len(sealed)):
        altered = bytearray(sealed)
        altered[at // 8] ^= 1 << at % 8
        with pytest.raises(Malformed if at < 32 else WrongKey):
            open_at_rest(KEY, bytes(altered), purpose="p")


@pytest.mark.parametrize("data", [b"", b"FSK1", b"FSK1" + bytes(27), b"FSK2" + bytes(40), bytes(64)])
def test_what_is_no_seal_is_malformed(data):
    with pytest.raises(Malformed):
        open_at_rest(KEY, data, purpose="p")


def test_a_secret_out_of_bounds_is_refused(monkeypatch):
    monkeypatch.setattr(vault, "MAX_AT_REST_BYTES", 5)
    assert open_at_rest(KEY, seal_at_rest(KEY, b"12345", purpose="p"), purpose="p") == b"12345"
    with pytest.raises(TooLarge, match="got 6 bytes, wanted at most 5"):
        seal_at_rest(KEY, b"123456", purpose="p")


# secret files


def fail_to_sync(descriptor):
    raise OSError(28, "No space left on device")


@pytest.mark.usefixtures("open_umask")
def test_a_secret_file_is_for_its_owner_only_and_is_replaced_whole(tmp_path):
    path = tmp_path / "密.bin"
    path.write_bytes(b"as open as can be")
    write_secret_file(path, b"old")
    write_secret_file(path, b"new")
    assert read_secret_file(path, limit=3) == b"new"
    assert mode(path) == 0o600
    assert names(tmp_path) == ["密.bin"]


@pytest.mark.usefixtures("open_umask")
def test_a_secret_file_is_for_its_owner_only_while_it_is_written(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.extend((path.name, mode(path)) for path in tmp_path.iterdir()))
    write_secret_file(tmp_path / "secret", b"data")
    assert [each for _, each in seen] == [0o600, 0o600]
    assert seen[0][0].startswith(".fedseek-")  # synced before it has the name
    assert seen[1][0] == "secret"  # and the folder after


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "secret"
    write_secret_file(path, b"old")
    monkeypatch.setattr(os, call, lambda *_: fail_to_sync(0))
    with pytest.raises(CustodyError, match="secret cannot be written: No space left"):
        write_secret_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["secret"]


def test_an_interrupt_leaves_nothing_half_written(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_secret_file(tmp_path / "secret", b"new")
    assert names(tmp_path) == []


def test_a_secret_file_open_to_others_is_refused(tmp_path):
    write_secret_file(tmp_path / "secret", b"data")
    (tmp_path / "secret").chmod(0o644)
    with pytest.raises(CustodyError, match="mode 0644"):
        read_secret_file(tmp_path / "secret", limit=10)


def test_a_secret_file_is_read_up_to_its_limit(tmp_path):
    write_secret_file(tmp_path / "secret", b"1234")
    assert read_secret_file(tmp_path / "secret", limit=4) == b"1234"
    with pytest.raises(TooLarge):
        read_secret_file(tmp_path / "secret", limit=3)


# identities


def test_an_identity_comes_back_by_key_file(tmp_path):
    key = StorageKey.create_key_file(tmp_path / "key")
    save_identity(BANK, tmp_path / "北岸银行.id", key)
    for found in (
        load_identity(tmp_path / "北岸银行.id", key),
        unlock(tmp_path / "北岸银行.id", key_file=tmp_path / "key")[0],
    ):
        assert found.public() == BANK.public()
        assert found.to_bytes() == BANK.to_bytes()
    assert mode(tmp_path / "北岸银行.id") == 0o600
    assert not any(BANK.to_bytes()[at : at + 16] in (tmp_path / "北岸银行.id").read_bytes() for at in range(100))


def test_an_identity_comes_back_by_passphrase_with_a_key_for_other_files(tmp_path):
    key = StorageKey.from_passphrase(PASSPHRASE, salt=new_salt())
    save_identity(BANK, tmp_path / "id", key)
    found, unlocked = unlock(tmp_path / "id", passphrase=PASSPHRASE)
    assert found.public() == BANK.public()
    assert open_at_rest(unlocked, seal_at_rest(key, b"state", purpose="s"), purpose="s") == b"state"
    with pytest.raises(WrongKey, match="wrong passphrase"):
        unlock(tmp_path / "id", passphrase=PASSPHRASE + "!")


def test_the_wrong_sort_of_key_is_named_as_such(tmp_path):
    by_file = StorageKey.create_key_file(tmp_path / "key")
    save_identity(BANK, tmp_path / "by-file", by_file)
    save_identity(BANK, tmp_path / "by-words", StorageKey.from_passphrase(PASSPHRASE, salt=SALT))
    with pytest.raises(WrongKey, match="give the key file"):
        unlock(tmp_path / "by-file", passphrase=PASSPHRASE)
    with pytest.raises(WrongKey, match="give the passphrase"):
        unlock(tmp_path / "by-words", key_file=tmp_path / "key")
    with pytest.raises(WrongKey):
        load_identity(tmp_path / "by-words", by_file)


@pytest.mark.parametrize("given_both", [True, False])
def test_unlock_takes_one_of_two(tmp_path, given_both):
    key_file = tmp_path / "key"
    save_identity(BANK, tmp_path / "id", StorageKey.create_key_file(key_file))
    with pytest.raises(ValueError, match="one of the two"):
        unlock(tmp_path / "id", **({"passphrase": PASSPHRASE, "key_file": key_file} if given_both else {}))


def test_another_identity_is_not_overwritten_unless_asked(tmp_path):
    save_identity(BANK, tmp_path / "id", KEY)
    other, new_key = SiteIdentity.generate("b", "bank"), StorageKey.generate()
    with pytest.raises(CustodyError, match="wanted a new file"):
        save_identity(other, tmp_path / "id", KEY)
    assert load_identity(tmp_path / "id", KEY).public() == BANK.public()
    save_identity(BANK, tmp_path / "id", new_key, replace=True)
    assert load_identity(tmp_path / "id", new_key).public() == BANK.public()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        bytes(range(64)),
        msgspec.msgpack.encode({"version": 2, "salt": None, "sealed": bytes(64)}),
        msgspec.msgpack.encode({"version": 1, "salt": bytes(15), "sealed": bytes(64)}),
        msgspec.msgpack.encode({"version": 1, "salt": None, "sealed": bytes(64), "more": 1}),
        msgspec.msgpack.encode({"version": 1, "salt": None, "sealed": bytes(64)}),
        msgspec.msgpack.encode(IdentityFile(salt=None, sealed=bytes(900)))[:-1],
    ],
    ids=lambda content: f"{len(content)}-bytes",
)
def test_a_file_that_is_no_identity_is_malformed(tmp_path, content):
    write_secret_file(tmp_path / "id", content)
    with pytest.raises(Malformed):
        load_identity(tmp_path / "id", KEY)


def test_a_file_longer_than_any_identity_is_refused(tmp_path):
    write_secret_file(tmp_path / "id", bytes(5000))
    with pytest.raises(TooLarge):
        load_identity(tmp_path / "id", KEY)


def test_an_altered_or_foreign_identity_file_does_not_open(tmp_path):
    save_identity(BANK, tmp_path / "id", KEY)
    content = bytearray((tmp_path / "id").read_bytes())
    content[-1] ^= 1
    write_secret_file(tmp_path / "id", bytes(content))
    with pytest.raises(WrongKey):
        load_identity(tmp_path / "id", KEY)
    sealed = seal_at_rest(KEY, BANK.to_bytes(), purpose="site-state/x")  # a seal of another purpose under the same key
    write_secret_file(tmp_path / "id", msgspec.msgpack.encode(IdentityFile(salt=None, sealed=sealed)))
    with pytest.raises(WrongKey):
        load_identity(tmp_path / "id", KEY)


def test_the_longest_identity_fits(tmp_path):
    longest = SiteIdentity.generate("𠀀" * 64, "𠀀" * 64)
    save_identity(longest, tmp_path / "id", StorageKey(bytes(32), salt=SALT))
    assert load_identity(tmp_path / "id", StorageKey(bytes(32))).public() == longest.public()
