"""A round at a site, in the order of the files of ``fedseek/``:

    exchange A, play_round   last sums -> decrypt -> apply -> evaluate -> train -> encode -> tag -> mask -> encrypt -> update
                             and ahead of time: shares for the next round, keys for the one after
    exchange B, unmask       survivors -> one of two shares for each neighbour

All that the coordinator said is checked before training: what is refused costs no time and no privacy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from fedseek.cohort import RoundGraph, presence_message, round_graph
from fedseek.deal import HeldShares, RoundSecrets, open_box
from fedseek.encode import Float32Vector, Slots
from fedseek.encrypt import encrypt_update
from fedseek.errors import CohortTooSmall, Malformed, WrongRound
from fedseek.groupkey import GroupKey
from fedseek.he.ciphertext import ScopedCiphertexts
from fedseek.identity.signing import CONTEXT_ADAPTER, CONTEXT_PRESENCE, sign
from fedseek.mask import mask_slots
from fedseek.messages import (
    RoundRequest,
    SharesDealt,
    SharesRevealed,
    UnmaskRequest,
    UpdateReply,
    digest_message,
)
from fedseek.plan import GLOBAL_SCOPE
from fedseek.reveal import reveal_shares
from fedseek.tag import add_tags, tag_key
from fedseek_site.answering import answer_prompts
from fedseek_site.entering import deal_round, draw_round
from fedseek_site.metrics import metrics_of
from fedseek_site.run import SiteRun, timed
from fedseek_site.state import RoundState, SiteState
from fedseek_site.sums import Applied, apply_previous, encryption_key, remember, take_group_keys
from fedseek_site.training import (
    LocalWork,
    encode,
    evaluate_weights,
    has_steps_left,
    rest,
    train,
)
from fedseek_site.voting import is_resting, votes_to_stop, watch_loss
from fedseek_site.weights import to_values


@dataclass(frozen=True, slots=True)
class Entered:
    """What this site brings to a round that it takes part in.

    Attributes:
        mine: what it prepared.
        secrets: of the round, for one update.
        graph: of the round.
        participants: who masks with whom, in roster order.
    """

    mine: RoundState = field(repr=False)
    secrets: RoundSecrets = field(repr=False)
    graph: RoundGraph
    participants: tuple[str, ...]


def play_round(run: SiteRun, state: SiteState, request: RoundRequest) -> tuple[SiteState, UpdateReply]:
    """Exchange A: apply what came of the rounds before, train, answer with the masked and encrypted update.

    Raises:
        WrongRound: not a round that this site dealt shares for, or sums of other rounds than those not yet applied.
        CohortTooSmall: fewer participants than the round needs; nothing is trained.
        WrongKey: an envelope, a box or a key that is not what it should be, or an old epoch.
        Malformed, Tampered: keys, boxes or sums that are not those announced.
        GuardTripped: a privacy guard tripped; nothing is sent.
    """
    number, seconds = request.round, dict[str, float]()
    entered = _entered(run, state, request)
    with timed(seconds, "shares"):
        held = _open_boxes(run, entered, request)
        coming, shares = _prepare_next(run, state, request)
    keys = take_group_keys(run, state, request.envelopes)
    key = encryption_key(run, keys, request.epoch)
    applied = apply_previous(run, state, keys, request.previous, until=number - 1, seconds=seconds)
    before = applied.scopes
    with timed(seconds, "evaluate"):
        evaluation = evaluate_weights(run, before, number=number - 1)
        answers = answer_prompts(run, number=number - 1)
    watch = watch_loss(run.plan, state.watch, evaluation.mean_loss, number=number)
    with timed(seconds, "train"):
        work = _work(run, state, applied, number)
    with timed(seconds, "encode"):
        votes = votes_to_stop(run.plan, watch)
        metrics = metrics_of(evaluation, answers, votes=votes, packing=run.plan.packing)
        encoded, guards_passed = encode(run, _to_send(run, work, entered), before, metrics, number=number)
    update = _protect(run, entered, encoded, key, seconds=seconds)
    _report_round(run, number, work, seconds, update)

    after = remember(run, state, applied)
    digests = after.digests
    vouched = presence_message(
        run.federation, entered.graph, entered.participants, epoch=key.epoch, digest=digests[GLOBAL_SCOPE]
    )
    ahead = coming.get(number + 2)
    reply = UpdateReply(
        run=run.name,
        site=run.me,
        round=number,
        epoch=key.epoch,
        digests=digests,
        signature=sign(run.identity, CONTEXT_ADAPTER, digest_message(run.name, number, digests)),
        presence=sign(run.identity, CONTEXT_PRESENCE, vouched),
        update=update,
        shares=shares,
        keys=ahead.keys if ahead else None,
    )
    # the update is made: its secrets are needed no more, not even by this site; nor, in the closing round, any shares
    prepared, participants = entered.mine, entered.participants
    kept = held if number < run.closing_round else {}
    sent = replace(
        prepared, secrets=None, peers={}, held=kept, participants=participants, epoch=key.epoch, vouched=vouched
    )
    rounds = {**{later: each for later, each in state.rounds.items() if later > number}, **coming, number: sent}
    after = _after_round(after, work, keys, key, rounds=rounds, number=number)
    return replace(after, watch=watch, guards_passed=tuple(sorted({*after.guards_passed, *guards_passed}))), reply


def unmask(run: SiteRun, state: SiteState, request: UnmaskRequest) -> tuple[SiteState, SharesRevealed]:
    """Exchange B: reveal one share for each neighbour, and forget both.

    Raises:
        WrongRound: not the round this site last sent an update of, the closing round, revealed already, or survivors
            it did not mask with.
        CohortTooSmall: fewer survivors than the round needs.
        WrongKey: a neighbour that is said to have survived did not sign for the same participants, epoch and adapter.
    """
    mine = state.rounds.get(request.round)
    if request.round == run.closing_round:
        raise WrongRound("asked to reveal shares of the closing round, whose heads need no unmasking")
    if mine is None or request.round != state.last_sent or mine.survivors:
        raise WrongRound(
            f"asked to reveal shares of round {request.round}; this site last sent an update of round "
            f"{state.last_sent}" + (" and has revealed its shares" if mine is not None and mine.survivors else "")
        )
    reply = reveal_shares(
        request,
        mine.held,
        run.federation,
        round_graph(run.federation, request.round, mine.listed),
        participants=mine.participants,
        vouched=mine.vouched,
        identity=run.identity,
    )
    revealed = replace(mine, held={}, survivors=run.federation.names(request.survivors))
    return replace(state, rounds={**state.rounds, request.round: revealed}), reply


def _entered(run: SiteRun, state: SiteState, request: RoundRequest) -> Entered:
    """Check that this site can take part in the round, with these others."""
    number, mine = request.round, state.rounds.get(request.round)
    if not state.last_sent < number <= run.closing_round:
        raise WrongRound(
            f"got a request for round {number}; this site's last one is {state.last_sent}, the run's {run.closing_round}"
        )
    if mine is None or mine.secrets is None or not mine.listed:
        raise WrongRound(f"got a request for round {number}, for which this site has dealt no shares")
    participants = run.federation.names(request.participants)
    strangers = sorted(set(participants) - set(mine.listed))
    if strangers or run.me not in participants:
        raise WrongRound(
            f"round {number}: the participants "
            + (f"hold {', '.join(strangers)}, not on the key list" if strangers else "lack this site")
        )
    graph = round_graph(run.federation, number, mine.listed)
    if len(participants) < graph.min_survivors:
        raise CohortTooSmall(
            f"round {number}: {len(participants)} sites take part, wanted at least {graph.min_survivors}"
        )
    return Entered(mine, mine.secrets, graph, participants)


def _open_boxes(run: SiteRun, entered: Entered, request: RoundRequest) -> dict[str, HeldShares]:
    """The shares this site holds in the round: of each neighbour that takes part, and its own."""
    mine = entered.mine
    wanted = set(entered.graph.neighbours[run.me]) & set(entered.participants)
    if set(request.boxes) != wanted:
        raise Malformed(
            f"round {request.round}: got boxes of {sorted(request.boxes)}, wanted those of {sorted(wanted)}"
        )
    opened = {
        dealer: open_box(box, entered.secrets, mine.peers[dealer], run.federation, receiver=mine.keys)
        for dealer, box in request.boxes.items()
    }
    return {**mine.held, **opened}


def _prepare_next(
    run: SiteRun, state: SiteState, request: RoundRequest
) -> tuple[dict[int, RoundState], SharesDealt | None]:
    """Deal for the next round, if this site is on its key list, and draw keys for the one after, if there is one."""
    number, listed = request.round, run.federation.names(request.next_listed)
    coming: dict[int, RoundState] = {}
    shares = None
    if number < run.closing_round and run.me in listed:
        coming[number + 1], shares = deal_round(run, state, number + 1, listed=listed, keys=request.next_keys)
    elif request.next_keys or (listed and number == run.closing_round):
        raise Malformed(f"round {number}: got a key list for the next round, which this site is not in")
    if number + 2 <= run.closing_round:
        coming[number + 2] = state.rounds.get(number + 2) or draw_round(run, number + 2)
    return coming, shares


def _work(run: SiteRun, state: SiteState, applied: Applied, number: int) -> LocalWork:
    """Train, or in the closing round rest; and in the rounds after the sites voted to stop.

    Where a coordinator was lost, rounds were trained whose sums never came; a site trains no more steps of a stage than the
    plan has all the same, so in as many of the stage's last rounds its update is zeros.
    """
    if number == run.closing_round:
        return rest(run, state, applied.scopes, scopes=[scope for scope in run.shared if scope == run.head])
    if is_resting(run.plan, applied.resting_since, number):
        run.observe({"event": "rests", "round": number})
        return rest(run, state, applied.scopes, scopes=run.shared)
    if has_steps_left(run, state, number=number):
        return train(run, state, applied.scopes, number=number)
    stage = run.plan.stage_of(number)
    run.observe({"event": "plan-spent", "round": number, "steps": state.steps_accounted[stage.index]})
    return rest(run, state, applied.scopes, scopes=run.shared)


def _to_send(run: SiteRun, work: LocalWork, entered: Entered) -> dict[str, Float32Vector]:
    """The updates of those scopes that enough sites of this kind take part in; another head waits for the next round."""
    sent = run.federation.summed_scopes(entered.participants)
    waiting = sorted(set(work.updates) - set(sent))
    if waiting:
        run.observe({"event": "head-waits", "round": entered.graph.number, "scopes": waiting})
    return {scope: update for scope, update in work.updates.items() if scope in sent}


def _protect(
    run: SiteRun, entered: Entered, encoded: dict[str, Slots], key: GroupKey, *, seconds: dict[str, float]
) -> tuple[ScopedCiphertexts, ...]:
    """Tag, mask and encrypt one update: from here on no single party can read it.

    ``encoded`` is emptied on the way: of a large update no more than two forms are in memory at once.
    """
    number, modulus = entered.graph.number, run.plan.packing.params.plain_modulus
    with timed(seconds, "tag"):
        keys = {scope: tag_key(key.secret, run.federation, number, scope) for scope in encoded}
        tagged = {scope: add_tags(encoded.pop(scope), keys[scope], site=run.me, modulus=modulus) for scope in keys}
    with timed(seconds, "mask"):
        masked = mask_slots(
            tagged,
            entered.secrets,
            entered.mine.peers,
            run.federation,
            entered.graph,
            participants=entered.participants,
            me=run.me,
        )
        del tagged
    with timed(seconds, "encrypt"):
        return encrypt_update(key.secret, masked)


def _after_round(
    state: SiteState,
    work: LocalWork,
    keys: Mapping[int, GroupKey],
    key: GroupKey,
    *,
    rounds: dict[int, RoundState],
    number: int,
) -> SiteState:
    """The state once the update of round ``number`` is made, from the one in which all sums are applied.

    Keys of older epochs open nothing more and are dropped.
    """
    return replace(
        state,
        scopes=to_values(work.scopes),
        steps_done=work.steps_done,
        steps_accounted=work.steps_accounted,
        guards_passed=work.guards_passed,
        last_sent=number,
        group_keys={epoch: each.to_bytes() for epoch, each in keys.items() if epoch >= key.epoch},
        rounds=rounds,
    )


def _report_round(
    run: SiteRun, number: int, work: LocalWork, seconds: dict[str, float], update: Sequence[ScopedCiphertexts]
) -> None:
    spend = run.plan.spend_of(work.steps_accounted)
    run.observe(
        {
            "event": "round" if number < run.closing_round else "closed",
            "round": number,
            "seconds": seconds,
            "epsilon": spend.epsilon() if spend else None,
            "bytes_up": sum(len(one) for scoped in update for one in scoped.ciphertexts),
        }
    )
