"""A coordinator and one site pool everything they ever saw, and still do not learn whose update is whose.

The experiment. Four sites: A and B (banks), C and D (hospitals). In world 0 site A sends P and site B sends Q, in world
1 the other way round: the large vector d = P - Q moves from A's update to B's, and every sum stays the same. D works
with the coordinator. The two know all bytes that were carried, D's secrets, the group key, the shares D holds of
everybody's secrets, all shares that were revealed, and even P and Q. They have to say which world they are in.

The adversary decrypts each single ciphertext with the group key, rebuilds every secret of which it has enough shares,
takes off every mask it can compute from them, and correlates what is left with P and Q. That it takes off all there is
shows in the sum: its leftovers of the honest sites add up to their sum exactly.

The bound. Leftovers that are uniform modulo t give each statistic mean 0 and variance 1, whatever P and Q are. Nothing
may be 6 sigma off (chance below 2e-9 for each; there are about a thousand), and of 80 guesses more than 18 and fewer
than 62 must be right (a fair coin misses that once in a million). Without the inner lock the same statistics are
38 to 60 sigma, and the same adversary is right every time.

What is not protected, and shown here too: a sum of two sites of which one colludes. Its partner is the sum less the
colluder's own update. A head that two banks share is safe from outsiders, not from each other. Unless a plan asks for
it, such a head is not shared at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest

from fedseek.apply import ScopeState
from fedseek.cohort import Federation, RoundGraph
from fedseek.deal import HeldShares, RoundSecrets, head_seed, mask_private_key, pairwise_seed
from fedseek.encode import Slots, UpdateLayout
from fedseek.groupkey import GroupKey
from fedseek.he.ciphertext import CiphertextForm, load_ciphertext, save_ciphertext
from fedseek.he.keys import decrypt_slots
from fedseek.identity.keys import SiteIdentity
from fedseek.mask import add_pairwise_mask, add_self_mask
from fedseek.messages import MASK_KEY, SELF_MASK, RoundKeys, SharesRevealed, UpdateReply
from fedseek.plan import check_plan, parse_spec
from fedseek.secagg.mac import NUM_TAGS
from fedseek.secagg.shamir import combine
from simulations import protocol

A, B, C, COLLUDER = "北岸银行", "harbour-bank", "仁济医院", "st-anna"
KINDS = {A: "bank", B: "bank", C: "hospital", COLLUDER: "hospital"}
SHARED_BY_THE_TWO = ("global", "kind/bank")  # scopes in which A's and B's updates are summed
NUM_VALUES = 3 * 4091  # with five header slots, exactly one ciphertext of 4096
RANGE = 1.0
RUN = "试运行-1"
PAIRS = 40
SIGMAS = 6.0
RIGHT_BY_CHANCE = range(19, 62)  # of 80 guesses


@pytest.fixture(scope="module")
def plan():
    return check_plan(
        parse_spec(
            {
                "name": "collusion",
                "model": {"source": "path:base-model", "sha256": "00" * 32},
                "kinds": {kind: {"labels": ["0", "1"]} for kind in ("bank", "hospital")},
                "lora": {"target_modules": ["query"]},
                "training": {
                    "rounds": 2,
                    "steps_per_round": 1,
                    "sampling_probability": 0.5,
                    "learning_rate": 0.1,
                    "head_learning_rate": 0.1,
                },
                "privacy": {"mechanism": "none"},
                # One colluder and three sites at least, as when a plan says nothing; heads of two sites, as it must ask for.
                "cohort": {"max_sites": 4, "min_contributors": 2},
            }
        )
    )


@pytest.fixture(scope="module")
def identities():
    return [SiteIdentity.generate(name, kind) for name, kind in KINDS.items()]


# The round, with everything its parties hold


@dataclass(slots=True)
class Overheard:
    """What happened inside a round. The test sees all of it; ``view_of_the_colluders`` says what the adversary gets."""

    names: Sequence[str]
    secrets: dict[str, RoundSecrets] = field(default_factory=dict)
    held: dict[str, dict[str, HeldShares]] = field(default_factory=dict)
    group_keys: dict[str, GroupKey] = field(default_factory=dict)
    tagged: dict[str, Mapping[str, Slots]] = field(default_factory=dict)
    federation: Federation | None = None
    graph: RoundGraph | None = None
    carried: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class View:
    """All that the coordinator and the colluder know together."""

    carried: Sequence[bytes]
    federation: Federation
    graph: RoundGraph
    group_key: GroupKey
    secrets: Mapping[str, RoundSecrets]
    held: Mapping[str, Mapping[str, HeldShares]]


def view_of_the_colluders(heard: Overheard) -> View:
    return View(
        carried=heard.carried,
        federation=heard.federation,  # public: run, plan, roster
        graph=heard.graph,  # public: derived from these
        group_key=heard.group_keys[COLLUDER],
        secrets={COLLUDER: heard.secrets[COLLUDER]},
        held={COLLUDER: heard.held[COLLUDER]},
    )


@contextmanager
def overhearing(heard: Overheard, *, inner_lock: bool) -> Iterator[None]:
    """Listen at the steps of ``run_round``; without the inner lock nothing is masked, and nothing comes off the sum."""

    def draw_secrets():
        drawn = originals["draw_secrets"]()
        heard.secrets[heard.names[len(heard.secrets)]] = drawn  # run_round draws them in the order of its sites
        return drawn

    def open_group_key(*args, identity):
        heard.group_keys[identity.name] = originals["open_group_key"](*args, identity=identity)
        return heard.group_keys[identity.name]

    def deal_shares(*args, identity):
        dealt, own = originals["deal_shares"](*args, identity=identity)
        heard.held.setdefault(identity.name, {})[identity.name] = own
        return dealt, own

    def open_box(box, secrets, dealer, federation, *, receiver):
        opened = originals["open_box"](box, secrets, dealer, federation, receiver=receiver)
        heard.held.setdefault(receiver.site, {})[dealer.site] = opened
        return opened

    def mask_slots(tagged, *args, participants, me):
        heard.tagged[me] = {scope: slots.copy() for scope, slots in tagged.items()}
        return originals["mask_slots"](tagged, *args, participants=participants, me=me) if inner_lock else tagged

    def unmask_sum(aggregate, revealed, record, federation):
        heard.federation, heard.graph = federation, record.graph
        if inner_lock:
            originals["unmask_sum"](aggregate, revealed, record, federation)

    spies: dict[str, Callable[..., Any]] = {
        spy.__name__: spy for spy in (draw_secrets, open_group_key, deal_shares, open_box, mask_slots, unmask_sum)
    }
    originals = {name: getattr(protocol, name) for name in spies}
    with mock.patch.multiple(protocol, **spies):
        yield


def play(plan, sites, *, vanish: Collection[str] = (), inner_lock: bool = True) -> tuple[Overheard, Any]:
    """One round of ``simulations.protocol``, and all of it that the test may look at."""
    heard = Overheard([site.identity.name for site in sites])
    with overhearing(heard, inner_lock=inner_lock):
        outcome = protocol.run_round(plan, sites, run=RUN, number=1, vanish=vanish)
    heard.carried = list(outcome.carried)
    return heard, outcome


# Two worlds


def draw_pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """P and Q: values of -C, 0 and C, which the quantiser rounds exactly, so that swapping them changes no sum."""
    rng = np.random.default_rng([11, seed])
    first, second = rng.integers(-1, 2, (2, NUM_VALUES)).astype(np.float32)
    return RANGE * first, RANGE * second


def world(identities, number: int, pair: tuple[np.ndarray, np.ndarray]) -> list[protocol.Participant]:
    """The sites of world 0 or 1. C and the colluder send the same in both."""
    rng = np.random.default_rng(7)
    others = {name: rng.integers(-1, 2, NUM_VALUES).astype(np.float32) for name in (C, COLLUDER)}
    updates = {A: pair[number], B: pair[1 - number], **others}
    sites = []
    for identity in identities:
        scopes = ("global", f"kind/{identity.kind}")
        layouts = {scope: UpdateLayout(scope, (("w", (NUM_VALUES,)),)) for scope in scopes}
        zeros = np.zeros(NUM_VALUES, dtype=np.float32)
        states = {
            scope: ScopeState(layout, zeros, zeros.astype(np.float64), RANGE) for scope, layout in layouts.items()
        }
        sites.append(protocol.Participant(identity, states, dict.fromkeys(scopes, updates[identity.name])))
    return sites


# The adversary


def rebuild(view: View) -> dict[tuple[str, str], bytes]:
    """Every secret, by site and name, of which enough shares were revealed or are the colluder's own."""
    shares: dict[tuple[str, str], dict[int, bytes]] = {}

    def take(holder: str, dealer: str, secret: str, share: bytes) -> None:
        shares.setdefault((dealer, secret), {})[view.graph.holders(dealer).index(holder)] = share

    for holder, held in view.held.items():
        for dealer, theirs in held.items():
            for secret, share in theirs.shares.items():
                take(holder, dealer, secret, share)
    for revealed in carried(view, SharesRevealed):
        for dealer, share in revealed.self_masks.items():
            take(revealed.site, dealer, SELF_MASK, share)
        for dealer, share in revealed.mask_keys.items():
            take(revealed.site, dealer, MASK_KEY, share)
    threshold = view.graph.threshold
    rebuilt = {which: combine(found, threshold=threshold) for which, found in shares.items() if len(found) >= threshold}
    for name, secrets in view.secrets.items():
        rebuilt |= {(name, MASK_KEY): secrets.mask_seed, (name, SELF_MASK): secrets.self_seed}
    return rebuilt


