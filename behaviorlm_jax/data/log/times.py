"""Times of a log: which form a whole column has, and SQL that reads it.

A form is found from the column and never from one row: `Column` counts
the shapes of its times, takes the form that reads most of them and refuses what they
leave open. A row of another form is malformed.

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

import duckdb

from behaviorlm_jax.data.log import sources
from behaviorlm_jax.errors import InputError

ORDERS = ('iso', 'day_first', 'month_first')
UNITS = {
  'epoch_s': 1_000_000,
  'epoch_ms': 1_000,
  'epoch_us': 1,
  'epoch_ns': 0.001,
}  # in microseconds
WORDS = (*ORDERS, 'compact', *UNITS, 'serial', 'typed')
TYPED = ('timestamp', 'date')  # of Parquet columns
# What is found by itself lies in these years.
FIRST, LAST = 631_152_000, 4_133_980_800  # seconds since 1970
YEARS = '1990 to 2100'
SERIAL_ZERO = 25_569  # of 1970-01-01, in days since 1899-12-30
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
DATES = {
  'iso': r'(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})',
  'other': r'(\d{1,2})[-/.](\d{1,2})[-/.](\d{4})',
}
CLOCK = (
  r'(?:(?:[Tt]|,? )(\d{1,2}):(\d{2})(?::(\d{2})(?:[.,](\d{1,9}))?)?'
  r'(?: ?([AaPp])\.?[Mm]\.?)?)'
)
# With what Go ('+0000 UTC') and Java ('+01:00[Europe/Paris]') write behind it.
ZONE = (
  r'(?: ?(Z|z|UTC|GMT|(?:UTC|GMT)?[+-]\d{2}(?::?\d{2})?)'
  r'(?: [A-Z]{2,5}|\[[\w/+-]+\])?)'
)
COMPACT = r'^(\d{4})(\d{2})(\d{2})([Tt ]\d)'  # 20240131T081500
# One after the other, these give it the marks of 2024-01-31T08:15:00.
SPREAD = (
  (COMPACT, r'\1-\2-\3\4'),
  (r'^(.{11}\d{2})(\d{2})', r'\1:\2'),
  (r'^(.{14}\d{2})(\d{2})', r'\1:\2'),
)
FIXED = r'([+-])(0\d|1[0-8]):?([0-5]\d)'  # an offset of data.time_zone
_NUMBER = r'^(\d+)(?:[.,](\d{1,12}))?$'


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
    # Names of zones (%Z) are read as instants, but give no clock of their own.
    offsets = self.instants and (self.word in ORDERS or '%z' in self.word)
    if not self.clock:
      name += ', dates alone'
    elif offsets or (self.instants and '%' in self.word):
      name += ' with offsets'
    if self.instants and (self.zone or not offsets):
      name += f', shown by the clock of {self.zone or "UTC"}'
    return name


class Column:
  """The times of a log, of which batch by batch the form is found.

  Shapes (every digit a 9) are counted. What tells day from month, and hours from
  seconds, is counted only where there are such shapes.
  """

  def __init__(self, con: duckdb.DuckDBPyConnection, log: sources.Log):
    self.where = f'{log.name} (data.columns.time = {log.settings.columns["time"]!r})'
    self._con = con
    self._word, self._zone = log.settings.time_format, log.settings.time_zone
    self._given = _given(self._word, self._zone)
    self._shapes = {}  # shape: (number, least, greatest text)
    self._day = self._month = self._hours = 0  # times that can be nothing else

  def add(self, source: str) -> None:
    """Counts the column `moment` of a query."""
    if self._given:
      return
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
      self._count_settling(source)

  def _count_settling(self, source: str) -> None:
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
    self._day += day
    self._month += month
    self._hours += hours

  def _example(self) -> str:
    """The least time of the commonest shape."""
    _, text, _ = min(self._shapes.values(), key=lambda one: (-one[0], one[1]))
    return text

  def _quoted(self) -> str:
    text = self._example()
    return repr(text if len(text) <= 40 else text[:40] + '...')

  def choose(self) -> Form | None:
    """The form of the times so far; None where day and month are open, or all is."""
    if self._given or not self._shapes:
      return self._given
    word = self._word if self._word in ORDERS else ''
    (name, instants, clock), most = self._vote(word)
    # Ten digits: 2024013108 is an hour, and the seconds of some day in 2034.
    if name == 'epoch_s' and self._hours >= most / 2:
      raise InputError(
        f'{self.where}: times like {self._example()} may be seconds since 1970 or '
        'YYYYMMDDhh; set data.time_format to epoch_s or %Y%m%d%H'
      )
    if name == 'other':
      name = word or self._order()
    if not name:
      return None
    form = Form(name, instants, clock, self._zone, bounded=not word)
    return _check_zone(form, self.where)

  def _vote(self, word: str) -> tuple[tuple[str, bool, bool], int]:
    """The reading (name, instants, clock) of most times, and of how many."""
    # Every reading of a shape has its rows' votes, also where several would do.
    votes = collections.Counter()
    for n, low, high in self._shapes.values():
      for reading in _readings(low, high):
        if not word or reading[0] == ('iso' if word == 'iso' else 'other'):
          votes[reading] += n
    if votes:
      return max(votes.items(), key=lambda item: (item[1], item[0]))
    those = f'{self.where}: {self._quoted()} and the other times'
    if word:
      raise InputError(
        f'{those} are not what data.time_format = {word!r} says; leave it out, and '
        'their form is found'
      )
    raise InputError(
      f'{those} have no form that is known; set data.time_format to a strptime '
      f"pattern such as '%d %b %Y %H:%M' or to one of {', '.join(WORDS)} (times of "
      f'other years than {YEARS} need it, too), or check data.columns.time'
    )

  def _order(self) -> str | None:
    """Which of day and month comes first; None: no time tells."""
    if self._day and self._month:
      raise InputError(
        f'{self.where}: {self._day} times can only have the day first and '
        f'{self._month} only the month; set data.time_format to day_first or '
        'month_first (the other rows are then malformed), or write all of '
        'them alike'
      )
    if not self._day and not self._month:
      return None
    return 'day_first' if self._day else 'month_first'

  def settle(self) -> Form:
    """The form of all times; refuses what is open to the end."""
    if self._word == 'typed':
      raise InputError(
        f"data.time_format is 'typed', but {self.where} holds texts or numbers; name "
        'their form'
      )
    form = self.choose()
    if form is None and self._shapes:
      raise InputError(
        f'{self.where}: times like {self._quoted()} may have the day or '
        'the month first, and none has a number above 12 that would tell; set '
        'data.time_format to day_first or month_first'
      )
    return form or Form('iso', False, True)  # No row has a time.

  def take_typed(self, form: Form) -> Form:
    """The form of a Parquet column of times, as the settings have it."""
    if self._word not in ('', 'typed'):
      raise InputError(
        f'data.time_format is {self._word!r}, but {self.where} holds {form.text}; '
        'leave it out'
      )
    if form.instants:
      check_settings('', form.zone)
    zone = self._zone or form.zone
    form = dataclasses.replace(form, zone=zone, bounded=not self._word)
    return _check_zone(form, self.where)


def _given(word: str, zone: str) -> Form | None:
  """The form that `data.time_format` settles alone; None: see the column."""
  if word in ('', 'typed', *ORDERS):
    return None
  instants = word in UNITS or bool(re.search('%[zZ]', word))
  clock = word in WORDS or bool(re.search('%-?[HIMSTXcfgn]', word))
  return _check_zone(Form(word, instants, clock, zone, False), 'data.time_format')


def _check_zone(form: Form, where: str) -> Form:
  """The form; refuses a zone where the log tells no instants."""
  if form.zone and not form.instants:
    raise InputError(
      f'data.time_zone is {form.zone!r}, but by {where} the log holds local '
      'clocks without offsets, which are shown as they are; leave it out'
    )
  return form


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
          f'data.time_format is {word!r} ({fault}); give one of {", ".join(WORDS)} '
          "or a strptime pattern such as '%d %b %Y %H:%M'."
        )
    if zone and not re.fullmatch(FIXED, zone):
      known = con.execute('SELECT name FROM pg_timezone_names()').fetchall()
      # Not BST or EST: they are several zones, and read as one of them.
      if (zone,) not in known or ('/' not in zone and zone not in ('UTC', 'GMT')):
        raise InputError(
          f'data.time_zone is {zone!r}, which is no zone that is known; give '
          "a name such as 'America/New_York', or an offset such as '+05:30'."
        )


def zone_name(zone: str | None) -> str:
  """The zone of a Parquet column, as Arrow has it ('Z', '+05'), as we write it."""
  zone = {None: '', 'Z': 'UTC'}.get(zone, zone)
  return f'{zone}:00' if re.fullmatch(r'[+-]\d\d', zone) else zone


def _readings(low: str, high: str) -> Iterator[tuple[str, bool, bool]]:
  """Yields keys (name, instants, clock) of what may be read of a shape."""
  number = re.fullmatch(_NUMBER, low)
  if number:
    yield from _numbers(number[1], re.match(r'\d+', high)[0], whole=not number[2])
    return
  text = _normal(low)
  for name, date in DATES.items():
    if match := re.fullmatch(f'{date}{CLOCK}?{ZONE}?', text):
      clock, zone = match[4] is not None, match[9] is not None
      if clock or not zone:  # A date with an offset is no instant.
        yield name, zone, clock


def _numbers(low: str, high: str, whole: bool) -> Iterator[tuple[str, bool, bool]]:
  """The readings of numbers under which some lie in YEARS."""
  least, most, size = int(low), int(high), len(low)
  for name, unit in UNITS.items():
    scale = 1e6 / unit  # Units in a second.
    if least < LAST * scale and most >= FIRST * scale:
      yield name, True, True
  if least < LAST // _DAY + SERIAL_ZERO and most >= FIRST // _DAY + SERIAL_ZERO:
    yield 'serial', False, not whole
  # Ten digits are taken for seconds, or refused: see `Column.choose`.
  if whole and size in (8, 12, 14) and (low[:4] <= '2100' and high[:4] >= '1990'):
    yield 'compact', False, size > 8


def _normal(text: str) -> str:
  """20240131T081500 -> 2024-01-31T08:15:00."""
  if not re.match(COMPACT, text):
    return text
  for pattern, parts in SPREAD:
    text = re.sub(pattern, parts, text)
  return text
