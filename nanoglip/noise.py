"""Random numbers that are a pure function of (seed, purpose, position).

Order, augmentation, masks and evaluation draw from here, and nothing keeps a random state. So what
a step draws depends neither on the steps before it nor on how many processes or workers draw.
"""

import zlib

import numpy as np

DRAWS = 8  # random numbers that one augmented picture may use


def uniform(seed: int, purpose: str, position: int, count: int, n: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for positions position ... position + count - 1: (count, n) fp32.

    Counter-based (Philox): what stands at a position depends on nothing but the arguments.
    """
    blocks = -(-n // 4)  # a block of the generator is four 64-bit words
    key = [seed, zlib.crc32(purpose.encode())]
    words = np.random.Philox(key=key, counter=[position * blocks, 0, 0, 0])
    words = words.random_raw(count * blocks * 4).reshape(count, blocks * 4)[:, :n]
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