def carried(view: View, kind: type[Any]) -> list[Any]:
    """The carried messages of one class, read from their bytes."""
    found = []
    for data in view.carried:
        try:
            found.append(msgspec.msgpack.decode(data, type=kind))
        except msgspec.ValidationError:
            continue
    return found


def decrypt_single(view: View) -> dict[tuple[str, str], Slots]:
    """Every single update, by site and scope, as the group key opens it."""
    params = view.federation.plan.packing.params
    opened = {}
    for reply in carried(view, UpdateReply):
        for scoped in reply.update:
            loaded = [load_ciphertext(params, data, form=CiphertextForm.FRESH) for data in scoped.ciphertexts]
            summed = [save_ciphertext(each) for each in loaded]
            opened[reply.site, scoped.scope] = decrypt_slots(view.group_key.secret, summed)
    return opened


def take_off_masks(view: View, opened: Mapping[tuple[str, str], Slots]) -> dict[tuple[str, str], Slots]:
    """What is left of each update without the masks that the adversary can compute."""
    known, federation = rebuild(view), view.federation
    modulus = federation.plan.packing.params.plain_modulus
    left = {}
    for (name, scope), slots in opened.items():
        mask = np.zeros_like(slots)
        if scope == "global" and (name, SELF_MASK) in known:
            add_self_mask(mask, known[name, SELF_MASK], modulus=modulus)
        for peer in view.graph.neighbours[name] if scope == "global" else view.graph.kin[name]:
            seed = agreed_seed(view, known, scope, name, peer)
            if seed is not None:
                add_pairwise_mask(mask, seed, (name, peer), federation, modulus=modulus)
        left[name, scope] = (slots + np.uint64(modulus) - mask) % np.uint64(modulus)
    return left


