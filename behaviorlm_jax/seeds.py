"""Independent random streams from one seed, by the name of their purpose."""

import zlib

import numpy as np


def stream(seed: int, *purpose: str) -> np.random.Generator:
  """numpy Generator of (seed, purpose); `purpose` is one or more strings.

  Names are hashed, because numpy pads seeds with zeros: [1, 98] and
  [1, 98, 0] are one stream.
  """
  return np.random.default_rng([seed, zlib.crc32('/'.join(purpose).encode())])
