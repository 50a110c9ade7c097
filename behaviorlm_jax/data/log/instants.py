"""SQL that reads times of a form: instants, and the clock of the user.

`select_instants` needs the macros of MACROS in its connection.
"""

import re

from behaviorlm_jax.data.log import times
from behaviorlm_jax.data.log.times import Form

_GROUPS = ('a', 'b', 'c', 'h', 'm', 's', 'f', 'half', 'zone')
# What most logs have is read without the pattern of everything.
_COMMON = (
  r'^(\d{4}-\d\d-\d\d[ T](?:[01]\d|2[0-3]):[0-5]\d'
  r'(?::[0-5]\d(?:\.\d+)?)?)'
)
_COMMON_ZONE = r' ?(Z|[+-]\d\d:?[0-5]\d)'
_COMPACTS = {8: '%Y%m%d', 10: '%Y%m%d%H', 12: '%Y%m%d%H%M', 14: '%Y%m%d%H%M%S'}
_DAY = 86_400_000  # milliseconds
# Years 1 to 9999 have a clock in every zone.
_SHOWN = -62_135_500_000_000_000, 253_402_200_000_000_000

# hour_of: 12 AM is 0, 12 PM is 12; 13 PM is no time, so NULL.
# seconds_of: of 'Z', 'UTC', '+05:30', '-0800' or '+01'; NULL: out of bounds. 1080
# minutes, 18 hours, are more than any zone has, and what Java allows.
MACROS = r"""
    CREATE MACRO hour_of(text, half) AS
      CASE WHEN half = '' AND TRY_CAST(text AS INT) < 24 THEN TRY_CAST(text AS INT)
           WHEN half <> '' AND TRY_CAST(text AS INT) BETWEEN 1 AND 12
           THEN TRY_CAST(text AS INT) % 12 + 12 * (lower(half) = 'p')::INT END;
    CREATE MACRO part_of(text, i) AS regexp_extract(text, '([+-])(\d\d):?(\d\d)?$', i);
    CREATE MACRO minutes_of(text) AS TRY_CAST(part_of(text, 2) AS INT) * 60 +
      CASE WHEN part_of(text, 3) = '' THEN 0 ELSE part_of(text, 3)::INT END;
    CREATE MACRO seconds_of(text) AS
      CASE WHEN part_of(text, 1) = '' THEN 0
           WHEN minutes_of(text) <= 1080 AND part_of(text, 3) < '60' THEN
             minutes_of(text) * CASE WHEN part_of(text, 1) = '-' THEN -60 ELSE 60 END
      END;
"""


def select_instants(form: Form, source: str) -> str:
  """A query: all columns of `source` and, of its `moment`, two more.

  instant  BIGINT, microseconds since 1970 by which rows are ordered; NULL:
           not of the form
  shift    BIGINT, seconds from there to the user's clock
  """
  if form.word in times.ORDERS:
    return _select_text(form, source)
  if '%' in form.word:
    return _select_pattern(form, source)
  if form.word in times.TYPED:
    return _show(form, f'SELECT *, moment AS instant FROM {source}')
  instant = _compact(form) if form.word == 'compact' else _number(form)
  query = f'SELECT *, {instant} AS instant FROM {source}'
  if form.bounded:
    query = _within(query, times.FIRST * 10**6, times.LAST * 10**6 - 1)
  return _show(form, query)


def _within(query: str, least: int, most: int) -> str:
  """The same query, where instants out of bounds are NULL."""
  return f"""SELECT * REPLACE (
      CASE WHEN instant BETWEEN {least} AND {most} THEN instant END AS instant)
      FROM ({query})"""


def _show(form: Form, query: str, shift: str = '0') -> str:
  """Adds `shift`, by the zone that is given or else by `shift`."""
  if form.zone or not form.bounded:
    query = _within(query, *_SHOWN)
  # An offset is the same in summer and winter; a name's is that of each instant.
  if fixed := re.fullmatch(times.FIXED, form.zone):
    sign, hours, minutes = fixed.groups()
    shift = f'{sign}{int(hours) * 3600 + int(minutes) * 60}'
  elif form.zone:
    there = f"epoch_us(timezone('{form.zone}', make_timestamptz(instant)))"
    shift = f'({there} - instant) // 1000000'
  return f'SELECT *, CAST({shift} AS BIGINT) AS shift FROM ({query})'


