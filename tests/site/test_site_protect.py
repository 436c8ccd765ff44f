"""An update on its way out of a site: tagged, masked and encrypted, and in memory no more often than it has to be."""

from types import SimpleNamespace

import numpy as np
from masked_round import federate, make_identities, play_round

from fedseek.encrypt import encrypt_update
from fedseek.he.ciphertext import CiphertextForm, load_ciphertext, save_ciphertext
from fedseek.he.keys import SecretKey, decrypt_slots
from fedseek.tag import add_tags, tag_key
from fedseek_site import rounds

ME = "harbour-bank"


def test_an_update_is_used_up_on_its_way(tiny_plan, monkeypatch):
    identities = make_identities(4)
    federation = federate(tiny_plan(), identities)
    played, params = play_round(federation, identities), federation.plan.packing.params
    key = SecretKey.generate(params)
    encoded = {scope: np.arange(5000, dtype=np.uint64) + 9 for scope in ("global", "kind/bank")}
    for slots in encoded.values():
        slots[:2] = 0
    tagged = {
        scope: add_tags(slots, tag_key(key, federation, 1, scope), site=ME, modulus=params.plain_modulus)
        for scope, slots in encoded.items()
    }
    wanted = played.mask_one(ME, tagged, played.names)

    seen = []

    def look(secret, masked):
        seen.append((dict(encoded), sorted(masked)))
        return encrypt_update(secret, masked)

    monkeypatch.setattr(rounds, "encrypt_update", look)
    run = SimpleNamespace(plan=federation.plan, federation=federation, me=ME)
    entered = rounds.Entered(
        mine=SimpleNamespace(peers={peer: played.keys[peer] for peer in played.graph.peers(ME)}),
        secrets=played.secrets[ME],
        graph=played.graph,
        participants=played.names,
    )
    seconds = {}
    update = rounds._protect(run, entered, encoded, SimpleNamespace(secret=key), seconds=seconds)
    assert seen == [({}, ["global", "kind/bank"])], "what was encoded is gone before the ciphertexts are made"
    assert set(seconds) == {"tag", "mask", "encrypt"}
    for scoped in update:
        sums = [
            save_ciphertext(load_ciphertext(params, data, form=CiphertextForm.FRESH)) for data in scoped.ciphertexts
        ]
        assert (decrypt_slots(key, sums)[:5000] == wanted[scoped.scope]).all()
