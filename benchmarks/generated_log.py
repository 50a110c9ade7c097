"""A log of any size, made up: Parquet, in the order of time, by seed.

What is like a real log: few users have most events (log-normal rates, one user
for every hundred events on average), behaviors follow Zipf's law, each user has
habits of their own, days are busier than nights, some rows come twice and some
behaviors repeat. It is written chunk by chunk, so memory does not grow with it.
Rows stand in the order of time but for some that are hours late, as logs are
written, so the events of a user are as far apart as can be.
"""

import numpy as np
import pyarrow as pa
from pyarrow import parquet

BEHAVIORS = 200
EVENTS_PER_USER = 100
_CHUNK = 1 << 20  # Events.
_START = 1_700_000_000  # Seconds since 1970.
_SECONDS_PER_EVENT = 36_000  # Of one user, on average: a quarter hour to days.
_SPREAD = 1.2  # Of log rates: the busiest 1 % of users have a tenth of events.
_HABITS = 4  # Behaviors that a user prefers.
_TWICE = 0.002  # Share of rows that are written again.


def write(path, events, seed=0):
  """Writes `events` rows: user int64, time (seconds, no zone), behavior."""
  rng = np.random.default_rng([seed, events])
  users = max(events // EVENTS_PER_USER, 1)
  rates = np.cumsum(np.exp(_SPREAD * rng.standard_normal(users)))
  rates /= rates[-1]
  # Ids without an order, as those of a real log.
  names = rng.permutation(users).astype(np.int64) * 7919 + 1_000_003
  zipf = 1 / np.arange(1, BEHAVIORS + 1)
  zipf = np.cumsum(zipf / zipf.sum())
  listed = pa.array([f'behavior {i:03d}' for i in range(BEHAVIORS)])
  span = _SECONDS_PER_EVENT * EVENTS_PER_USER
  schema = pa.schema(
    [('user', pa.int64()), ('time', pa.timestamp('s')), ('behavior', pa.string())]
  )
  # A dictionary of users would be one of few in a small log alone, and their
  # names be read faster there.
  with parquet.ParquetWriter(path, schema, use_dictionary=['behavior']) as writer:
    for start in range(0, events, _CHUNK):
      size = min(_CHUNK, events - start)
      begin, end = (_START + span * at // events for at in (start, start + size))
      time = np.sort(rng.integers(begin, max(end, begin + 1), size))
      night = time % 86_400 < 6 * 3600
      time = np.sort(np.where(night & (rng.random(size) < 0.8), time + 9 * 3600, time))
      user = np.searchsorted(rates, rng.random(size))
      drawn = np.searchsorted(zipf, rng.random(size))
      # A user's habits, by a hash of the user: frequent behaviors for most.
      habit = np.searchsorted(
        zipf,
        (user * 2654435761 + rng.integers(_HABITS, size=size) * 40503) % 9973 / 9973,
      )
      behavior = np.where(rng.random(size) < 0.5, habit, drawn)
      again = np.flatnonzero(rng.random(size - 1) < _TWICE)
      for column in (time, user, behavior):
        column[again + 1] = column[again]
      writer.write_table(
        pa.table(
          [
            pa.array(names[user]),
            pa.array(time, pa.timestamp('s')),
            listed.take(pa.array(behavior)),
          ],
          schema=schema,
        )
      )
