import copy
import os
import pickle
import ssl
import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedseek.errors import CustodyError, InvalidConfig, Malformed, WrongKey
from fedseek.identity import authority as module
from fedseek.identity.authority import (
    certificate_days_left,
    certificate_days_old,
    create_authority,
    issue_certificate,
    load_authority,
    read_private_key,
    write_private_key,
)
from fedseek.identity.secret_files import write_secret_file

NOW = 1_800_000_000
DAY = 86_400
PASSPHRASE = "联合体的密码短语共十二个字以上"  # noqa: S105
HOSTS = ("fl.example.org", "localhost", "127.0.0.1", "2001:db8::1")


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return create_authority(tmp_path_factory.mktemp("a") / "authority", name="华东联合", now=NOW)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sealed") / "authority"
    return folder, create_authority(folder, name="华东联合", now=NOW, passphrase=PASSPHRASE)


def raw(key) -> bytes:
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def same(one, other) -> bool:
    return (one.ca, raw(one.ca_key), raw(one.roster_key)) == (other.ca, raw(other.ca_key), raw(other.roster_key))


# keys on the disk


def test_what_was_written_is_read_again(tmp_path):
    made = create_authority(tmp_path / "钥匙", name="华东联合", now=NOW)
    assert same(made, load_authority(tmp_path / "钥匙"))


def test_files_and_folder_are_for_their_owner_only(tmp_path):
    before = os.umask(0)
    try:
        create_authority(tmp_path / "a", name="x", now=NOW)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()} == {0o600}


def test_under_a_passphrase_keys_open_with_it_alone(sealed):
    folder, made = sealed
    assert same(made, load_authority(folder, passphrase=PASSPHRASE))
    with pytest.raises(WrongKey, match="wrong passphrase"):
        load_authority(folder, passphrase=PASSPHRASE + "?")
    with pytest.raises(CustodyError, match="under a passphrase, got none"):
        load_authority(folder)


def test_the_passphrase_is_stretched_before_the_library_gets_it(sealed):
    folder, _ = sealed
    for name in ("ca.key", "roster.key"):
        assert b"ENCRYPTED" in (folder / name).read_bytes()
        with pytest.raises(ValueError, match="password"):
            load_pem_private_key((folder / name).read_bytes(), PASSPHRASE.encode())


@pytest.mark.parametrize("passphrase", ["", "elevenchars"])
def test_a_short_passphrase_is_refused_and_leaves_nothing(tmp_path, passphrase):
    with pytest.raises(CustodyError, match="at least 12"):
        create_authority(tmp_path / "a", name="x", now=NOW, passphrase=passphrase)
    assert not (tmp_path / "a").exists()


def test_a_passphrase_that_is_no_text_is_refused_and_not_quoted(tmp_path):
    with pytest.raises(CustodyError, match="not valid Unicode") as caught:
        create_authority(tmp_path / "a", name="x", now=NOW, passphrase="long enough \udcff")  # noqa: S106
    assert "long enough" not in str(caught.value)


def test_an_authority_is_never_overwritten(tmp_path):
    made = create_authority(tmp_path / "a", name="x", now=NOW)
    with pytest.raises(CustodyError, match="exists"):
        create_authority(tmp_path / "a", name="x", now=NOW)
    assert same(made, load_authority(tmp_path / "a"))


def test_keys_that_do_not_belong_together_are_refused(tmp_path):
    for name in ("a", "b"):
        create_authority(tmp_path / name, name="x", now=NOW)
    (tmp_path / "a/ca.key").write_bytes((tmp_path / "b/ca.key").read_bytes())
    with pytest.raises(WrongKey, match="not the key of"):
        load_authority(tmp_path / "a")
    (tmp_path / "b/ca.key").write_bytes((tmp_path / "b/roster.key").read_bytes())
    with pytest.raises(Malformed, match="another kind"):
        load_authority(tmp_path / "b")


@pytest.mark.parametrize("name", ["ca.pem", "ca.key", "roster.key"])
def test_missing_open_or_broken_files_are_refused(tmp_path, name):
    create_authority(tmp_path / "a", name="x", now=NOW)
    path = tmp_path / "a" / name
    good = path.read_bytes()
    path.chmod(0o640)
    with pytest.raises(CustodyError, match="0600"):
        load_authority(tmp_path / "a")
    path.unlink()
    with pytest.raises(CustodyError):
        load_authority(tmp_path / "a")
    write_secret_file(path, good[:60])
    with pytest.raises((WrongKey, Malformed)):
        load_authority(tmp_path / "a")


def test_a_key_of_another_kind_is_refused(tmp_path):
    write_secret_file(
        tmp_path / "k",
        rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )
    with pytest.raises(WrongKey, match="RSA"):
        read_private_key(tmp_path / "k")


