"""Sums: what the coordinator says of the rounds before, checked against what this site knows, decrypted and applied.

Of each round the coordinator announces who is in it, or that it was given up. A site that took part knows whom it
masked with, under which key it encrypted and for whom it revealed shares: an announcement that differs is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from fedseek.apply import ScopeState, apply_sums, enter_stage
from fedseek.cohort import round_graph
from fedseek.decrypt import decrypt_sum
from fedseek.encode import SummedUpdate
from fedseek.errors import CohortTooSmall, Malformed, WrongKey, WrongRound
from fedseek.groupkey import GroupKey, check_age, open_group_key
from fedseek.messages import AggregateDown
from fedseek.plan import GLOBAL_SCOPE
from fedseek_site.answering import report_answers_of_kind
from fedseek_site.canary_audit import watch_sum
from fedseek_site.run import SiteRun, timed
from fedseek_site.state import CanaryState, EarlierAdapter, RoundState, SiteState
from fedseek_site.voting import count_votes, is_resting
from fedseek_site.weights import digests_of, to_scopes, to_values


@dataclass(frozen=True, slots=True)
class Applied:
    """What applying the sums of some rounds came to.

    Attributes:
        until: the last of the rounds.
        scopes: the weights now.
        contributors: positions of the sites whose updates are in the shared ones, ascending.
        before: the shared ones before the last of the rounds.
        canaries: what the sums showed of this site's canaries.
        resting_since: as in the state.
    """

    until: int
    scopes: dict[str, ScopeState] = field(repr=False)
    contributors: tuple[int, ...]
    before: EarlierAdapter | None = field(repr=False)
    canaries: CanaryState | None = field(repr=False)
    resting_since: int = 0


def take_group_keys(run: SiteRun, state: SiteState, envelopes: Mapping[int, bytes]) -> dict[int, GroupKey]:
    """The group keys held, and those in the envelopes, by epoch.

    Raises:
        WrongKey: an envelope does not open, or holds another key than the one held of its epoch.
        Malformed: what is inside is no group key.
    """
    params = run.plan.packing.params
    keys = {epoch: GroupKey.from_bytes(held, epoch=epoch, params=params) for epoch, held in state.group_keys.items()}
    for epoch, envelope in envelopes.items():
        opened = open_group_key(envelope, run.federation, epoch, identity=run.identity)
        held = keys.setdefault(epoch, opened)
        if (held.secret.fingerprint(), held.made_at) != (opened.secret.fingerprint(), opened.made_at):
            raise WrongKey(
                f"got a second group key of epoch {epoch}, this site holds another one",
                hint="two sites made a key of the same epoch, or somebody tries to split the cohort",
            )
    return keys


def encryption_key(run: SiteRun, keys: Mapping[int, GroupKey], epoch: int) -> GroupKey:
    """The key to encrypt under: of the newest epoch, and not too old.

    Raises:
        WrongKey: another epoch was asked for than the newest held, or the key is too old.
    """
    newest = max(keys, default=None)
    if newest is None or epoch != newest:
        raise WrongKey(f"asked to encrypt under the group key of epoch {epoch}, the newest held here is of {newest}")
    check_age(keys[epoch], now=run.clock(), max_days=run.plan.spec.encryption.key_days)
    return keys[epoch]


def apply_previous(
    run: SiteRun,
    state: SiteState,
    keys: Mapping[int, GroupKey],
    previous: Sequence[AggregateDown],
    *,
    until: int,
    seconds: dict[str, float],
) -> Applied:
    """Apply every round since the last one applied, up to round ``until``, in order.

    Rounds that were applied before are passed over: a coordinator that lost this site's last reply sends them again.

    Returns:
        The new weights by scope, and who is in them; a scope without a sum in a round is left as it is, and so are all in
        a round in which the sites rest.

    Raises:
        WrongRound: not exactly those rounds, or one that is not what this site took part in.
        CohortTooSmall, WrongKey, Malformed, Tampered: as ``read_sum``.
    """
    fresh = [down for down in previous if down.round > state.last_applied]
    got, wanted = [down.round for down in fresh], list(range(state.last_applied + 1, until + 1))
    if got != wanted:
        raise WrongRound(f"got the sums of rounds {got[:20]}, wanted those of {wanted[:20]}")
    scopes, before = to_scopes(state.scopes, run.layouts), state.before
    contributors, canaries, resting_since = state.contributors, state.canaries, state.resting_since
    for down in fresh:
        if down.round == until:
            before = _adapter(run, scopes, contributors, number=until - 1)
        if down.survivors:
            with timed(seconds, "decrypt"):
                summed = read_sum(run, state, keys, down, scopes=scopes, among=run.shared)
            rested = is_resting(run.plan, resting_since, down.round)
            with timed(seconds, "apply"):
                after = scopes if rested else apply_sums(scopes, summed, run.plan)
            # a sum without this site says nothing of it
            if not rested and run.me in run.federation.names(down.survivors):
                with timed(seconds, "evaluate"):
                    canaries = watch_sum(run, canaries, scopes, after, number=down.round)
            scopes = after
            contributors = _union(contributors, down.survivors)
            resting_since = count_votes(run.plan, resting_since, down.round, summed)
            _report_applied(run, down, summed)
            report_answers_of_kind(run, summed, number=down.round - 1)
        else:
            _check_given_up(run, down)
        scopes = enter_stage(scopes, run.plan, down.round + 1)
    _report_resting(run, state.resting_since, resting_since)
    return Applied(until, scopes, contributors, before, canaries, resting_since)


def remember(run: SiteRun, state: SiteState, applied: Applied) -> SiteState:
    """The state in which these sums are applied; its weights are for the caller to set, who may have trained a head."""
    return replace(
        state,
        last_applied=applied.until,
        digests=digests_of(applied.scopes, run.shared),
        contributors=applied.contributors,
        before=applied.before,
        canaries=applied.canaries,
        resting_since=applied.resting_since,
    )


def read_sum(
    run: SiteRun,
    state: SiteState,
    keys: Mapping[int, GroupKey],
    down: AggregateDown,
    *,
    scopes: Mapping[str, ScopeState],
    among: Sequence[str],
) -> dict[str, SummedUpdate]:
    """Check the announcement of one round and decrypt its sums.

    Args:
        run: of this site.
        state: says what this site did in that round.
        keys: group keys by epoch.
        down: from the coordinator, untrusted.
        scopes: as they were when the updates were encoded.
        among: the scopes that this site takes part in and that could be in this round.

    Returns:
        Sums of those of the scopes that are open.

    Raises:
        CohortTooSmall: fewer survivors than a sum may have.
        WrongKey: another epoch than this site encrypted under, or one that it holds no key of.
        WrongRound: survivors that differ from what this site knows.
        Malformed, Tampered: not the sums of exactly the open scopes and of exactly the survivors.
    """
    survivors = run.federation.names(down.survivors)
    _check_enough(run, state.rounds.get(down.round), down, survivors)
    _check_as_known(run, state.rounds.get(down.round), down, survivors)
    members = _open_scopes(run, state.rounds.get(down.round), down, survivors, among=among)
    if down.epoch not in keys:
        raise WrongKey(f"round {down.round} is under the group key of epoch {down.epoch}, which this site lacks")
    return decrypt_sum(
        keys[down.epoch].secret,
        down.sums,
        federation=run.federation,
        number=down.round,
        survivors=members,
        layouts={scope: scopes[scope].layout for scope in members},
        value_ranges={scope: scopes[scope].value_range for scope in members},
    )


def _open_scopes(
    run: SiteRun, mine: RoundState | None, down: AggregateDown, survivors: Sequence[str], *, among: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Which sums must be there, and of whom.

    A site that was away does not know who else took part: it takes the heads that are there. They could not be read
    if a site of the kind were missing, and their tags say who is in them.
    """
    participants = mine.participants if mine is not None else ()  # empty: this site was away
    could_open = run.federation.open_scopes(participants or survivors, survivors)
    wanted = {scope: names for scope, names in could_open.items() if scope in among}
    needed = {scope for scope in wanted if participants or scope == GLOBAL_SCOPE}
    got = sorted(each.scope for each in down.sums)
    if len(set(got)) != len(got) or not needed <= set(got) <= set(wanted):
        raise Malformed(f"sums of round {down.round}: got scopes {got}, wanted {sorted(wanted)}")
    return {scope: wanted[scope] for scope in got}


