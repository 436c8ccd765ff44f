"""Two banks and two hospitals that enter a round, and the same round in plaintext; shared by tests of the protocol."""

from functools import reduce

import msgspec
import numpy as np

from fedseek.apply import ScopeState
from fedseek.encode import UpdateLayout, encode_update
from fedseek.identity.keys import SiteIdentity
from simulations.protocol import Participant

RUN = "试运行"
KINDS = {"北岸银行": "bank", "harbour-bank": "bank", "仁济医院": "hospital", "st-anna": "hospital"}
LAYOUTS = {
    "global": UpdateLayout("global", (("lora_B", (40, 50)), ("lora_B.二", (7,)))),
    "kind/bank": UpdateLayout("kind/bank", (("head.weight", (2, 8)),), ("held_back_count",)),
    "kind/hospital": UpdateLayout("kind/hospital", (("head.weight", (3, 8)),), ("held_back_count",)),
}
RANGE = 0.5
WEIGHTS = {"北岸银行": 10, "harbour-bank": 3, "仁济医院": 7, "st-anna": 1}


def start(scope):
    layout, rng = LAYOUTS[scope], np.random.default_rng([5, len(scope)])
    weights = rng.standard_normal(layout.num_values).astype(np.float32)
    return ScopeState(layout, weights, np.zeros(layout.num_values), RANGE)


def participants(*, scopes=None, seed=0, scale=0.02):
    """Four sites with updates of their own; ``scopes`` by site continues from an earlier round."""
    sites = []
    for number, (name, kind) in enumerate(KINDS.items()):
        mine = scopes[name] if scopes else {scope: start(scope) for scope in ("global", f"kind/{kind}")}
        rng = np.random.default_rng([seed, number])
        updates = {
            scope: (scale * rng.standard_normal(state.layout.num_values)).astype(np.float32)
            for scope, state in mine.items()
        }
        sites.append(
            Participant(
                SiteIdentity.generate(name, kind),
                mine,
                updates,
                metrics={f"kind/{kind}": {"held_back_count": 10.0 * (number + 1)}},
                weight=WEIGHTS[name],
                rng=np.random.default_rng([seed, number, 1]),
            )
        )
    return sites


def members_of(scope, sites):
    return [site for site in sites if scope in site.scopes]


def integer_sums(plan, sites, *, seed=0):
    """The same round without encryption: the slots that each site encodes, added as integers."""
    slots = {}
    for number, site in enumerate(sites):
        rng = np.random.default_rng([seed, number, 1])  # the rounding draws of the encrypted run
        for scope, state in site.scopes.items():
            encoded = encode_update(
                site.updates[scope],
                state.layout,
                packing=plan.packing,
                value_range=state.value_range,
                weight=site.weight,
                weight_cap=plan.weight_cap,
                metrics=site.metrics.get(scope, {}),
                rng=rng,
            )
            slots.setdefault(scope, []).append(encoded)
    return {scope: reduce(np.add, each) for scope, each in slots.items()}


def messages(outcome, form):
    """All messages of one form that the coordinator carried."""
    found = []
    for data in outcome.carried:
        try:
            found.append(msgspec.msgpack.decode(data, type=form))
        except msgspec.ValidationError:
            continue
    return found
