"""The SuperLink's list of nodes follows the roster."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedseek.errors import NotAdmitted, Unreachable, WrongKey
from fedseek_server.registration import reconcile


class List:
    """A registry in memory. Keys in ``burnt`` were revoked once; Flower takes none twice."""

    def __init__(self, known=None, *, burnt=(), fails_at=None):
        self.nodes = {key: (number + 1, name) for number, (name, key) in enumerate((known or {}).items())}
        self.burnt, self.fails_at, self.calls = set(burnt), fails_at, []

    def _call(self, *what):
        self.calls.append(what)
        if len(self.calls) == self.fails_at:
            raise Unreachable("away")

    def enrolled(self):
        self._call("enrolled")
        return {key: node for key, (node, _) in self.nodes.items()}

    def names(self):
        return dict(self.nodes.values())

    def enrol(self, public_key, name):
        self._call("enrol", name)
        assert public_key not in self.nodes
        if public_key in self.burnt:
            raise NotAdmitted(f"{name}: burnt")
        self.nodes[public_key] = (100 + len(self.calls), name)
        return self.nodes[public_key][0]

    def revoke(self, node):
        self._call("revoke", node)
        [key] = [key for key, (number, _) in self.nodes.items() if number == node]
        del self.nodes[key]
        self.burnt.add(key)


A, B, C = b"key a", b"key b", b"key c"


def test_what_is_missing_is_registered_and_what_is_not_wanted_unregistered():
    link = List({"北岸银行": A, "gone": B})
    assert reconcile(link, {"北岸银行": A, "仁济医院": C}) == (["仁济医院"], ["gone"])
    assert set(link.nodes) == {A, C}
    assert reconcile(link, {"北岸银行": A, "仁济医院": C}) == ([], [])


def test_a_site_with_a_new_key_loses_the_old_one_first():
    link = List({"bank": A})
    assert reconcile(link, {"bank": B}) == (["bank"], ["bank"])
    assert [call[0] for call in link.calls] == ["enrolled", "revoke", "enrol"]


def test_an_empty_roster_leaves_nobody():
    link = List({"a": A, "b": B})
    assert reconcile(link, {}) == ([], ["a", "b"])
    assert not link.nodes


def test_two_sites_with_one_key_are_refused_and_nothing_changes():
    link = List({"gone": C})
    with pytest.raises(WrongKey, match="'a' and 'b'"):
        reconcile(link, {"a": A, "b": A})
    assert not link.calls


def test_a_key_revoked_once_holds_up_nobody_else_and_is_told():
    link = List({"gone": C}, burnt=[A])
    assert reconcile(link, {"again": A, "new": B}) == (["new"], ["gone"])
    with pytest.raises(NotAdmitted, match="again"):
        reconcile(link, {"again": A, "new": B})
    assert set(link.nodes) == {B}


def test_a_node_registered_without_a_name_is_named_by_its_number():
    link = List({"": A})
    assert reconcile(link, {}) == ([], ["node 1"])


@given(
    st.dictionaries(st.text(max_size=3), st.integers(0, 5), max_size=5),
    st.dictionaries(st.text(max_size=3), st.integers(6, 20), max_size=5),
    st.integers(1, 8),
)
def test_after_a_failure_anywhere_another_call_completes_it(known, fresh, fails_at):
    known = {name: bytes([key]) for name, key in known.items()}
    known = {name: key for key, name in {key: name for name, key in known.items()}.items()}
    wanted = {name: key for key, name in {bytes([key]): name for name, key in fresh.items()}.items()}
    wanted |= dict(list(known.items())[:2])
    link = List(known, fails_at=fails_at)
    with suppress(Unreachable):
        reconcile(link, wanted)
    link.fails_at = None
    reconcile(link, wanted)
    assert set(link.nodes) == set(wanted.values())
