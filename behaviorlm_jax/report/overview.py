"""What a log holds, as a run would read it; no model, nothing is written."""

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
_NOBODY = r'0|-1|[?-]|unknown|anonymous|guest|\((null|none)\)|0{8}(-0{4}){3}-0{12}'
_NUMBER = r'[+-]?\d+(?:[.,]\d+)?'


def look(config: ConfigDict) -> None:
  """Prints what the log of a config holds; refuses it as a run would."""
  config_lib.check(config)
  with tempfile.TemporaryDirectory() as folder:
    place = Path(folder) / 'events'
    summary = events_lib.prepare(config.data, config.data.events, place, config.seed)
    events = events_lib.open_events(place)
    sizes = np.bincount(events.user, minlength=len(events.users))
    odd = [
      *summary['warnings'],
      *_odd_names(events),
      *_odd_shares(events, sizes, summary),
    ]
    parts = [
      _rows(summary),
      _users(sizes[sizes > 0]),
      _behaviors(events, summary),
      _hours(events),
      ['odd' if odd else 'nothing odd', *(f'  - {text}' for text in odd)],
    ]
    print('\n\n'.join('\n'.join(lines) for lines in parts))
    # Refuses a log without any sample.
    evaluation.draw_splits(events, config.eval, config.plan.min_context, config.seed)


def _rows(summary: dict) -> list[str]:
  dropped = summary['duplicates'] + summary['repeats']
  splits = ', '.join(f'{n:,} {name}' for name, n in summary['splits'].items())
  return [
    f'layout     {summary["layout"]}',
    f'times      {summary["times"]}',
    f'rows       {summary["rows"]:,} = {summary["events"]:,} kept + '
    f'{dropped:,} dropped + {summary["rejected"]:,} rejected',
    f'dropped    {summary["duplicates"]:,} duplicates, '
    f'{summary["repeats"]:,} immediate repeats (data.collapse_repeats)',
    *(f'rejected   {n:,}: {reason}' for reason, n in summary['reasons'].items()),
    f'splits     {splits}',
  ]


def _users(sizes: np.ndarray) -> list[str]:
  low, middle, high = np.percentile(sizes, (10, 50, 90))
  return [
    f'users      {len(sizes):,}, of {sizes.min():,} to {sizes.max():,} '
    f'events; a tenth have {low:.0f} or fewer, half {middle:.0f}, a '
    f'tenth {high:.0f} or more'
  ]


def _behaviors(events: events_lib.Events, summary: dict) -> list[str]:
  lines = [
    f'  {item.count:>9,}  {item.group:<6}  {item.name}' for item in events.behaviors
  ]
  if len(lines) > 2 * _LISTED:
    lines[_LISTED:-_LISTED] = ['  ...']
  return [
    f'behaviors  {summary["behaviors"]:,}: {summary["anchors"]:,} anchors, '
    f'{summary["tails"]:,} tail, {summary["unseen"]:,} in the test split alone',
    *lines,
  ]


def _hours(events: events_lib.Events) -> list[str]:
  """A bar for each hour of the day; of a log without a clock, each weekday."""
  if events.clock:
    what, names = 'hour of the day', [f'{hour:02d}:00' for hour in range(24)]
    counts = np.bincount(events.time % DAY // 3600, minlength=24)
  else:
    what, names = 'weekday', WEEKDAYS
    # Day 0 was a Thursday, WEEKDAYS[3].
    counts = np.bincount((events.time // DAY + 3) % 7, minlength=7)
  return [f'events by {what}'] + [
    f'  {name:<5} {"█" * round(_BAR * n / max(counts)):<{_BAR}} {n:,}'
    for name, n in zip(names, counts.tolist(), strict=True)
  ]


def _odd_names(events: events_lib.Events) -> list[str]:
  names = [item.name for item in events.behaviors]
  numbers = [name for name in names if re.fullmatch(_NUMBER, name)]
  nobody = [name for name in events.users if re.fullmatch(_NOBODY, name.lower())]
  found = []
  if numbers:
    found.append(
      f'{len(numbers)} of {len(names)} behaviors are numbers, such as '
      f'{numbers[0]!r}: names that mean something predict better '
      '(data.columns.behavior)'
    )
  if nobody:
    found.append(
      f'users that look like nobody: {", ".join(map(repr, nobody))} '
      "(--config.data.nulls=\"('null', 'none', ...)\" leaves out all that it names)"
    )
  return found


def _odd_shares(
  events: events_lib.Events, sizes: np.ndarray, summary: dict
) -> list[str]:
  found, total = [], len(events.user)
  first = int(sizes.argmax())
  if sizes[first] >= _GREATEST * total and len(sizes) > 10:
    found.append(
      f'user {events.users[first]!r} has {sizes[first] / total:.0%} of all events: a '
      'test account, a shared device, or a default id?'
    )
  minutes = np.bincount(events.time % DAY // 60)
  minute = int(minutes.argmax())
  if events.clock and minutes[minute] > _CONSTANT * total:
    found.append(
      f'{minutes[minute] / total:.0%} of events are at {minute // 60:02d}:'
      f'{minute % 60:02d}: the log may hold dates whose clock means nothing'
    )
  repeated = summary['repeats'] / summary['rows']
  if repeated > _REPEATED:
    found.append(
      f'{repeated:.0%} of rows repeat the behavior before them and are dropped; '
      'data.collapse_repeats=False keeps them'
    )
  return found
