import random

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedseek.dp.randomness import secret_generator


def test_the_stream_is_aes_in_counter_mode():
    generator = secret_generator().bit_generator
    key = generator.state["s"]["seed"][:2].tobytes()
    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305
    expected = b"".join(cipher.update(counter.to_bytes(16, "little")) for counter in range(64))
    assert generator.random_raw(128).astype("<u8").tobytes() == expected


def test_every_generator_has_a_key_of_its_own():
    streams = set()
    for _ in range(20):
        random.seed(7), np.random.seed(7), torch.manual_seed(7)
        streams.add(secret_generator().bytes(32))
    assert len(streams) == 20


def test_no_seed_can_be_handed_over():
    with pytest.raises(TypeError):
        secret_generator(7)
