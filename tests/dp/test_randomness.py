import copy
import os
import pickle
import random
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedseek.dp.randomness import PLACE_BYTES, generator_at, is_secret, place_of, secret_generator
from fedseek.errors import Malformed


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


def in_a_forked_child(draw) -> bytes:
    """What ``draw`` gives in a child of this process."""
    near, far = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(far, draw())
        os._exit(0)
    os.close(far)
    with open(near, "rb") as pipe:
        got = pipe.read()
    os.waitpid(child, 0)
    return got


def test_a_forked_child_does_not_repeat_the_stream():
    generator = secret_generator()
    generator.random(5), generator.integers(0, 10, dtype=np.uint32)  # in the middle of a block, half a word kept back
    children = [in_a_forked_child(lambda: generator.bytes(32)) for _ in range(3)]
    assert len({*children, generator.bytes(32)}) == 4
    assert {len(stream) for stream in children} == {32}


def test_a_childs_child_has_a_key_of_its_own_too():
    generator = secret_generator()
    both = in_a_forked_child(lambda: in_a_forked_child(lambda: generator.bytes(32)) + generator.bytes(32))
    assert len({both[:32], both[32:], generator.bytes(32)}) == 3


def test_the_fork_of_multiprocessing_is_one():
    generator, (near, far) = secret_generator(), get_context("fork").Pipe()
    child = get_context("fork").Process(target=lambda: far.send_bytes(generator.bytes(32)))
    child.start()
    got = near.recv_bytes()
    child.join()
    assert got != generator.bytes(32)


def test_the_stream_of_the_parent_goes_on_as_if_there_had_been_no_fork():
    generator = secret_generator()
    key, before = generator.bit_generator.state["s"]["seed"].tolist(), generator.bytes(16)
    in_a_forked_child(lambda: b"")
    assert generator.bit_generator.state["s"]["seed"].tolist() == key
    cipher = Cipher(algorithms.AES(np.array(key[:2], np.uint64).tobytes()), modes.ECB()).encryptor()  # noqa: S305
    assert [before, generator.bytes(16)] == [cipher.update(number.to_bytes(16, "little")) for number in range(2)]


def test_a_generator_is_not_copied():
    for duplicate in (copy.deepcopy, pickle.dumps):
        for original in (secret_generator(), secret_generator().bit_generator):
            with pytest.raises(TypeError, match="repeat the stream"):
                duplicate(original)


def test_only_what_was_made_here_is_secret():
    assert is_secret(secret_generator())
    assert not is_secret(np.random.default_rng())


@pytest.mark.parametrize("words", [0, 1, 7, 8, 9, 63, 64, 1001])
@pytest.mark.parametrize("halves", [0, 1, 2])
def test_a_stream_goes_on_where_its_process_was_killed(words, halves):
    generator = secret_generator()
    generator.bit_generator.random_raw(words)
    generator.integers(0, 7, size=halves, dtype=np.uint32)  # an odd number keeps half a word back
    place = place_of(generator)
    again = generator_at(place)
    assert place_of(again) == place, "and asking moves nothing"
    assert is_secret(again)
    assert len(place) == PLACE_BYTES
    for draw in (lambda g: g.integers(0, 9, 5, dtype=np.uint32), lambda g: g.random(21), lambda g: g.bytes(64)):
        assert np.array_equal(draw(generator), draw(again))


def test_a_stream_that_goes_on_is_another_in_a_forked_child():
    again = generator_at(place_of(secret_generator()))
    assert in_a_forked_child(lambda: again.bytes(32)) != again.bytes(32)


def test_a_place_is_only_that_of_a_secret_stream():
    with pytest.raises(TypeError, match="statistical"):
        place_of(np.random.default_rng())
    with pytest.raises(Malformed, match="wanted 29"):
        generator_at(b"\0" * 28)