def agreed_seed(view: View, known: Mapping[tuple[str, str], bytes], scope: str, name: str, peer: str) -> bytes | None:
    """The seed that two sites agreed on, if the adversary has the private key of either; the other's is public."""
    keys = {each.site: each for each in carried(view, RoundKeys)}
    for owner, other in ((peer, name), (name, peer)):
        if scope == "global" and (owner, MASK_KEY) in known:
            private_key = mask_private_key(known[owner, MASK_KEY])
            return pairwise_seed(private_key, keys[other], view.federation, me=owner)
        if scope != "global" and owner in view.secrets:
            return head_seed(view.secrets[owner], keys[other], view.federation, me=owner)
    return None


def correlate(left: Slots, one: Slots, other: Slots, modulus: int) -> float:
    """How much more ``left`` looks like ``one`` than like ``other``, in sigmas of a uniform ``left``.

    Slots are angles on a circle of length t. For uniform x the difference cos(x - a) - cos(x - b) has mean 0 and
    variance 1 - cos(a - b); the slots of the tags, which neither hypothesis knows, are left out.
    """
    x, a, b = (slots[NUM_TAGS:].astype(np.float64) * (2 * np.pi / modulus) for slots in (left, one, other))
    return float(np.sum(np.cos(x - a) - np.cos(x - b)) / np.sqrt(np.sum(1 - np.cos(a - b))))