def test_a_private_key_is_written_without_a_passphrase_or_with_a_secret(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    for secret in (None, b"secret"):
        write_private_key(tmp_path / "k", key, secret)
        assert raw(read_private_key(tmp_path / "k", secret)) == raw(key)
    with pytest.raises(WrongKey):
        read_private_key(tmp_path / "k")


def test_an_authority_does_not_print_and_is_not_pickled(authority):
    secrets = [raw(authority.ca_key).hex(), authority.roster_key.private_bytes_raw().hex()]
    for text in (repr(authority), str(authority), f"{[authority]}"):
        assert "redacted" in text
        assert not any(secret in text or secret[-64:] in text for secret in secrets)
    for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            duplicate(authority)


# certificates


def extension(certificate, kind):
    return certificate.extensions.get_extension_for_class(kind)


def test_the_ca_signs_servers_only_for_ten_years(authority):
    ca = x509.load_pem_x509_certificate(authority.ca)
    ca.verify_directly_issued_by(ca)
    constraints, usage = extension(ca, x509.BasicConstraints), extension(ca, x509.KeyUsage)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    assert usage.critical
    assert (usage.value.key_cert_sign, usage.value.digital_signature) == (True, False)
    assert certificate_days_left(authority.ca, NOW) == 3650
    assert "华东联合" in ca.subject.rfc4514_string()


def test_a_server_certificate_says_no_more_than_it_must(authority):
    pem, key = issue_certificate(authority, HOSTS, now=NOW)
    certificate = x509.load_pem_x509_certificate(pem)
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.ca))
    assert load_pem_private_key(key, None).public_key() == certificate.public_key()
    assert extension(certificate, x509.BasicConstraints).value.ca is False
    assert list(extension(certificate, x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    names = extension(certificate, x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "2001:db8::1"]


def test_every_certificate_has_a_key_and_a_number_of_its_own(authority):
    made = [issue_certificate(authority, HOSTS, now=NOW) for _ in range(2)]
    assert made[0][1] != made[1][1]
    assert len({x509.load_pem_x509_certificate(pem).serial_number for pem, _ in made}) == 2


def test_days(authority):
    pem, _ = issue_certificate(authority, HOSTS, now=NOW, days=90)
    assert [certificate_days_left(pem, NOW + days * DAY) for days in (0, 60, 90)] == [90, 30, 0]
    assert certificate_days_left(pem, NOW + 90 * DAY + 1) == -1
    assert [certificate_days_old(pem, NOW + days * DAY) for days in (0, 60)] == [0, 60]
    with pytest.raises(Malformed, match="no certificate"):
        certificate_days_left(b"x", NOW)


@pytest.mark.parametrize(
    "host", ["", "*", "*.example.org", "a_b", "-a", "a-", "a..b", "a b", "a/b", "x" * 64, "a." * 130]
)
def test_a_wrong_host_is_refused(authority, host):
    with pytest.raises(InvalidConfig, match="neither a DNS name"):
        issue_certificate(authority, ["localhost", host], now=NOW)


def test_a_host_in_chinese_is_written_as_dns_does(authority):
    pem, _ = issue_certificate(authority, ["联合.例子.cn"], now=NOW)
    names = extension(x509.load_pem_x509_certificate(pem), x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName)[0].startswith("xn--")


def test_a_certificate_needs_a_host_and_a_day_and_ends_before_its_ca(authority):
    for hosts, days in (((), 90), (HOSTS, 0), (HOSTS, 3651)):
        with pytest.raises(InvalidConfig):
            issue_certificate(authority, hosts, now=NOW, days=days)


@pytest.mark.parametrize("name", ["银" * 64, "a" * 64, "localhost"])
def test_a_long_name_of_a_consortium_is_cut_in_the_certificate(tmp_path, name):
    made = create_authority(tmp_path / "a", name=name, now=NOW)
    issue_certificate(made, ["localhost"], now=NOW)
    assert x509.load_pem_x509_certificate(made.ca).subject.rfc4514_string() != "CN=localhost"


# TLS


def handshake(authority, folder, host, *, trusted=None, now_valid=True):
    """A handshake and a message in memory; returns what the client read."""
    pem, key = issue_certificate(
        authority, ("localhost", "127.0.0.1", "::1"), now=_now() if now_valid else NOW - 40 * 365 * DAY
    )
    (folder / "server.pem").write_bytes(pem + key)
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(folder / "server.pem")
    client_context = ssl.create_default_context(cadata=(trusted or authority.ca).decode())
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(down, up, server_hostname=host)
    server = server_context.wrap_bio(up, down, server_side=True)
    _shake(client, server)
    server.write(b"hello")
    return client.read(5)


def _shake(client, server) -> None:
    for _ in range(10):
        if all([_step(client), _step(server)]):
            return


def _step(end) -> bool:
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def _now() -> float:
    import time

    return time.time()


@pytest.fixture(scope="module")
def today(tmp_path_factory):
    return create_authority(tmp_path_factory.mktemp("today") / "authority", name="华东联合", now=_now())


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_tls_works_by_every_name(today, tmp_path, host):
    assert handshake(today, tmp_path, host) == b"hello"


def test_tls_is_refused_by_another_name(today, tmp_path):
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(today, tmp_path, "example.org")


def test_tls_is_refused_under_another_authority(today, tmp_path):
    other = create_authority(tmp_path / "other", name="华东联合", now=_now())
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(today, tmp_path, "localhost", trusted=other.ca)


def test_an_expired_certificate_is_refused(today, tmp_path):
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(today, tmp_path, "localhost", now_valid=False)


def test_a_certificate_of_a_server_signs_no_other(today, tmp_path):
    """A stolen server key makes no certificates: path length 0, and it is no CA."""
    pem, key = issue_certificate(today, ["localhost"], now=_now())
    false_ca = module.Authority(pem, load_pem_private_key(key, None), today.roster_key)
    certificate, server_key = issue_certificate(false_ca, ["localhost"], now=_now(), days=1)
    (tmp_path / "chain.pem").write_bytes(certificate + pem + server_key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "chain.pem")
    client_context = ssl.create_default_context(cadata=today.ca.decode())
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(down, up, server_hostname="localhost")
    server = context.wrap_bio(up, down, server_side=True)
    with pytest.raises(ssl.SSLCertVerificationError):
        _shake(client, server)
