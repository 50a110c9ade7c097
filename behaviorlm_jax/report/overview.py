"""What a log holds, as a run would read it; no model, nothing is written."""

import collections
import re
import tempfile
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.data.prompts import DAY, WEEKDAYS
from behaviorlm_jax.evaluate import evaluation

_LISTED = 10  # behaviors from either end
_BAR = 40  # characters of the longest bar
_CONSTANT = 0.5  # share of events at one minute of the day
_GREATEST = 0.1  # share of the log that one user has
_REPEATED = 0.2  # share of rows that repeat the one before
_NOBODY = frozenset(
  (
    '0',
    '-1',
    '?',
    '-',
    'unknown',
    'anonymous',
    'guest',
    '(null)',
    '(none)',
    '00000000-0000-0000-0000-000000000000',
  )
)
_NUMBER = r'[+-]?\d+(?:[.,]\d+)?'


def look(config: ConfigDict) -> None:
  """Prints what the log of a config holds; refuses it as a run would."""
  config_lib.check(config)
  with tempfile.TemporaryDirectory() as folder:
    place = Path(folder) / 'events'
    summary = events_lib.prepare(config.data, config.data.events, place, config.seed)
    events = events_lib.open_events(place)
    parts = [
      _rows(summary),
      _users(events),
      _behaviors(events, summary),
      _hours(events, summary['clock']),
      _odd(events, summary),
    ]
    print('\n\n'.join('\n'.join(lines) for lines in parts))
    # Refuses a log without any sample.
    evaluation.draw_splits(events, config.eval, config.plan.min_context, config.seed)


def _rows(summary: dict) -> list[str]:
  dropped = summary['duplicates'] + summary['repeats']
  lines = [
    f'layout     {summary["layout"]}',
    f'times      {summary["times"]}',
    f'rows       {summary["rows"]:,} = {summary["events"]:,} kept + '
    f'{dropped:,} dropped + {summary["rejected"]:,} rejected',
    f'dropped    {summary["duplicates"]:,} duplicates, '
    f'{summary["repeats"]:,} immediate repeats (data.collapse_repeats)',
  ]
  lines += [f'rejected   {n:,}: {reason}' for reason, n in summary['reasons'].items()]
  return [
    *lines,
    'splits     ' + ', '.join(f'{n:,} {name}' for name, n in summary['splits'].items()),
  ]


def _users(events: events_lib.Events) -> list[str]:
  sizes = np.bincount(events.user, minlength=len(events.users))
  sizes = sizes[sizes > 0]
  low, middle, high = np.percentile(sizes, (10, 50, 90))
  return [
    f'users      {len(sizes):,}, of {sizes.min():,} to {sizes.max():,} '
    f'events; a tenth have {low:.0f} or fewer, half {middle:.0f}, a '
    f'tenth {high:.0f} or more'
  ]


def _behaviors(events: events_lib.Events, summary: dict) -> list[str]:
  listed = list(enumerate(events.behaviors))
  if len(listed) > 2 * _LISTED:
    listed = [*listed[:_LISTED], None, *listed[-_LISTED:]]
  lines = [
    f'behaviors  {summary["behaviors"]:,}: {summary["anchors"]:,} '
    f'anchors, {summary["tails"]:,} tail, {summary["unseen"]:,} in the '
    'test split alone'
  ]
  for item in listed:
    lines.append(
      '  ...'
      if item is None
      else f'  {item[1].count:>9,}  {item[1].group:<6}  {item[1].name}'
    )
  return lines


def _hours(events: events_lib.Events, clock: bool) -> list[str]:
  """A bar for each hour of the day; of a log without a clock, each weekday."""
  if clock:
    counts = np.bincount(events.time % DAY // 3600, minlength=24)
    names = [f'{hour:02d}:00' for hour in range(24)]
  else:
    # Day 0 was a Thursday, WEEKDAYS[3].
    counts = np.bincount((events.time // DAY + 3) % 7, minlength=7)
    names = WEEKDAYS
  return ['events by ' + ('hour of the day' if clock else 'weekday')] + [
    f'  {name:<5} {"█" * round(_BAR * n / max(counts)):<{_BAR}} {n:,}'
    for name, n in zip(names, counts.tolist(), strict=True)
  ]


def _odd(events: events_lib.Events, summary: dict) -> list[str]:
  found = list(summary['warnings'])
  names = [item.name for item in events.behaviors]
  numbers = [name for name in names if re.fullmatch(_NUMBER, name)]
  if numbers:
    found.append(
      f'{len(numbers)} of {len(names)} behaviors are numbers, such as '
      f'{numbers[0]!r}: names that mean something predict better '
      '(data.columns.behavior)'
    )
  sizes = np.bincount(events.user, minlength=len(events.users))
  first = int(sizes.argmax())
  if sizes[first] >= _GREATEST * len(events.user) and len(sizes) > 10:
    found.append(
      f'user {events.users[first]!r} has {sizes[first] / sizes.sum():.0%} of '
      'all events: a test account, a shared device, or a default id?'
    )
  nobody = [name for name in events.users if name.lower() in _NOBODY]
  if nobody:
    found.append(
      f'users that look like nobody: {", ".join(map(repr, nobody))} '
      "(--config.data.nulls=\"('null', 'none', ...)\" leaves out all that it names)"
    )
  if summary['clock']:
    minute, n = collections.Counter((events.time % DAY // 60).tolist()).most_common(1)[
      0
    ]
    if n > _CONSTANT * len(events.time):
      found.append(
        f'{n / len(events.time):.0%} of events are at '
        f'{minute // 60:02d}:{minute % 60:02d}: the log may hold dates whose '
        'clock means nothing'
      )
  if summary['repeats'] > _REPEATED * summary['rows']:
    found.append(
      f'{summary["repeats"] / summary["rows"]:.0%} of rows repeat the '
      'behavior before them and are dropped; data.collapse_repeats=False '
      'keeps them'
    )
  return ['odd' if found else 'nothing odd', *(f'  - {text}' for text in found)]