def statistics(view: View, slots_of: Mapping[str, Slots]) -> list[float]:
    """Every statistic of the adversary; each is positive for world 0 and negative for world 1.

    With the masks it knows taken off and with all left on; of A's update, of B's, and of their difference.
    """
    modulus = view.federation.plan.packing.params.plain_modulus
    p, q = slots_of["P"], slots_of["Q"]
    t = np.uint64(modulus)
    opened = decrypt_single(view)
    found = []
    for left in (take_off_masks(view, opened), opened):
        for scope in SHARED_BY_THE_TWO:
            a, b = left[A, scope], left[B, scope]
            found += [correlate(a, p, q, modulus), correlate(b, q, p, modulus)]
            found.append(correlate((a + t - b) % t, (p + t - q) % t, (q + t - p) % t, modulus))
    return found


def guess(found: Sequence[float]) -> int:
    """The world that the strongest statistic speaks for."""
    return 0 if max(found, key=abs) > 0 else 1


# The trials


def hypotheses(plan, identities, pair) -> dict[str, Slots]:
    """P and Q as slots, the same in every scope: what the adversary compares with."""
    first, second, *_ = world(identities, 0, pair)
    return {name: protocol.encode_scopes(plan, site)["global"] for name, site in (("P", first), ("Q", second))}


def honest_sum(slots: Mapping[tuple[str, str], Slots], scope: str, names: Sequence[str], modulus: int) -> Slots:
    total = np.zeros_like(slots[names[0], scope])
    for name in names:
        total = (total + slots[name, scope]) % np.uint64(modulus)
    return total


def check_worlds_sum_alike(outcomes: Sequence[Any]) -> None:
    for scope in SHARED_BY_THE_TWO:
        zero, one = (outcome.sites[A].summed[scope] for outcome in outcomes)
        assert (zero.mean == one.mean).all()
        assert (zero.contributors, zero.weight) == (one.contributors, one.weight)
        assert np.abs(zero.mean).max() > 0


def check_all_known_masks_came_off(heard: Overheard, survivors: Sequence[str]) -> None:
    """The masks left on honest updates cancel in their sum, so nothing that could be taken off was forgotten."""
    view = view_of_the_colluders(heard)
    modulus = view.federation.plan.packing.params.plain_modulus
    left = take_off_masks(view, decrypt_single(view))
    sent = {(name, scope): slots for name, scopes in heard.tagged.items() for scope, slots in scopes.items()}
    for scope in SHARED_BY_THE_TWO:
        honest = [name for name in survivors if (name, scope) in left and name != COLLUDER]
        assert (honest_sum(left, scope, honest, modulus) == honest_sum(sent, scope, honest, modulus)).all()
    assert (left[COLLUDER, "global"] == sent[COLLUDER, "global"]).all()
    for name in (A, B):
        assert (left[name, "global"] != sent[name, "global"]).mean() > 0.99


