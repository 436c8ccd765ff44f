"""Refusals are logged, and nobody fills the log with them."""

from fedseek_server.refusals import MOST_REMEMBERED, Refusals


def test_the_first_is_told_at_once_and_the_others_as_a_number(caplog):
    now = [0.0]
    refusals = Refusals(lambda: now[0])
    for _ in range(5):
        refusals.note("192.0.2.7", "not a registered site")
    refusals.note("192.0.2.8", "not a registered site")
    refusals.note("192.0.2.7", "not found")
    assert [record.getMessage() for record in caplog.records] == [
        "refused 192.0.2.7: not a registered site",
        "refused 192.0.2.8: not a registered site",
        "refused 192.0.2.7: not found",
    ]
    now[0] = 61.0
    refusals.note("192.0.2.7", "not a registered site")
    assert caplog.records[-1].getMessage() == "refused 192.0.2.7: not a registered site (4 more since)"


def test_ten_thousand_addresses_cost_bounded_memory_and_lines(caplog):
    now = [0.0]
    refusals = Refusals(lambda: now[0])
    for number in range(10 * MOST_REMEMBERED):
        refusals.note(f"host {number}", "not found")
    assert len(caplog.records) == MOST_REMEMBERED
    assert len(refusals._quiet_until) + len(refusals._unsaid) <= 2 * MOST_REMEMBERED
    now[0] = 61.0
    refusals.note("another", "not found")
    assert "another" in caplog.text
    assert len(refusals._quiet_until) == 1