def _adapter(
    run: SiteRun, scopes: Mapping[str, ScopeState], contributors: tuple[int, ...], *, number: int
) -> EarlierAdapter:
    shared = {scope: scopes[scope] for scope in run.shared}
    digests = digests_of(scopes, run.shared)
    return EarlierAdapter(round=number, scopes=to_values(shared), digests=digests, contributors=contributors)


def _union(positions: Iterable[int], others: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted({*positions, *others}))


def _check_given_up(run: SiteRun, down: AggregateDown) -> None:
    if down.sums:
        raise Malformed(f"round {down.round} is announced as given up, and comes with sums")
    run.observe({"event": "given-up", "round": down.round})


def _check_enough(run: SiteRun, mine: RoundState | None, down: AggregateDown, survivors: Sequence[str]) -> None:
    floor = max(run.plan.spec.cohort.min_sites, run.plan.spec.cohort.min_contributors)
    if mine is not None and mine.listed:
        floor = max(floor, round_graph(run.federation, down.round, mine.listed).min_survivors)
    if len(survivors) < floor:
        raise CohortTooSmall(f"sum of round {down.round}: {len(survivors)} sites are in it, wanted at least {floor}")


def _check_as_known(run: SiteRun, mine: RoundState | None, down: AggregateDown, survivors: Sequence[str]) -> None:
    if mine is None or mine.epoch is None:
        if run.me in survivors:
            raise WrongRound(f"round {down.round}: this site is announced as a survivor, it sent no update")
        return
    if down.epoch != mine.epoch:
        raise WrongKey(
            f"round {down.round} is announced under the group key of epoch {down.epoch}, "
            f"this site encrypted under that of epoch {mine.epoch}",
            hint="an old epoch's sum is passed off as a new one's, or the key was changed within a round",
        )
    strangers = sorted(set(survivors) - set(mine.participants))
    if strangers:
        raise WrongRound(f"round {down.round}: {', '.join(strangers)} announced, with whom this site did not mask")
    if mine.survivors and tuple(survivors) != mine.survivors:
        raise WrongRound(
            f"round {down.round}: the sum is announced as that of {', '.join(survivors)}; "
            f"this site revealed shares for {', '.join(mine.survivors)}"
        )


def _report_applied(run: SiteRun, down: AggregateDown, summed: Mapping[str, SummedUpdate]) -> None:
    run.observe(
        {
            "event": "applied",
            "round": down.round,
            "sites": len(down.survivors),
            "bytes_down": sum(len(one) for total in down.sums for one in total.ciphertexts),
            "saturated_fraction": max((update.saturated_fraction for update in summed.values()), default=0.0),
        }
    )


def _report_resting(run: SiteRun, before: int, since: int) -> None:
    if since != before:
        run.observe({"event": "resting", "round": since, "stage": run.plan.stage_of(since).index})