def trials(plan, identities, count: int, *, vanish: Collection[str] = (), inner_lock: bool = True):
    """The adversary's statistics and whether it was right, in both worlds of each pair."""
    for number in range(count):
        pair = draw_pair(number)
        slots_of = hypotheses(plan, identities, pair)
        outcomes = []
        for which in (0, 1):
            heard, outcome = play(plan, world(identities, which, pair), vanish=vanish, inner_lock=inner_lock)
            outcomes.append(outcome)
            if inner_lock and number == 0:
                check_all_known_masks_came_off(heard, [name for name in KINDS if name not in vanish])
            found = statistics(view_of_the_colluders(heard), slots_of)
            yield found, guess(found) == which, 1 if which == 0 else -1
        check_worlds_sum_alike(outcomes)


VANISHED = pytest.mark.parametrize("vanish", [(), (C,)], ids=["all survive", "C vanishes"])


@VANISHED
def test_coordinator_and_one_site_guess_no_better_than_a_coin(plan, identities, vanish):
    played = list(trials(plan, identities, PAIRS, vanish=vanish))
    found = np.array([each for each, _, _ in played])
    towards_truth = found * np.array([[sign] for _, _, sign in played])
    assert found.shape == (2 * PAIRS, 12)
    assert np.abs(found).max() < SIGMAS
    assert sum(right for _, right, _ in played) in RIGHT_BY_CHANCE
    # All rounds together: d itself is 38 sigma in one round, so a leak of a fiftieth of it would show here.
    pooled = towards_truth.sum(axis=0) / np.sqrt(2 * PAIRS)
    assert np.abs(pooled).max() < SIGMAS
    assert 0.8 < found.std() < 1.2  # the statistics are what they are said to be


@VANISHED
def test_the_same_adversary_is_always_right_without_the_inner_lock(plan, identities, vanish):
    for found, right, sign in trials(plan, identities, 5, vanish=vanish, inner_lock=False):
        assert right
        assert sign * max(found, key=abs) > 60


def test_the_leftovers_are_spread_evenly_over_all_residues(plan, identities):
    heard, _ = play(plan, world(identities, 0, draw_pair(0)))
    view = view_of_the_colluders(heard)
    modulus = view.federation.plan.packing.params.plain_modulus
    left = take_off_masks(view, decrypt_single(view))
    for name in (A, B, C):
        counts = np.histogram(left[name, "global"], bins=32, range=(0, modulus))[0]
        expected = left[name, "global"].size / 32
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_square - 31) / np.sqrt(2 * 31) < 2 * SIGMAS  # its tail is longer than a Gaussian's


# What the adversary lacks: one secret more, and it would win


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("stolen", ["mask_seed", "share_key"])
def test_one_honest_key_more_and_the_adversary_wins(plan, identities, which, stolen):
    """The mask key opens A's adapter update, whose self mask is revealed anyway; the share key opens its head's."""
    pair = draw_pair(0)
    heard, _ = play(plan, world(identities, which, pair))
    view = view_of_the_colluders(heard)
    useless = {"mask_seed": bytes(16), "self_seed": heard.secrets[A].self_seed, "share_key": bytes(31) + b"\1"}
    keys = RoundSecrets(**{**useless, stolen: getattr(heard.secrets[A], stolen)})
    found = statistics(replace(view, secrets={**view.secrets, A: keys}), hypotheses(plan, identities, pair))
    assert guess(found) == which
    adapter, head = np.abs(found[:3]), np.abs(found[3:6])
    assert (adapter.max() > 30, head.max() > 30) == (stolen == "mask_seed", stolen == "share_key")


def late_update(plan, identities, sites, heard: Overheard) -> bytes:
    """What C would have sent, had it not vanished; a coordinator may hold it back and say that C vanished."""
    site = next(each for each in sites if each.identity.name == C)
    keys = {each.site: each for each in carried(view_of_the_colluders(heard), RoundKeys)}
    reply = protocol.submit(heard.federation, site, heard.graph, heard.secrets[C], keys, heard.group_keys[C])
    return msgspec.msgpack.encode(reply)


