"""From nothing to a consortium of two, a renewal and a revocation, with the files of both sides and nothing else."""

import ssl

from fedseek.identity.enrolment import parse_request
from fedseek_server.consortium import create_consortium, open_consortium
from fedseek_site.enrol import (
    begin_renewal,
    create_site,
    finish_renewal,
    join,
    make_join_request,
    open_site,
    take_roster,
)

NOW = 1_800_000_000
DAY = 86_400


def test_one_site_comes_renews_or_goes_and_the_other_does_nothing_by_hand(tmp_path):
    consortium = create_consortium(
        tmp_path / "联合体", name="华东联合", hosts=["localhost"], address="localhost:9443", now=NOW
    )
    for name, kind in (("北岸银行", "bank"), ("仁济医院", "hospital")):
        create_site(tmp_path / name, name=name, kind=kind)
        request = parse_request(make_join_request(tmp_path / name, now=NOW).to_bytes())
        join(tmp_path / name, consortium.admit(request, NOW).to_bytes(), now=NOW)
    bank, hospital = (open_site(tmp_path / name) for name in ("北岸银行", "仁济医院"))

    def spread():
        for site in (bank, hospital):
            take_roster(site, consortium.signed_roster.to_bytes())
        return open_site(bank.folder), open_site(hospital.folder)

    bank, hospital = spread()
    assert bank.trusted == hospital.trusted == consortium.signed_roster.roster

    assert not bank.member.due(NOW + 59 * DAY)
    assert bank.member.due(NOW + 60 * DAY)
    old, old_node = bank.identity.public(), consortium.node_keys()["北岸银行"]
    consortium.renew(begin_renewal(bank, now=NOW + 60 * DAY), NOW + 60 * DAY)
    assert consortium.former_node_keys() == {"北岸银行": old_node}  # under which the bank hears of it
    take_roster(bank, consortium.signed_roster.to_bytes())
    assert finish_renewal(bank)
    bank, hospital = spread()
    assert bank.trusted == hospital.trusted == consortium.signed_roster.roster
    assert bank.identity.public() == bank.member.entry != old
    assert make_join_request(bank.folder, now=NOW).node_key == consortium.node_keys()["北岸银行"] != old_node

    consortium.revoke("北岸银行", NOW)
    bank, hospital = spread()
    assert bank.trusted is None
    assert hospital.trusted.names == ("仁济医院",)
    assert open_consortium(consortium.folder).node_keys().keys() == {"仁济医院"}


def test_the_ca_that_a_site_holds_is_that_of_the_certificate(tmp_path):
    consortium = create_consortium(tmp_path / "c", name="x", hosts=["localhost"], address="localhost:1", now=NOW)
    create_site(tmp_path / "s", name="x", kind="bank")
    request = make_join_request(tmp_path / "s", now=NOW)
    site = join(tmp_path / "s", consortium.admit(request, NOW).to_bytes(), now=NOW)
    ssl.create_default_context(cafile=str(site.ca_path))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(consortium.certificate, consortium.key)
    assert site.ca_path.read_bytes() == (consortium.folder / "ca.pem").read_bytes()
