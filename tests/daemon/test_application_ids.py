"""Each SQLite file that a daemon keeps says what it is, and none says what another one says."""

import pytest

from fedseek_server import run_log
from fedseek_site import approvals, journal, ledger, release_approvals

KEPT = (run_log, approvals, journal, ledger, release_approvals)


def test_no_file_is_taken_for_another_one():
    assert len({module._APPLICATION_ID for module in KEPT}) == len(KEPT)


@pytest.mark.parametrize("module", KEPT, ids=lambda module: module.__name__)
def test_it_is_ours_by_its_first_letters(module):
    assert module._APPLICATION_ID.to_bytes(4, "big").decode().startswith("FS")