@pytest.mark.parametrize("steal_self_mask", [False, True], ids=["as it is", "with C's self mask"])
def test_an_update_held_back_stays_closed_though_its_mask_key_is_known(plan, identities, steal_self_mask):
    """C is said to have vanished, so its mask key was rebuilt; its self mask is what still hides its update."""
    sites = world(identities, 0, draw_pair(0))
    heard, _ = play(plan, sites, vanish=(C,))
    heard.carried.append(late_update(plan, identities, sites, heard))
    view = view_of_the_colluders(heard)
    known = rebuild(view)
    assert known[C, MASK_KEY] == heard.secrets[C].mask_seed
    assert (C, SELF_MASK) not in known
    assert not any((name, MASK_KEY) in known for name in (A, B))
    if steal_self_mask:
        view = replace(view, secrets={**view.secrets, C: heard.secrets[C]})
    sent = protocol.encode_scopes(plan, sites[list(KINDS).index(C)])["global"]
    modulus = plan.packing.params.plain_modulus
    left = take_off_masks(view, decrypt_single(view))[C, "global"]
    other = (sent + np.uint64(modulus // 2)) % np.uint64(modulus)
    found = correlate(left, sent, other, modulus)
    assert found > 30 if steal_self_mask else abs(found) < SIGMAS


def test_of_no_honest_site_both_secrets_are_rebuilt(plan, identities):
    for vanish in ((), (C,)):
        heard, _ = play(plan, world(identities, 0, draw_pair(0)), vanish=vanish)
        known = rebuild(view_of_the_colluders(heard))
        for name in (A, B, C):
            secrets = heard.secrets[name]
            assert (known.get((name, SELF_MASK)) == secrets.self_seed) == (name not in vanish)
            assert (known.get((name, MASK_KEY)) == secrets.mask_seed) == (name in vanish)


# The limit


def test_a_head_shared_by_two_sites_does_not_hide_one_from_the_other(plan, identities):
    """Not protected, and documented: of two hospitals that share a head, the colluder reads the other's update of it.

    No mask can help: the sum less the colluder's own update is the other's. The adapter, summed over all four sites,
    stays closed, and so does the head that the two honest banks share. It takes a plan that says
    ``min_contributors = 2``, below colluders + 2.
    """
    heard, outcome = play(plan, world(identities, 0, draw_pair(0)))
    view = view_of_the_colluders(heard)
    left = take_off_masks(view, decrypt_single(view))
    assert (left[C, "kind/hospital"] == heard.tagged[C]["kind/hospital"]).all()
    assert (left[C, "global"] != heard.tagged[C]["global"]).mean() > 0.99
    assert (left[A, "kind/bank"] != heard.tagged[A]["kind/bank"]).mean() > 0.99

    # without any key, from what the colluder is told as a member: the mean of two, and its own update
    told = outcome.sites[COLLUDER].summed["kind/hospital"].mean
    mine, theirs = (next(s for s in world(identities, 0, draw_pair(0)) if s.identity.name == n) for n in (COLLUDER, C))
    assert np.allclose(2 * told - mine.updates["kind/hospital"], theirs.updates["kind/hospital"], atol=1e-6)


def test_by_default_a_head_of_two_sites_stays_at_home(plan, identities):
    cohort = plan.spec.cohort.model_copy(
        update={"min_contributors": type(plan.spec.cohort)(max_sites=4).min_contributors}
    )
    default = check_plan(plan.spec.model_copy(update={"cohort": cohort}))
    sites = [
        replace(site, scopes={"global": site.scopes["global"]}, updates={"global": site.updates["global"]})
        for site in world(identities, 0, draw_pair(0))
    ]
    heard, outcome = play(default, sites)
    assert heard.federation.shared_scopes("hospital") == ("global",)
    assert all(set(site.summed) == {"global"} for site in outcome.sites.values())
