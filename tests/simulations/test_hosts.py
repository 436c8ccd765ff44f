"""Site hosts: each site lives in exactly one, reads its own data there, and answers there."""

import subprocess
import sys

import msgspec
import pytest

from fedseek.daemon.reports import read_events
from fedseek.errors import InvalidRecords
from fedseek.identity.roster import Roster
from fedseek.messages import PlanAdmitted, PlanOffer, Refused, RoundRequest, decode_reply, encode_message
from simulations.events import site_log
from simulations.hosts import SiteHost, host_name
from simulations.run_folder import create_run_folder, open_scenario
from simulations.scenario import load_scenario

NAMES = ["北岸银行", "harbour-bank", "仁济医院", "st-anna"]


@pytest.fixture
def run_folder(write_tiny_scenario, tmp_path):
    def make(**options):
        path = write_tiny_scenario(**options)
        return create_run_folder(path, load_scenario(path), tmp_path / "runs", rounds=None)

    return make


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_every_site_is_in_exactly_one_host(run_folder, stride):
    folder = run_folder()
    hosts = [SiteHost(str(folder), str(folder / "scratch"), first=first, stride=stride) for first in range(stride)]
    enrolled = [entry.name for host in hosts for entry in host.enrol()]
    assert sorted(enrolled) == sorted(NAMES)


def test_a_host_answers_for_the_site_of_an_index_as_the_courier_counts(run_folder):
    folder = run_folder()
    hosts = [SiteHost(str(folder), str(folder / "scratch"), first=first, stride=2) for first in range(2)]
    plan = open_scenario(folder).plan
    roster = Roster.of(entry for host in hosts for entry in host.enrol())
    for host in hosts:
        host.trust(roster.canonical_bytes())
    offer = encode_message(
        PlanOffer(
            run="r", round=1, plan=plan.canonical(), roster=roster.canonical_bytes(), make_key=False, continues=None
        )
    )
    for index, name in enumerate(NAMES):
        reply = decode_reply(hosts[index % 2].handle(index, offer))
        assert isinstance(reply, PlanAdmitted)
        assert reply.site == name
    with pytest.raises(KeyError):
        hosts[0].handle(1, offer)


def test_sites_that_were_told_no_roster_refuse_every_plan(run_folder):
    folder = run_folder()
    host = SiteHost(str(folder), str(folder / "scratch"), first=0, stride=1)
    offer = PlanOffer(
        run="r",
        round=1,
        plan=open_scenario(folder).plan.canonical(),
        roster=Roster.of(host.enrol()).canonical_bytes(),
        make_key=False,
        continues=None,
    )
    reply = decode_reply(host.handle(0, encode_message(offer)))
    assert (type(reply), reply.code) == (Refused, "PlanRefused")


def test_a_site_that_is_away_does_not_answer_in_that_round(run_folder):
    folder = run_folder()
    scenario = folder / "scenario.toml"
    scenario.write_text(
        scenario.read_text("utf-8").replace('name = "st-anna"', 'name = "st-anna"\naway = [2]'), "utf-8"
    )
    host = SiteHost(str(folder), str(folder / "scratch"), first=0, stride=1)
    request = RoundRequest(
        run="r", round=2, previous=(), epoch=0, envelopes={}, participants=(), boxes={}, next_listed=(), next_keys=()
    )
    with pytest.raises(ConnectionError, match="away in round 2"):
        host.handle(NAMES.index("st-anna"), encode_message(request))
    assert isinstance(decode_reply(host.handle(NAMES.index("harbour-bank"), encode_message(request))), Refused)
    later = msgspec.structs.replace(request, round=3)
    assert isinstance(decode_reply(host.handle(NAMES.index("st-anna"), encode_message(later))), Refused)


def test_a_host_reports_what_its_sites_read_into_each_sites_own_file(run_folder):
    folder = run_folder()
    SiteHost(str(folder), str(folder / "scratch"), first=0, stride=1)
    for name in NAMES:
        (event,) = read_events(site_log(folder, name))
        del event["t"]
        assert event == {"event": "data", "records": 24, "held_back_records": 12, "units": 12}


def test_a_host_whose_site_has_an_unusable_file_does_not_start(run_folder):
    folder = run_folder(rows={"harbour-bank": [{"text": "汇款", "label": "未知", "unit": "客1"}]})
    SiteHost(str(folder), str(folder / "scratch"), first=0, stride=2)
    with pytest.raises(InvalidRecords, match=r"harbour-bank\.csv: 1 label\(s\) not in the plan: '未知'"):
        SiteHost(str(folder), str(folder / "scratch"), first=1, stride=2)


def test_memory_is_told_in_megabytes(run_folder, tmp_path):
    assert 50 < SiteHost(str(run_folder()), str(tmp_path), first=0, stride=4).peak_rss_mb() < 20_000


def test_hosts_have_names_of_their_own():
    assert len({host_name(index) for index in range(300)}) == 300


def test_the_engines_process_does_not_get_a_secret_key_type_with_this_module():
    script = "import sys, simulations.hosts; print([m for m in sys.modules if m in ('fedseek.he.keys', 'torch')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
