"""Releases made of nothing but keys and numpy: as real as those of a cohort, for tests that need many of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors.numpy import save

from fedseek.cohort import Federation
from fedseek.daemon.audit_lines import COORDINATOR, heads_digest, sign_head
from fedseek.evidence import bundle, heads_bytes
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.identity.signing import CONTEXT_HEADS_SEEN, CONTEXT_RELEASE, sign, sign_with
from fedseek.lora.adapter_file import CONFIG_FILE, WEIGHTS_FILE, largest_value, read_adapter
from fedseek.lora.digest import tensors_digest
from fedseek.messages import release_message
from fedseek.release import check_release, released_config, released_tensors, writes_words
from fedseek.statement import CanaryAudit, Outcome, privacy_statement, statement_bytes, wanted_guards

SITES = (("北岸银行", "bank"), ("harbour-bank", "bank"), ("仁济医院", "hospital"), ("st-anna", "hospital"))
RUN = "试运行-1"
LAYER = "base_model.model.encoder.layer.0.attention.self.query"
LAYER_OF_WORDS = "base_model.model.model.layers.0.self_attn.q_proj"  # of a causal language model


def adapter_bytes(value: float = 0.25, *, layer: str = LAYER, **more: np.ndarray) -> bytes:
    """Weights of one linear layer; ``value`` is all over lora_B."""
    matrices = {"lora_A": np.ones((2, 4), np.float32), "lora_B": np.full((4, 2), value, np.float32)}
    return save({**{f"{layer}.{name}.weight": each for name, each in matrices.items()}, **more}, {"format": "pt"})


def outcome_after(
    plan: Any, identity: SiteIdentity, roster: Roster, adapter: dict[str, bytes], **changes: Any
) -> Outcome:
    """What a run has come to at a site if all went well; ``changes`` is what did not."""
    tensors = read_adapter(adapter[WEIGHTS_FILE])
    digests = {"global": tensors_digest(released_tensors(plan, tensors))}
    shared = Federation.of(RUN, plan, roster).shared_scopes(identity.kind)
    digests |= {scope: hashlib.sha256(scope.encode()).digest() for scope in shared if scope != "global"}
    steps = tuple(stage.num_steps for stage in plan.stages)
    asked = plan.num_canaries
    found: dict[str, Any] = {
        "run": RUN,
        "roster_digest": roster.digest().hex(),
        "site": identity.name,
        "kind": identity.kind,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in adapter.items()},
        "digests": digests,
        "contributors": roster.names,
        "steps": steps,
        "spend": plan.spend_of(steps),
        "steps_spent": steps,
        "guards_passed": tuple(sorted(wanted_guards(plan))),
        "audit": None,
        "utility": 0.9,
        "largest_value": largest_value(tensors, seed=plan.seed_for("lora")),
    }
    if asked:
        found["audit"] = CanaryAudit(
            canaries=asked, confidence=plan.spec.audit.confidence, released_adapter=0.5, every_round=1.25
        )
    return Outcome(**{**found, **changes})


@dataclass
class Signers:
    """Four sites of a roster, and an adapter that they release."""

    plan: Any
    identities: dict[str, SiteIdentity] = field(repr=False)
    roster: Roster = field(repr=False)
    adapter: dict[str, bytes] = field(repr=False)

    @classmethod
    def of(cls, plan: Any, *, value: float = 0.25) -> Signers:
        identities = {name: SiteIdentity.generate(name, kind) for name, kind in SITES}
        roster = Roster.of(identity.public() for identity in identities.values())
        layer = LAYER_OF_WORDS if writes_words(plan) else LAYER
        adapter = {CONFIG_FILE: released_config(plan), WEIGHTS_FILE: adapter_bytes(value, layer=layer)}
        return cls(plan, identities, roster, adapter)

    def outcome(self, site: str, **changes: Any) -> Outcome:
        return outcome_after(self.plan, self.identities[site], self.roster, self.adapter, **changes)

    def statement(self, site: str, **changes: Any) -> Any:
        outcome = self.outcome(site, **changes)
        return privacy_statement(self.plan, outcome, checks=check_release(self.plan, outcome))

    def sign(self, site: str, statement: Any, *, by: SiteIdentity | None = None) -> tuple[bytes, bytes]:
        """The bytes of a statement and the site's signature, whatever it says."""
        document = statement_bytes(statement)
        digests = {scope: bytes.fromhex(digest) for scope, digest in statement.tensors.items()}
        message = release_message(statement.run, digests, document)
        return document, sign(by or self.identities[site], CONTEXT_RELEASE, message)

    def signed(self) -> dict[str, tuple[bytes, bytes]]:
        return {site: self.sign(site, self.statement(site)) for site in self.identities}

    def heads(self, *, without: tuple[str, ...] = ()) -> bytes:
        """Heads of all records and the coordinator's, countersigned by every site that is not left out."""
        coordinator = SiteIdentity.generate("x", "y").signing_key

        def head(name: str, key: Any) -> Any:
            digest = hashlib.sha256(name.encode()).digest()
            return sign_head(
                lambda context, message: sign_with(key, context, message), name, 17, digest, 1_795_373_365_123
            )

        listed = [head(COORDINATOR, coordinator)]
        listed += [head(name, identity.signing_key) for name, identity in self.identities.items()]
        noted = heads_digest(listed)
        seen = {
            name: sign(who, CONTEXT_HEADS_SEEN, noted) for name, who in self.identities.items() if name not in without
        }
        return heads_bytes(listed, seen)

    def files(self, *, heads: bool = True, **signed: tuple[bytes, bytes]) -> dict[str, bytes]:
        """A whole release; ``signed`` replaces what sites signed."""
        everything = {**self.signed(), **signed}
        return bundle(self.plan, self.roster, self.adapter, everything, heads=self.heads() if heads else None)
