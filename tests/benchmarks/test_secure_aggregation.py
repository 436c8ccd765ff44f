import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "secure_aggregation.py"
FULL_VALUES = 2_200_000


def start(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def run(*arguments):
    done = start(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def measured(*arguments):
    return json.loads(run(*arguments, "--json").splitlines()[-1])


@pytest.fixture
def script(monkeypatch):
    """The script as a module, to call its ``main`` here."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import secure_aggregation

    return secure_aggregation


@pytest.mark.parametrize(("bits", "sites", "up_limit"), [(13, 8, 2.7), (8, 16, 2.1)])
def test_json_ends_in_one_line_that_meets_the_byte_targets(bits, sites, up_limit):
    result = measured("--values", "600000", "--sites", str(sites), "--bits", str(bits))
    assert result["exact"] is result["within_bound"] is result["tags_fit"] is True
    assert result["up_bytes_per_value"] <= up_limit
    assert result["down_bytes_per_value"] <= 2 * result["up_bytes_per_value"]
    seconds = ("encode_encrypt_s", "add_s_per_site", "decrypt_decode_s", "unmask_s", "tag_s", "mask_s", "site_crypto_s")
    assert all(result[name] > 0 for name in (*seconds, "peak_rss_mb", "server_peak_rss_mb"))
    assert (result["degree"], result["threshold"]) == (sites - 1, (sites + 1) // 2 + 1)
    # share bytes do not depend on the number of values
    assert 0 < result["share_bytes"] <= 0.01 * FULL_VALUES * result["up_bytes_per_value"]
    assert result["share_bytes"] == result["share_bytes_up"] + result["share_bytes_down"]


def test_a_sites_seconds_are_those_of_all_its_stages():
    result = measured("--values", "200000", "--sites", "6")
    stages = ("keys", "deal", "open", "encode", "tag", "mask", "sign", "encrypt", "reveal")
    parts = sum(result[f"{stage}_s"] for stage in stages) + result["decrypt_decode_s"]
    assert result["site_crypto_s"] == pytest.approx(parts, rel=0.3)  # medians do not add up exactly


@pytest.mark.parametrize(("sites", "colluders", "dropouts"), [(8, 2, 2), (24, 1, 1)])
def test_a_round_with_sites_that_vanish_is_exact(sites, colluders, dropouts):
    options = ("--values", "20000", "--colluders", str(colluders), "--dropouts", str(dropouts))
    result = measured("--sites", str(sites), *options)
    assert result["exact"] is result["tags_fit"] is True
    assert result["survivors"] == sites - dropouts >= result["min_survivors"]
    assert (result["degree"] < sites - 1) is (sites == 24)  # the second one is a sparse graph


def test_too_few_survivors_end_in_an_error_and_no_figures():
    done = start("--values", "5000", "--sites", "8", "--colluders", "2", "--dropouts", "3", "--json")
    assert done.returncode == 2
    assert "5 sites survived, wanted at least 6" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    "options",
    [
        ("--sites", "1"),
        ("--sites", "8", "--max-sites", "7"),
        ("--dropouts", "7"),
        ("--dropouts", "-1"),
        ("--values", "0"),
    ],
)
def test_cohorts_that_make_no_sense_are_refused(options):
    done = start(*options)
    assert done.returncode == 2
    assert "wanted" in done.stderr


def test_what_the_locks_add_shows_between_runs():
    none, outer, both = (
        measured("--values", "100000", "--sites", "3", "--locks", locks) for locks in ("none", "outer", "both")
    )
    assert none["up_bytes_per_value"] == none["down_bytes_per_value"] == 4
    assert none["exact"] is outer["exact"] is True
    assert "share_bytes" not in outer
    added = both["up_bytes_per_value"] - outer["up_bytes_per_value"]
    assert added == pytest.approx(both["share_bytes_up"] / 100_000, rel=0.2)
    assert both["inner_lock_s"] > 0


def test_the_coordinators_memory_does_not_grow_with_sites():
    small, large = (
        measured("--values", "200000", "--sites", sites, "--max-sites", "32", "--colluders", "1")
        for sites in ("4", "32")
    )
    assert large["server_peak_rss_mb"] <= 1.1 * small["server_peak_rss_mb"]


def test_comparison_has_a_column_for_each_scheme(script, capsys):
    assert script.main(["--values", "20000", "--sites", "3", "--compare", "--json"]) == 0
    plain, outer, both, ckks = results = json.loads(capsys.readouterr().out)["compare"]
    assert [result["locks"] for result in results] == ["none", "outer", "both", "ckks"]
    assert plain["up_bytes_per_value"] == 4
    assert outer["up_bytes_per_value"] < both["up_bytes_per_value"] < ckks["up_bytes_per_value"] / 10
    assert ckks["max_error"] < 1e-6
    table = script.show_comparison(results).splitlines()
    assert all(name in table[0] for name in script.SCHEMES.values())
    assert len(table) == 1 + len(script.COMPARED)


def test_growth_is_shown_against_the_smallest_cohort_and_log_n(script, capsys, monkeypatch):
    monkeypatch.setattr(script, "GROWTH_SITES", (4, 8))
    monkeypatch.setattr(script, "GROWTH_SITES_A_COLLUDER", 4)
    assert script.main(["--values", "5000", "--growth"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["sites", "4", "8"]
    degree = next(line for line in lines if line.startswith("degree"))
    assert degree.split() == ["degree", "3", "x1.00", "/log", "1.00", "7", "x2.33", "/log", "1.56"]  # 7/3 over 3/2


def test_table_and_help_are_readable():
    assert "up_bytes_per_value" in run("--values", "5000", "--sites", "2")
    assert "example:" in run("--help")


@pytest.mark.parametrize("broken", ["exact", "tags_fit", "within_bound"])
def test_what_is_not_right_is_told_by_the_exit_status(script, broken, monkeypatch, capsys):
    result = {"locks": "both", "exact": True, "tags_fit": True, "within_bound": True}
    monkeypatch.setattr(script, "measure", lambda *_: result)
    assert script.main(["--json"]) == 0
    result[broken] = False
    assert script.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[broken] is False


def test_a_site_that_sends_another_slot_than_it_tagged_is_found(script, monkeypatch, capsys):
    import site_side

    encrypt = site_side.encrypt_update

    def alter(key, encoded):
        encoded["global"][20] = (encoded["global"][20] + 1) % key.params.plain_modulus
        return encrypt(key, encoded)

    monkeypatch.setattr(site_side, "encrypt_update", alter)
    assert script.main(["--values", "5000", "--sites", "3", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["exact"], result["tags_fit"]) == (False, False)


def test_tags_of_another_site_are_found_though_the_sum_is_exact(script, monkeypatch, capsys):
    import site_side

    add_tags = site_side.add_tags

    def as_another(slots, key, *, site, modulus):
        return add_tags(slots, key, site="别家", modulus=modulus)

    monkeypatch.setattr(site_side, "add_tags", as_another)
    assert script.main(["--values", "5000", "--sites", "3", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["exact"], result["tags_fit"]) == (True, False)


def test_a_mask_that_finds_no_counterpart_is_found(script, monkeypatch, capsys):
    import site_side

    mask_slots = site_side.mask_slots

    def with_one_peer_fewer(tagged, secrets, keys, federation, graph, *, participants, me):
        fewer = [name for name in participants if name != graph.neighbours[me][0]]
        return mask_slots(tagged, secrets, keys, federation, graph, participants=fewer, me=me)

    monkeypatch.setattr(site_side, "mask_slots", with_one_peer_fewer)
    assert script.main(["--values", "5000", "--sites", "5", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["exact"] is False


def test_a_site_masks_its_head_as_well_and_gets_the_keys_of_its_kind(script, monkeypatch, capsys):
    import site_side

    seen, mask_slots = [], site_side.mask_slots

    def look(encoded, secrets, keys, federation, graph, *, participants, me):
        seen.append((set(encoded), set(keys), set(graph.neighbours[me]), set(participants) - {me}))
        return mask_slots(encoded, secrets, keys, federation, graph, participants=participants, me=me)

    monkeypatch.setattr(site_side, "mask_slots", look)
    assert script.main(["--values", "5000", "--sites", "24", "--json"]) == 0  # a sparse graph
    assert len(seen) == 24
    for scopes, keys, neighbours, others in seen:
        assert scopes == {"global", "kind/bank"}
        assert neighbours < keys == others  # all are of one kind
    assert json.loads(capsys.readouterr().out)["degree"] < 23


@pytest.mark.parametrize("part", ["epoch", "digest"])
def test_a_site_that_vouches_for_another_start_ends_the_round(script, part, monkeypatch, capsys):
    import site_side

    submit, presence_message = site_side.submit, site_side.presence_message
    other = {"epoch": 1, "digest": b"\1" * 32}

    def fork(locks, site):
        if site.number == 1:
            changed = {part: other[part]}
            with monkeypatch.context() as forked:
                forked.setattr(
                    site_side, "presence_message", lambda *args, **named: presence_message(*args, **(named | changed))
                )
                return submit(locks, site)
        return submit(locks, site)

    monkeypatch.setattr(site_side, "submit", fork)
    assert script.main(["--values", "5000", "--sites", "3", "--json"]) == 2
    told = capsys.readouterr()
    assert "key of site '支行-0001'" in told.err
    assert not told.out


def test_the_adding_side_loads_nothing_that_decrypts():
    code = "import sys, secure_aggregation, adding_side; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=BENCHMARKS)
    assert not {"fedseek.he.keys", "fedseek.identity.keys", "site_side", "torch"} & set(done.stdout.split())