def _select_text(form: Form, source: str) -> str:
  iso = form.word == 'iso'
  pattern = times.DATES['iso' if iso else 'other']
  year, month, day = {'iso': 'abc', 'day_first': 'cba', 'month_first': 'cab'}[form.word]
  written = f"p.{year} || '-' || p.{month} || '-' || p.{day} || ' ' || "
  if form.clock:
    pattern += times.CLOCK + (times.ZONE if form.instants else '')
    seconds = "CASE WHEN p.s = '' THEN '0' ELSE p.s END || '.' || p.f"
    written += f"hour_of(p.h, p.half) || ':' || p.m || ':' || {seconds}"
  else:
    written += "'00:00:00'"
  names = list(_GROUPS[: re.compile(pattern).groups])
  # CASE looks at the long pattern only where the common one does not fit.
  common = _COMMON + (_COMMON_ZONE if form.instants else '')
  part = lambda i: f"regexp_extract(moment, '{common}$', {i})"
  head = part(1) if iso and form.clock else "''"
  tail = part(2) if iso and form.instants else "''"
  zone = "CASE WHEN head <> '' THEN tail ELSE p.zone END" if form.instants else "''"
  query = f"""
      SELECT * EXCLUDE (head, tail, p, wall), wall - behind * 1000000 AS instant
      FROM (SELECT *, seconds_of({zone})::BIGINT AS behind, epoch_us(TRY_CAST(
              CASE WHEN head <> '' THEN head ELSE {written} END AS TIMESTAMP)) AS wall
            FROM (SELECT *, CASE WHEN head = '' THEN
                    regexp_extract({_spread('moment')}, '^{pattern}$', {names}) END AS p
                  FROM (SELECT *, {head} AS head, {tail} AS tail FROM {source})))"""
  return _show(form, query, 'behind')


def _spread(text: str) -> str:
  """20240131T081500 -> 2024-01-31T08:15:00."""
  spread = text
  for pattern, parts in times.SPREAD:
    spread = f"regexp_replace({spread}, '{pattern}', '{parts}')"
  compact = f"regexp_matches({text}, '{times.COMPACT}')"
  return f'CASE WHEN {compact} THEN {spread} ELSE {text} END'


def _select_pattern(form: Form, source: str) -> str:
  # try_strptime: a row of another form is NULL, and malformed, not the end.
  word = form.word.replace("'", "''")
  parsed = lambda text: f"epoch_us(try_strptime({text}, '{word}'))"
  query = f'SELECT *, {parsed("moment")} AS instant FROM {source}'
  if not form.instants:
    return _show(form, query)
  # The row's own clock is what the same text says in UTC. Where a date looks
  # like the offset, the two do not fit together and the row is malformed.
  offset = r"regexp_extract(moment, '(?:^|[ \d])([+-][01]\d:?\d\d)(?: |$)', 1)"
  wall = parsed(f"replace(moment, {offset}, '+0000')")
  query = f'SELECT *, ({wall} - instant) // 1000000 AS behind FROM ({query})'
  return _show(form, query, 'behind')


def _compact(form: Form) -> str:
  # One form for a column: no dates alone among clocks, but where it was given.
  cases = ' '.join(
    f"WHEN {size} THEN try_strptime(moment, '{pattern}')"
    for size, pattern in _COMPACTS.items()
    if not form.bounded or form.clock == (size > 8)
  )
  return (
    r"CASE WHEN regexp_full_match(moment, '\d+') THEN "
    f'epoch_us(CASE length(moment) {cases} END) END'
  )


def _number(form: Form) -> str:
  sound = r"regexp_full_match(moment, '-?\d{1,19}(?:[.,]\d{1,12})?')"
  if form.word == 'epoch_ns':  # Exactly: DuckDB divides as doubles.
    whole = r"regexp_extract(moment, '^-?\d+')"
    return f'CASE WHEN {sound} THEN TRY_CAST({whole} AS BIGINT) // 1000 END'
  number = f"CASE WHEN {sound} THEN replace(moment, ',', '.') END"
  number = f'TRY_CAST({number} AS DECIMAL(38, 12))'
  if form.word == 'serial':  # To milliseconds: serials hold no more, and round.
    if not form.clock:
      number = f'CASE WHEN {number} = floor({number}) THEN {number} END'
    days = f'({number} - {times.SERIAL_ZERO})::DOUBLE'
    micros = f'round({days} * {_DAY}) * 1000'
  else:
    micros = f'floor({number} * {times.UNITS[form.word]})'
  return f'TRY_CAST({micros} AS BIGINT)'
