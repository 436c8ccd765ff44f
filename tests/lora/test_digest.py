import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseek.lora.digest import tensors_digest

TENSORS = {
    "encoder.q.lora_B": np.array([[1.0, -2.5], [0.0, 3e-8]], np.float32),
    "头.weight": np.arange(3, dtype=np.float32),
}
KNOWN = "cba7036331ae5b5378d137461d2402740174dd8c4d321adb8a2379e0141a7575"  # of TENSORS


def changed(**tensors: np.ndarray) -> dict[str, np.ndarray]:
    return {**TENSORS, **tensors}


def test_the_digest_is_known_so_that_no_version_or_machine_changes_it_unseen():
    assert tensors_digest(TENSORS).hex() == KNOWN


def test_the_digest_is_what_the_docstring_says():
    expected = hashlib.sha256(b"fedseek/tensors/v1\0")
    for name, shape in (("encoder.q.lora_B", "2,2"), ("头.weight", "3")):
        header = f"{name}\0{shape}\0".encode()
        expected.update(len(header).to_bytes(8, "big") + header + TENSORS[name].astype("<f4").tobytes())
    assert tensors_digest(TENSORS) == expected.digest()


def test_order_strides_and_byte_order_in_memory_do_not_matter():
    digest = tensors_digest(TENSORS)
    assert tensors_digest(dict(reversed(TENSORS.items()))) == digest
    assert tensors_digest({name: value.astype(">f4") for name, value in TENSORS.items()}) == digest
    assert tensors_digest({name: np.asfortranarray(value) for name, value in TENSORS.items()}) == digest
    wide = {name: np.repeat(value, 2, axis=-1)[..., ::2] for name, value in TENSORS.items()}
    assert tensors_digest(wide) == digest


def test_name_shape_and_every_bit_of_a_value_matter():
    name = "encoder.q.lora_B"
    value = TENSORS[name]
    nudged = value.copy()
    nudged[1, 0] = -0.0
    others = [
        {"encoder.k.lora_B": value, "头.weight": TENSORS["头.weight"]},
        {name: value},
        changed(extra=np.zeros(0, np.float32)),
        changed(**{name: value.reshape(4)}),
        changed(**{name: value.reshape(1, 4)}),
        changed(**{name: value.T}),
        changed(**{name: nudged}),
        changed(**{name: np.nextafter(value, np.float32(9))}),
        {},
    ]
    digests = {tensors_digest(other) for other in [TENSORS, *others]}
    assert len(digests) == 1 + len(others)


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=12), st.data())
def test_values_cannot_move_from_one_tensor_to_the_next_unseen(values, data):
    cut, other = data.draw(st.lists(st.integers(0, len(values)), min_size=2, max_size=2, unique=True))

    def split(at: int) -> dict[str, np.ndarray]:
        return {"a": np.array(values[:at], np.float32), "b": np.array(values[at:], np.float32)}

    assert tensors_digest(split(cut)) != tensors_digest(split(other))
