import msgspec
import numpy as np

from fedseek.encrypt import encrypt_update
from fedseek.he.ciphertext import CiphertextForm, ScopedCiphertexts, load_ciphertext, save_ciphertext
from fedseek.he.keys import SecretKey, decrypt_slots
from fedseek.he.packing import choose_packing

PARAMS = choose_packing(13, 8).params
KEY = SecretKey.generate(PARAMS)


def test_each_scope_is_encrypted_apart_in_slot_order():
    encoded = {"global": np.arange(5000, dtype=np.uint64), "银行": np.arange(10, dtype=np.uint64) + 7}
    update = encrypt_update(KEY, encoded)
    assert [(scoped.scope, len(scoped.ciphertexts)) for scoped in update] == [("global", 2), ("银行", 1)]
    for scoped in update:
        sums = [
            save_ciphertext(load_ciphertext(PARAMS, data, form=CiphertextForm.FRESH)) for data in scoped.ciphertexts
        ]
        slots = encoded[scoped.scope]
        assert (decrypt_slots(KEY, sums)[: slots.size] == slots).all()


def test_update_survives_the_wire():
    update = encrypt_update(KEY, {"global": np.arange(10, dtype=np.uint64)})
    message = msgspec.msgpack.encode(update)
    assert msgspec.msgpack.decode(message, type=tuple[ScopedCiphertexts, ...]) == update


def test_equal_updates_are_not_recognisable():
    encoded = {"global": np.zeros(10, dtype=np.uint64)}
    assert encrypt_update(KEY, encoded) != encrypt_update(KEY, encoded)
