"""Times of a log: which form a whole column has, and SQL that reads it.

A form is found from the column and never from one row: `Seen` counts the shapes
of its times (every digit a 9), `choose_form` takes the form that reads most of them
and refuses what the column leaves open. A row of another form is malformed.

Read are, by what `data.time_format` calls them:
  iso          2024-01-31 08:15, with T, slashes, one-digit parts, seconds,
               fractions after a point or comma, AM or PM, Z, UTC or an offset;
               20240131T081500Z; dates alone
  day_first, month_first   31/01/2024 and 01/31/2024, the rest like iso
  compact      20240131, 2024013108, 202401310815, 20240131081500
  epoch_s, epoch_ms, epoch_us, epoch_ns   since 1970, whole or with a fraction
  serial       days since 1899-12-30, as spreadsheets have them
  typed        a Parquet column of times or dates, whatever its years
  any strptime pattern     such as '%d %b %Y %H:%M:%S %z'

Two kinds of logs follow: of *instants* (an offset, Z, UTC, epochs), which are
ordered by instant and shown by a local clock, and of local clocks alone.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator
from typing import NoReturn

import duckdb

from behaviorlm_jax.errors import InputError

ORDERS = ('iso', 'day_first', 'month_first')
_UNITS = {
  'epoch_s': 1_000_000,
  'epoch_ms': 1_000,
  'epoch_us': 1,
  'epoch_ns': 0.001,
}  # in microseconds
WORDS = (*ORDERS, 'compact', *_UNITS, 'serial', 'typed')
TYPED = ('timestamp', 'date')  # of Parquet columns
# What is found by itself lies in these years.
FIRST, LAST = 631_152_000, 4_133_980_800  # seconds since 1970
YEARS = '1990 to 2100'
_SERIAL_ZERO = 25_569  # of 1970-01-01, in days since 1899-12-30
_DAY = 86_400
_NAMES = {
  'iso': 'ISO 8601',
  'day_first': 'day/month/year',
  'month_first': 'month/day/year',
  'compact': 'YYYYMMDD',
  'epoch_s': 'seconds since 1970',
  'epoch_ms': 'milliseconds since 1970',
  'epoch_us': 'microseconds since 1970',
  'epoch_ns': 'nanoseconds since 1970',
  'serial': 'spreadsheet days',
  'timestamp': 'Parquet timestamps',
  'date': 'Parquet dates',
}

# Both Python's re and DuckDB's RE2 read these.
_DATES = {
  'iso': r'(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})',
  'other': r'(\d{1,2})[-/.](\d{1,2})[-/.](\d{4})',
}
_CLOCK = (
  r'(?:(?:[Tt]|,? )(\d{1,2}):(\d{2})(?::(\d{2})(?:[.,](\d{1,9}))?)?'
  r'(?: ?([AaPp])\.?[Mm]\.?)?)'
)
# With what Go ('+0000 UTC') and Java ('+01:00[Europe/Paris]') write behind it.
_ZONE = (
  r'(?: ?(Z|z|UTC|GMT|(?:UTC|GMT)?[+-]\d{2}(?::?\d{2})?)'
  r'(?: [A-Z]{2,5}|\[[\w/+-]+\])?)'
)
_GROUPS = ('a', 'b', 'c', 'h', 'm', 's', 'f', 'half', 'zone')
_COMPACT = r'^(\d{4})(\d{2})(\d{2})([Tt ]\d)'  # 20240131T081500
# What most logs have is read without the pattern of everything.
_COMMON = (
  r'^(\d{4}-\d\d-\d\d[ T](?:[01]\d|2[0-3]):[0-5]\d'
  r'(?::[0-5]\d(?:\.\d+)?)?)'
)
_COMMON_ZONE = r' ?(Z|[+-]\d\d:?[0-5]\d)'
_NUMBER = r'^(\d+)(?:[.,](\d{1,12}))?$'
_COMPACTS = {8: '%Y%m%d', 10: '%Y%m%d%H', 12: '%Y%m%d%H%M', 14: '%Y%m%d%H%M%S'}


@dataclasses.dataclass(frozen=True)
class Form:
  """How the times of a column are written."""

  word: str  # of WORDS or TYPED, or a strptime pattern
  instants: bool  # whether a row tells the instant, else a local clock alone
  clock: bool  # whether there is a time of day
  zone: str = ''  # whose clock is shown; '': that of the row's own offset
  bounded: bool = True  # whether years outside YEARS make a number malformed

  @property
  def text(self) -> str:
    """'ISO 8601 with offsets'."""
    name = _NAMES.get(self.word, repr(self.word))
    if not self.clock:
      name += ', dates alone'
    elif self.word in (*ORDERS, 'compact') or '%' in self.word:
      name += ' with offsets' if self.instants else ''
    if self.instants:
      name += (
        f', shown by the clock of {self.zone}'
        if self.zone
        else ('' if self.has_offsets else ', shown by the clock of UTC')
      )
    return name

  @property
  def has_offsets(self) -> bool:
    """Whether every row may have an offset of its own."""
    # Names of zones (%Z) are read as instants, but give no clock of their own.
    return self.instants and (self.word in ORDERS or '%z' in self.word)


class Seen:
  """The shapes of the times of a column, counted batch by batch.

  What tells day from month, and hours from seconds, is counted only where there
  are such shapes.
  """

  def __init__(self, con: duckdb.DuckDBPyConnection):
    self._con = con
    self._shapes = {}  # shape: (number, least, greatest text)
    self.day = self.month = self.hours = 0  # times that can be nothing else

  def add(self, source: str) -> None:
    """Counts the column `moment` of a query."""
    # 48 characters: longer than any form, and long texts are no shape each.
    # The least and greatest text of a shape stand for all of it.
    found = self._con.execute(f"""
        SELECT translate(left(moment, 48), '012345678', '999999999') AS shape,
               count(*), min(moment), max(moment)
        FROM {source} WHERE moment <> '' GROUP BY shape""").fetchall()
    for shape, n, low, high in found:
      before = self._shapes.get(shape, (0, low, high))
      self._shapes[shape] = (before[0] + n, min(before[1], low), max(before[2], high))
    # One more scan of the batch, only for shapes that leave something open.
    if any(re.match(r'99?[-/.]99?[-/.]9999|9999999999$', shape) for shape, *_ in found):
      self._settle(source)

  def _settle(self, source: str) -> None:
    # 13/01/2024 can only be a day, 01/13/2024 only a month first; 2034013123
    # is an hour or, less likely, seconds since 1970.
    # 01/99/2024 can be neither.
    pattern = r"'^(\d{1,2})[-/.](\d{1,2})[-/.]\d{4}'"
    one, two = (
      f'TRY_CAST(regexp_extract(moment, {pattern}, {i}) AS INT)' for i in (1, 2)
    )
    only = 'count(*) FILTER ({} BETWEEN 13 AND 31 AND {} BETWEEN 1 AND 12)'
    ((day, month, hours),) = self._con.execute(f"""
        SELECT {only.format(one, two)}, {only.format(two, one)}, count(*) FILTER (
          CASE WHEN length(moment) = 10 AND moment BETWEEN '19900101' AND '21'
          THEN try_strptime(moment, '%Y%m%d%H') IS NOT NULL END)
        FROM {source}""").fetchall()
    self.day, self.month = self.day + day, self.month + month
    self.hours += hours

  @property
  def shapes(self) -> list[tuple[int, str, str]]:
    """(number, least, greatest text) of every shape, the commonest first."""
    return sorted(self._shapes.values(), key=lambda one: (-one[0], one[1]))


def given(word: str, zone: str) -> Form | None:
  """The form that `data.time_format` settles alone; None: see the column."""
  if word in ('', 'typed', *ORDERS):
    return None
  instants = word in _UNITS or bool(re.search('%[zZ]', word))
  clock = word in WORDS or bool(re.search('%-?[HIMSTXcfgn]', word))
  form = Form(word, instants, clock, zone, bounded=False)
  return check_zone(form, 'data.time_format')


def check_settings(word: str, zone: str) -> None:
  """Refuses values of data.time_format and data.time_zone that mean nothing."""
  with duckdb.connect() as con:
    if word and word not in WORDS:
      try:
        con.execute('SELECT try_strptime(?, ?)', ['', word])
        fault = '' if '%' in word else 'it has no %'
      except duckdb.Error as error:
        fault = ' '.join(str(error).split())
      if fault:
        raise InputError(
          f'data.time_format is {word!r} ({fault}); give one of '
          f'{", ".join(WORDS)} or a strptime pattern such as '
          "'%d %b %Y %H:%M'."
        )
    if zone and not re.fullmatch(_FIXED, zone):
      known = con.execute('SELECT name FROM pg_timezone_names()').fetchall()
      # Not BST or EST: they are several zones, and read as one of them.
      if (zone,) not in known or ('/' not in zone and zone not in _UTC):
        raise InputError(
          f'data.time_zone is {zone!r}, which is no zone that is known; give '
          "a name such as 'America/New_York', or an offset such as '+05:30'."
        )


_FIXED = r'([+-])(0\d|1[0-8]):?([0-5]\d)'
_UTC = ('UTC', 'GMT')


def zone_name(zone: str | None) -> str:
  """The zone of a Parquet column, as Arrow has it ('Z', '+05'), as we write it."""
  zone = {None: '', 'Z': 'UTC'}.get(zone, zone)
  return f'{zone}:00' if re.fullmatch(r'[+-]\d\d', zone) else zone


def choose_form(seen: Seen, word: str, zone: str, where: str) -> Form | None:
  """The form of a column; None where its order of day and month is open.

  Args:
    seen: of the column, with one time at least.
    word: data.time_format, '' or one of ORDERS.
    zone: data.time_zone.
    where: names the column in a refusal.
  """
  # Every reading of a shape has its rows' votes, also where several would do.
  votes = collections.Counter()
  for n, low, high in seen.shapes:
    for key in _readings(low, high):
      votes[key] += n
  if word:
    other = 'other' if word != 'iso' else 'iso'
    votes = collections.Counter({key: n for key, n in votes.items() if key[0] == other})
  if not votes and word:
    raise InputError(
      f'{where}: {_quote(seen.shapes[0][1])} and the other times are not what '
      f'data.time_format = {word!r} says; leave it out, and their form is found'
    )
  if not votes:
    raise InputError(
      f'{where}: {_quote(seen.shapes[0][1])} and the other times have no '
      'form that is known; set data.time_format to a strptime pattern such '
      "as '%d %b %Y %H:%M' or to one of "
      + ', '.join(WORDS)
      + ' (times of other years than '
      + YEARS
      + ' need it, too), or check '
      'data.columns.time'
    )
  (name, instants, clock), most = max(
    votes.items(), key=lambda item: (item[1], item[0])
  )
  # Ten digits: 2024013108 is an hour, and the seconds of some day in 2034.
  if name == 'epoch_s' and seen.hours >= most / 2:
    raise InputError(
      f'{where}: times like {seen.shapes[0][1]} may be seconds since 1970 or '
      'YYYYMMDDhh; set data.time_format to epoch_s or %Y%m%d%H'
    )
  if name == 'other':
    if not word and not seen.day and not seen.month:
      return None
    if not word and seen.day and seen.month:
      raise InputError(
        f'{where}: {seen.day} times can only have the day first and '
        f'{seen.month} only the month; set data.time_format to day_first or '
        'month_first (the other rows are then malformed), or write all of '
        'them alike'
      )
    name = word or ('day_first' if seen.day else 'month_first')
  return check_zone(Form(name, instants, clock, zone, bounded=not word), where)


def check_zone(form: Form, where: str) -> Form:
  """The form; refuses a zone where the log tells no instants."""
  if form.zone and not form.instants:
    raise InputError(
      f'data.time_zone is {form.zone!r}, but by {where} the log holds local '
      'clocks without offsets, which are shown as they are; leave it out'
    )
  return form


def refuse_open(seen: Seen, where: str) -> NoReturn:
  """Says that day and month cannot be told apart."""
  raise InputError(
    f'{where}: times like {_quote(seen.shapes[0][1])} may have the day or '
    'the month first, and none has a number above 12 that would tell; set '
    'data.time_format to day_first or month_first'
  )


def _quote(text: str) -> str:
  return repr(text if len(text) <= 40 else text[:40] + '...')


def _readings(low: str, high: str) -> Iterator[tuple[str, bool, bool]]:
  """Yields keys (name, instants, clock) of what may be read of a shape."""
  number = re.fullmatch(_NUMBER, low)
  if number:
    yield from _numbers(number[1], re.match(r'\d+', high)[0], whole=not number[2])
    return
  text = _normal(low)
  for name, date in _DATES.items():
    if match := re.fullmatch(f'{date}{_CLOCK}?{_ZONE}?', text):
      clock, zone = match[4] is not None, match[9] is not None
      if clock or not zone:  # A date with an offset is no instant.
        yield name, zone, clock


def _numbers(low: str, high: str, whole: bool) -> Iterator[tuple[str, bool, bool]]:
  """The readings of numbers under which some lie in YEARS."""
  least, most, size = int(low), int(high), len(low)
  for name, unit in _UNITS.items():
    scale = 1e6 / unit  # Units in a second.
    if least < LAST * scale and most >= FIRST * scale:
      yield name, True, True
  if least < LAST // _DAY + _SERIAL_ZERO and most >= FIRST // _DAY + _SERIAL_ZERO:
    yield 'serial', False, not whole
  # Ten digits are taken for seconds, or refused: see `choose_form`.
  if whole and size in (8, 12, 14) and (low[:4] <= '2100' and high[:4] >= '1990'):
    yield 'compact', False, size > 8


def _normal(text: str) -> str:
  """20240131T081500 -> 2024-01-31T08:15:00; `_sql_normal` in Python."""
  # Both have to change together: shapes are judged here, rows are read there.
  if not re.match(_COMPACT, text):
    return text
  text = re.sub(_COMPACT, r'\1-\2-\3\4', text)
  text = re.sub(r'^(.{11}\d{2})(\d{2})', r'\1:\2', text)
  return re.sub(r'^(.{14}\d{2})(\d{2})', r'\1:\2', text)


def _sql_normal(text: str) -> str:
  one = f"regexp_replace({text}, '{_COMPACT}', '\\1-\\2-\\3\\4')"
  two = f"regexp_replace({one}, '^(.{{11}}\\d{{2}})(\\d{{2}})', '\\1:\\2')"
  three = f"regexp_replace({two}, '^(.{{14}}\\d{{2}})(\\d{{2}})', '\\1:\\2')"
  return f"CASE WHEN regexp_matches({text}, '{_COMPACT}') THEN {three} ELSE {text} END"


# SQL.


def select_instants(form: Form, source: str) -> str:
  """A query: all columns of `source` and, of its `moment`, two more.

  instant  BIGINT, microseconds since 1970 by which rows are ordered; NULL:
           not of the form
  shift    BIGINT, seconds from there to the user's clock
  """
  if form.word in ORDERS:
    return _select_text(form, source)
  if '%' in form.word:
    return _select_pattern(form, source)
  if form.word in TYPED:
    instant = 'moment'
  elif form.word == 'compact':
    instant = _compact(form)
  else:
    instant = _number(form)
  inside = (
    f'instant BETWEEN {FIRST}000000 AND {LAST}000000 - 1'
    if form.bounded and form.word not in TYPED
    else 'true'
  )
  return _shown(
    form,
    f"""(
      SELECT * REPLACE (CASE WHEN {inside} THEN instant END AS instant)
      FROM (SELECT *, {instant} AS instant FROM {source}))""",
  )


def _shown(form: Form, source: str, shift: str = '0') -> str:
  """Adds `shift`, by the zone that is given or else by `shift`."""
  if form.zone or not form.bounded:  # Years 1 to 9999 have a clock in every zone.
    source = f"""(SELECT * REPLACE (CASE WHEN instant BETWEEN
      -62135500000000000 AND 253402200000000000 THEN instant END AS instant)
      FROM {source})"""
  if form.zone:
    # An offset is the same in summer and winter; a name's is that of each instant.
    fixed = re.fullmatch(_FIXED, form.zone)
    if fixed:
      sign, hours, minutes = fixed.groups()
      shift = f'{sign}{int(hours) * 3600 + int(minutes) * 60}'
    else:
      shift = (
        f"(epoch_us(timezone('{form.zone}', make_timestamptz(instant)))"
        ' - instant) // 1000000'
      )
  return f'SELECT *, CAST({shift} AS BIGINT) AS shift FROM {source}'


def _select_text(form: Form, source: str) -> str:
  date = _DATES['iso' if form.word == 'iso' else 'other']
  pattern = f'^{date}{_CLOCK}{_ZONE if form.instants else ""}$'
  groups = _GROUPS[: 9 if form.instants else 8]
  if not form.clock:
    pattern, groups = f'^{date}$', _GROUPS[:3]
  names = ', '.join(f"'{name}'" for name in groups)
  year, month, day = {'iso': 'abc', 'day_first': 'cba', 'month_first': 'cab'}[form.word]
  written = f"p.{year} || '-' || p.{month} || '-' || p.{day}"
  if form.clock:
    # 12 AM is 0, 12 PM is 12; 13 PM is no time, so NULL.
    hour = """CASE WHEN p.half = '' THEN TRY_CAST(p.h AS INT)
        WHEN TRY_CAST(p.h AS INT) BETWEEN 1 AND 12 THEN TRY_CAST(p.h AS INT)
          % 12 + CASE WHEN p.half IN ('p', 'P') THEN 12 ELSE 0 END END"""
    written += (
      f" || ' ' || CASE WHEN ({hour}) < 24 THEN {hour} END || ':' || p.m || "
      "':' || CASE WHEN p.s = '' THEN '0' ELSE p.s END || '.' || p.f"
    )
  else:
    written += " || ' 00:00:00'"
  # CASE looks at the long pattern only where the common one does not fit.
  parts = f"regexp_extract({_sql_normal('moment')}, '{pattern}', [{names}])"
  common = _COMMON + (_COMMON_ZONE if form.instants else '') + '$'
  fast = form.word == 'iso' and form.clock
  head = f"regexp_extract(moment, '{common}', 1)" if fast else "''"
  tail = f"regexp_extract(moment, '{common}', 2)" if fast and form.instants else "''"
  offset = f"""CASE
      WHEN head <> '' THEN {_offset('tail')} ELSE {_offset('p.zone')} END"""
  if not form.instants:
    offset = '0'
  fallback = f'epoch_us(TRY_CAST({written} AS TIMESTAMP))'
  return _shown(
    form,
    f"""(
      SELECT * EXCLUDE (head, tail, p, wall, behind),
             wall - behind::BIGINT * 1000000 AS instant, behind
      FROM (SELECT *, {offset} AS behind,
                   CASE WHEN head <> '' THEN
                     epoch_us(TRY_CAST(head AS TIMESTAMP))
                   ELSE {fallback} END AS wall
            FROM (SELECT *, CASE WHEN head = '' THEN {parts} END AS p
                  FROM (SELECT *, {head} AS head, {tail} AS tail
                        FROM {source}))))""",
    'behind',
  )


def _offset(text: str) -> str:
  """Seconds of 'Z', 'UTC', '+05:30', '-0800' or '+01'; NULL: out of bounds."""
  # 1080 minutes, 18 hours, are more than any zone has, and what Java allows.
  pattern = r'([+-])(\d\d):?(\d\d)?$'
  part = lambda i: f"regexp_extract({text}, '{pattern}', {i})"
  minutes = (
    f'TRY_CAST({part(2)} AS INT) * 60 + '
    f"CASE WHEN {part(3)} = '' THEN 0 ELSE {part(3)}::INT END"
  )
  return f"""CASE WHEN {part(1)} = '' THEN 0
      WHEN {minutes} <= 1080 AND {part(3)} < '60' THEN
        ({minutes}) * CASE WHEN {part(1)} = '-' THEN -60 ELSE 60 END END"""


def _select_pattern(form: Form, source: str) -> str:
  # try_strptime: a row of another form is NULL, and malformed, not the end.
  word = form.word.replace("'", "''")
  parsed = lambda text: f"epoch_us(try_strptime({text}, '{word}'))"
  if not form.instants:
    return _shown(form, f'(SELECT *, {parsed("moment")} AS instant FROM {source})')
  # The row's own clock is what the same text says in UTC. Where a date looks
  # like the offset, the two do not fit together and the row is malformed.
  offset = "regexp_extract(moment, '(?:^|[ \\d])([+-][01]\\d:?\\d\\d)(?: |$)', 1)"
  return _shown(
    form,
    f"""(
      SELECT * EXCLUDE (wall), (wall - instant) // 1000000 AS behind
      FROM (SELECT *, {parsed('moment')} AS instant,
                   {parsed(f"replace(moment, {offset}, '+0000')")} AS wall
            FROM {source}))""",
    'behind',
  )


def _compact(form: Form) -> str:
  # One form for a column: no dates alone among clocks, but where it was given.
  cases = ' '.join(
    f"WHEN {size} THEN try_strptime(moment, '{pattern}')"
    for size, pattern in _COMPACTS.items()
    if not form.bounded or form.clock == (size > 8)
  )
  return (
    f"CASE WHEN regexp_full_match(moment, '\\d+') THEN "
    f'epoch_us(CASE length(moment) {cases} END) END'
  )


def _number(form: Form) -> str:
  word = form.word
  sound = r"regexp_full_match(moment, '-?\d{1,19}(?:[.,]\d{1,12})?')"
  if word == 'epoch_ns':  # Exactly: DuckDB divides as doubles.
    whole = "regexp_extract(moment, '^-?\\d+')"
    return f'CASE WHEN {sound} THEN TRY_CAST({whole} AS BIGINT) // 1000 END'
  number = (
    f"TRY_CAST(CASE WHEN {sound} THEN replace(moment, ',', '.') END AS DECIMAL(38, 12))"
  )
  if word == 'serial':  # To milliseconds: serials hold no more, and round.
    if not form.clock:
      number = f'CASE WHEN {number} = floor({number}) THEN {number} END'
    micros = f'round(({number} - {_SERIAL_ZERO})::DOUBLE * {_DAY * 1000}) * 1000'
  else:
    micros = f'floor({number} * {_UNITS[word]})'
  return f'TRY_CAST({micros} AS BIGINT)'
