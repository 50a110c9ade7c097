"""Raw behavior logs in, sorted memory-mapped event columns out.

Why DuckDB: sorting, dropping duplicates and numbering each user's events are
SQL with window functions, and its operators spill to disk, so a log larger than
memory goes the same way as a small one, without a server. Text is cut into rows
by Python's csv and json readers in front of it: DuckDB's own do not say on
which line of the file an accepted row stood, and a complaint about it has to.

Invariants of the folder that `prepare` leaves: events are sorted by user, then
local time, then line of the file; `user` counts 0, 1, ... without gaps; the
folder exists only when it is complete; the same log and config give the same
fingerprint on every machine. Times are the user's own clock: an offset in the
log is dropped, not applied. Exact duplicates are rows equal in every *mapped*
column.
"""

import csv
import dataclasses
import difflib
import functools
import gzip
import hashlib
import itertools
import json
import operator
import pathlib
import re
import shutil
import zlib

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from behaviorlm_jax.data import splits
from behaviorlm_jax.data.splits import Behavior
from behaviorlm_jax.data.splits import SPLITS
from behaviorlm_jax.errors import InputError

_FIELDS = ('user', 'time', 'behavior', 'place', 'group')
_REQUIRED = 3  # how many of _FIELDS every log has
_LONGEST_NAME = 256  # characters
_LINES = 8192  # lines cut at a time; a bad one sends them all the slow way
_RECORD_LINES = 256  # a stray quote may swallow no more lines than this
_CHUNKS = 64  # chunks handed to DuckDB at a time
_SHARD = 4_000_000  # events
_MEMORY = '4GB'  # leaves room on an 8 GB machine; beyond it DuckDB spills
_DTYPES = {'user': '<i4', 'time': '<i8', 'behavior': '<i4', 'place': '<i4',
           'split': '<i1'}

_DATE_TIME = (r'^(\d{4}-\d\d-\d\d[ T](?:[01]\d|2[0-3]):[0-5]\d'
              r'(?::[0-5]\d(?:\.\d+)?)?) ?(?:Z|[+-]\d\d:?(?:\d\d)?)?$')
_MACROS = fr"""
    CREATE MACRO clean(text) AS
      trim(regexp_replace(text, '[\p{{Z}}\p{{Cc}}]+', ' ', 'g'));
    CREATE MACRO micros(text) AS coalesce(
      epoch_us(TRY_CAST(regexp_extract(text, '{_DATE_TIME}', 1) AS TIMESTAMP)),
      TRY_CAST(regexp_extract(text, '^-?\d{{1,11}}$') AS BIGINT) * 1000000,
      TRY_CAST(regexp_extract(text, '^-?\d{{13}}$') AS BIGINT) * 1000);
    CREATE TABLE rows (line BIGINT, who VARCHAR, micros BIGINT, what VARCHAR,
      place VARCHAR, team VARCHAR, reason VARCHAR, text VARCHAR);
    CREATE VIEW parsed AS FROM rows WHERE reason IS NULL;
"""
# $grouped: whether a row without a group is malformed.
_ABSORB = """
    INSERT INTO rows
    SELECT line, who, instant, what, place, team,
           coalesce(reason, CASE
             WHEN who IS NULL THEN 'no user'
             WHEN moment IS NULL THEN 'no time'
             WHEN instant IS NULL THEN
               'time ''' || left(clean(moment), 40) || ''' is not a date-time'
             WHEN team IS NULL AND $grouped THEN 'no group' END) AS why,
           CASE WHEN why IS NOT NULL THEN rtrim(text, chr(10) || chr(13)) END
    FROM (SELECT line, nullif(clean("user"), '') AS who,
                 nullif(trim("time"), '') AS moment, micros(moment) AS instant,
                 coalesce(clean(behavior), '') AS what,
                 nullif(clean(place), '') AS place,
                 nullif(clean("group"), '') AS team, reason, text
          FROM {source})"""


@dataclasses.dataclass(frozen=True, eq=False)
class Events:
  """Sorted event columns of one length n, and the names they index."""

  user: np.ndarray  # int32[n], index into users
  time: np.ndarray  # int64[n], seconds since 1970-01-01 on the user's own clock
  behavior: np.ndarray  # int32[n], index into behaviors
  place: np.ndarray  # int32[n], index into places, -1 if none
  split: np.ndarray  # int8[n], index into SPLITS
  first: np.ndarray  # int64[n], position of the first event of the same user
  users: list[str]
  places: list[str]
  behaviors: list[Behavior]
  fingerprint: str
  known: int  # how many behaviors are candidates: all before the unseen


def prepare(data, path, folder: pathlib.Path, seed: int) -> dict:
  """Reads the log at `path` into the new `folder`; returns its summary."""
  path, folder = pathlib.Path(path), pathlib.Path(folder)
  ends = splits.cuts(data.split)
  if not path.is_file():
    raise InputError(f'{path} does not exist or is no file: set data.events')
  half = folder.with_name(folder.name + '.tmp')
  shutil.rmtree(half, ignore_errors=True)  # of a run that was killed
  spill = half / 'spill'
  spill.mkdir(parents=True)
  try:
    with duckdb.connect(spill / 'log.duckdb', config={
        'temp_directory': str(spill), 'memory_limit': _MEMORY}) as con:
      summary = _prepare(con, data, path, half, seed, ends)
    shutil.rmtree(spill)
    half.rename(folder)
  finally:
    shutil.rmtree(half, ignore_errors=True)
  return summary


def _prepare(con, data, path, folder, seed, ends) -> dict:
  grouped = _absorb(con, data, path)
  counts = _reject(con, data.max_rejected, path, folder)
  _check_names(con, path)
  counts |= splits.order_events(con, data.collapse_repeats)
  if grouped:
    splits.split_by_group(con, path, seed, ends)
  else:
    splits.split_by_time(con, ends)
  behaviors, position = splits.group_behaviors(con, data.anchor_share)
  _check_training(behaviors, path)
  digests = _write_events(con, folder, position)
  users, places = (
      _write_names(con, table, folder) for table in ('users', 'places'))
  _write_json(folder / 'behaviors.json',
              [dataclasses.asdict(item) for item in behaviors])
  summary = counts | _summary(con, users, behaviors)
  summary['warnings'] = _warnings(summary)
  summary['fingerprint'] = _fingerprint(digests, users, places, behaviors)
  _write_json(folder / 'summary.json', summary)
  for warning in summary['warnings']:
    logging.warning('%s', warning)
  return summary


# Reading: any format -> the table `rows`.


def _absorb(con, data, path) -> bool:
  """Fills the table `rows`; says whether the log is split by groups."""
  con.execute(_MACROS)
  columns = [data.columns.get(field) or (field if i < _REQUIRED else None)
             for i, field in enumerate(_FIELDS)]
  parameters = {'grouped': columns[-1] is not None}
  name = path.name.lower()
  if name.endswith('.parquet'):
    source = _parquet(path, columns)
    try:
      con.execute(_ABSORB.format(source=f'({source})'), parameters)
    except duckdb.Error as error:
      reason = ' '.join(str(error).split())
      raise InputError(f'{path} cannot be read to its end: {reason}'
                       ) from error
    return parameters['grouped']
  suffix = pathlib.Path(name.removesuffix('.gz')).suffix
  chunks = _batches(path, columns, suffix)
  con.execute('BEGIN')
  while batches := list(itertools.islice(chunks, _CHUNKS)):
    con.register('chunk', pa.Table.from_batches(batches))
    con.execute(_ABSORB.format(source='chunk'), parameters)
  con.execute('COMMIT')
  return parameters['grouped']


def _check_columns(path, columns, present):
  """Refuses a mapped column that the log lacks; names the nearest it has."""
  for field, column in zip(_FIELDS, columns, strict=True):
    if column is not None and column not in present:
      near = difflib.get_close_matches(column, present, n=3, cutoff=.4)
      raise InputError(
          f'{path} has no column {column!r}; set data.columns.{field} to one '
          f'of its columns, {"nearest" if near else "which are"}: '
          + ', '.join(map(repr, near or list(present)[:20])))


def _parquet(path, columns) -> str:
  """A query for the mapped columns of a Parquet file, all as text."""
  try:
    schema = pq.read_schema(path)
  except (pa.ArrowInvalid, OSError) as error:
    raise InputError(f'{path} is not a readable Parquet file: {error}'
                     ) from error
  _check_columns(path, columns, schema.names)
  texts = []
  for field, column in zip(_FIELDS, columns, strict=True):
    value = 'NULL' if column is None else '"' + column.replace('"', '""') + '"'
    zone = column and getattr(schema.field(column).type, 'tz', None)
    if zone:
      value = _wall_clock(value, zone)
    texts.append(f'CAST(({value}) AS VARCHAR) AS "{field}"')
  # DuckDB takes the path for a glob pattern.
  literal = re.sub(r'([*?[])', r'[\1]', str(path)).replace("'", "''")
  return (
      'SELECT *, NULL AS reason, concat_ws(\',\', COLUMNS(* EXCLUDE line)) '
      'AS text FROM (SELECT file_row_number + 1 AS line, '
      f"{', '.join(texts)} FROM read_parquet('{literal}', "
      'file_row_number = true))')


def _wall_clock(value: str, zone: str) -> str:
  """SQL for a Parquet time, stored as UTC, on the clock of its column."""
  offset = re.fullmatch(r'([+-])(\d\d):(\d\d)', zone)
  if not offset:
    return f"{value} AT TIME ZONE '{zone}'"
  sign, hours, minutes = offset.groups()
  return (f"{value} AT TIME ZONE 'UTC' "
          f"{sign} INTERVAL {int(hours) * 60 + int(minutes)} MINUTE")


def _batches(path, columns, suffix):
  """Yields Arrow batches (line, _FIELDS, reason, text) of a text log."""
  openers = {
      '.csv': functools.partial(_open_csv, delimiter=','),
      '.tsv': functools.partial(_open_csv, delimiter='\t'),
      '.jsonl': _open_json, '.ndjson': _open_json, '.json': _open_json}
  if suffix not in openers:
    raise InputError(
        f'{path} has no known format: the name of data.events must end in '
        f'{", ".join(openers)} (each also with .gz) or .parquet')
  cut, number, lines = None, 1, []
  for more, last in _chunks(path):
    lines += more
    if cut is None:
      used, cut = openers[suffix](path, columns, lines)
      lines, number = lines[used:], number + used
    rows, used = cut(lines, last)
    if rows:
      yield _batch(number, rows, columns)
    lines, number = lines[used:], number + used


def _chunks(path):
  """Yields (lines with their ends, False), then ([], True)."""
  opener = gzip.open if path.suffix.lower() == '.gz' else open
  try:
    # Bad bytes become surrogates, which `_is_text` finds.
    with opener(path, 'rt', encoding='utf-8-sig', errors='surrogateescape',
                newline='') as file:
      while lines := list(itertools.islice(file, _LINES)):
        yield lines, False
  except (OSError, EOFError, zlib.error) as error:
    raise InputError(f'{path} cannot be read to its end: {error}') from error
  yield [], True


def _batch(number, rows, columns) -> pa.RecordBatch:
  """Rows are (offset, values of the mapped columns, reason, text)."""
  offsets, values, reasons, texts = zip(*rows, strict=True)
  mapped = iter(zip(*values, strict=True))
  arrays = {'line': pa.array(np.asarray(offsets, np.int64) + number)}
  for field, column in zip(_FIELDS, columns, strict=True):
    arrays[field] = (pa.nulls(len(rows), pa.string()) if column is None
                     else pa.array(next(mapped), pa.string()))
  arrays['reason'] = pa.array(reasons, pa.string())
  arrays['text'] = pa.array(texts, pa.string())
  return pa.RecordBatch.from_pydict(arrays)


def _open_csv(path, columns, lines, delimiter):
  """Reads the header: lines used, and the function that cuts the others."""
  options = {'delimiter': delimiter, 'strict': True}
  reader = csv.reader(lines, **options)
  try:
    header = next(filter(None, reader), None)
  except csv.Error as error:
    raise InputError(f'{path} line {reader.line_num}: the header is broken: '
                     f'{error}') from error
  if header is None:
    raise InputError(f'{path} is empty: give data.events a log with a header')
  names = [name.strip() for name in header]
  _check_columns(path, columns, names)
  pick = operator.itemgetter(
      *(names.index(column) for column in columns if column is not None))
  return reader.line_num, functools.partial(
      _cut_csv, width=len(names), pick=pick, options=options)


def _cut_csv(lines, last, width, pick, options):
  """Cuts lines into rows; returns them and how many lines they took."""
  try:
    table = list(csv.reader(lines, **options))
  except csv.Error:
    table = []
  if (len(table) == len(lines) and set(map(len, table)) == {width}
      and _is_text(''.join(lines))):
    return list(zip(range(len(lines)), map(pick, table),
                    itertools.repeat(None), lines, strict=False)), len(lines)
  rows, start = [], 0
  while start < len(lines):  # record by record
    record = lines[start:start + _RECORD_LINES]
    fields, reason, used = _cut_record(record, width, options)
    if fields is None and not last and len(record) < _RECORD_LINES:
      break  # its end may stand in the next chunk
    text = ''.join(record[:used])
    if text.strip():
      values = pick([''] * width if reason else fields)
      rows.append((start, values, reason, _mend(text)))
    start += used
  return rows, start


def _cut_record(lines, width, options):
  """The first record of `lines`: fields, why it is malformed, lines used.

  A record that never ends gives up its first line only: the lines that a stray
  quote swallowed are tried again.
  """
  reader = csv.reader(lines, **options)
  try:
    fields = next(reader)
  except csv.Error as error:
    return None, f'broken row: {error}', 1
  reason = None
  if len(fields) != width:
    reason = f'{len(fields)} fields instead of {width}'
  elif not _is_text(''.join(fields)):
    reason = 'not UTF-8 text'
  return fields, reason, reader.line_num


def _open_json(path, columns, lines):
  """Like `_open_csv`; columns are the keys of the first chunk's objects."""
  keys = {}
  for line in lines:
    keys |= dict.fromkeys(_parse_json(line)[0] or ())
  if not ''.join(lines).strip():
    raise InputError(f'{path} is empty: give data.events a log with rows')
  if keys:  # else every line is malformed, and is reported as such
    _check_columns(path, columns, list(keys))
  return 0, functools.partial(
      _cut_json, columns=[column for column in columns if column is not None])


def _cut_json(lines, last, columns):
  """Like `_cut_csv`; a line is a row."""
  rows = []
  for offset, line in enumerate(lines):
    if not line.strip():
      continue
    row, reason = _parse_json(line)
    values = [_as_text((row or {}).get(column)) for column in columns]
    if not _is_text(''.join(filter(None, values))):
      values, reason = [None] * len(columns), 'not UTF-8 text'
    rows.append((offset, values, reason, _mend(line)))
  return rows, len(lines)


def _parse_json(line):
  """The object of a line and None, or None and the reason."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:
    return None, f'broken JSON: {error}'
  return (row, None) if isinstance(row, dict) else (None, 'not a JSON object')


def _as_text(value) -> str | None:
  if value is None or isinstance(value, str):
    return value
  return json.dumps(value, ensure_ascii=False)


def _is_text(text: str) -> bool:
  """Whether `text` is free of the surrogates that bad bytes became."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _mend(text: str) -> str:
  return text.encode(errors='replace').decode()


# Checking: what stops the run.


def _reject(con, most: float, path, folder) -> dict[str, int]:
  """Writes rejected.csv; refuses an empty log and too many malformed rows."""
  rows, rejected = con.execute(
      'SELECT count(*), count(reason) FROM rows').fetchone()
  if not rows:
    raise InputError(f'{path} holds no rows: give data.events a log with rows')
  cursor = con.execute('SELECT line, reason, text FROM rows '
                       'WHERE reason IS NOT NULL ORDER BY line')
  first = cursor.fetchmany(_LINES)
  if rejected > most * rows:
    line, reason, _ = first[0]
    raise InputError(
        f'{path} line {line}: {reason}; {rejected} of {rows} rows are '
        f'malformed ({rejected / rows:.2%}) and data.max_rejected = {most} '
        f'allows {most:.2%}: mend the rows, check data.columns, or raise '
        'data.max_rejected')
  with open(folder / 'rejected.csv', 'w', encoding='utf-8', newline='') as file:
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(['line', 'reason', 'text'])
    while first:
      writer.writerows(first)
      first = cursor.fetchmany(_LINES)
  if rejected == rows:
    raise InputError(f'{path}: all {rows} rows are malformed: check '
                     'data.columns')
  return {'rows': rows, 'rejected': rejected}


def _check_names(con, path):
  """An unusable behavior name is a wrong log, not a malformed row."""
  bad = con.execute(
      'SELECT line, length(what) FROM parsed WHERE length(what) NOT BETWEEN 1 '
      f'AND {_LONGEST_NAME} ORDER BY line LIMIT 1').fetchone()
  if bad:
    line, length = bad
    what = f'has {length} characters' if length else 'is empty'
    raise InputError(
        f'{path} line {line}: the behavior name {what}; give every row a name '
        f'of 1 to {_LONGEST_NAME} characters (data.columns.behavior)')


def _check_training(behaviors, path):
  if not any(item.train_count for item in behaviors):
    raise InputError(
        f'{path}: none of its {sum(item.count for item in behaviors)} events '
        'falls into the training split: give longer histories (or more groups) '
        'or a larger first fraction of data.split')
  taught = [item.name for item in behaviors if item.train_count]
  if len(taught) < 2:
    raise InputError(
        f'{path}: the training split holds 1 behavior, {taught[0]!r}, and at '
        'least 2 are needed: check data.columns.behavior and data.split')


# Writing: DuckDB tables -> the folder.


def _write_events(con, folder, position) -> dict[str, str]:
  """Writes the shards; returns the SHA-256 of every whole column."""
  table = np.full(max(position) + 1, -1, '<i4')
  table[list(position)] = list(position.values())
  hashes = {name: hashlib.sha256() for name in _DTYPES}
  reader = con.sql('SELECT uid, micros, bid, pid, split FROM events '
                   'ORDER BY uid, micros, line').to_arrow_reader(_SHARD)
  for number, shard in enumerate(_shards(reader)):
    user, micros, behavior, place, split = (
        column.to_numpy() for column in shard.columns)
    # Floor, also before 1970.
    values = user, micros // 1_000_000, table[behavior], place, split
    columns = {
        name: np.ascontiguousarray(value, dtype) for (name, dtype), value in
        zip(_DTYPES.items(), values, strict=True)}
    for name, value in columns.items():
      hashes[name].update(value)
    _write_arrow(folder / f'part-{number:05d}.arrow', columns)
  return {name: digest.hexdigest() for name, digest in hashes.items()}


def _shards(reader):
  """Re-cuts record batches into tables of _SHARD events; the last is rest."""
  held, size = [], 0
  for batch in reader:
    held.append(batch)
    size += len(batch)
    while size >= _SHARD:
      whole = pa.Table.from_batches(held)
      yield whole.slice(0, _SHARD)
      held = whole.slice(_SHARD).to_batches()
      size -= _SHARD
  if size:
    yield pa.Table.from_batches(held)


def _write_arrow(path, columns):
  """One record batch a file, so that every column maps as one array."""
  batch = pa.RecordBatch.from_pydict(
      {name: pa.array(value) for name, value in columns.items()})
  with pa.ipc.new_file(str(path), batch.schema) as writer:
    writer.write_batch(batch)


def _write_names(con, table, folder) -> list[str]:
  rows = con.execute(f'SELECT name FROM {table} ORDER BY id').fetchall()
  names = [name for name, in rows]
  _write_arrow(folder / f'{table}.arrow',
               {'name': pa.array(names, pa.string())})
  return names


def _write_json(path, value):
  path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + '\n',
                  encoding='utf-8')


def _summary(con, users, behaviors) -> dict:
  sizes = dict(con.execute(
      'SELECT split, count(*) FROM events GROUP BY split').fetchall())
  groups = [item.group for item in behaviors]
  return {
      'events': sum(sizes.values()),
      'users': len(users),
      'behaviors': len(behaviors),
      'anchors': groups.count('anchor'),
      'tails': groups.count('tail'),
      'unseen': groups.count('unseen'),
      'unseen_test_events': sum(
          item.count for item in behaviors if item.group == 'unseen'),
      'splits': {name: sizes.get(i, 0) for i, name in enumerate(SPLITS)},
  }


def _warnings(summary) -> list[str]:
  warnings = []
  if not summary['tails']:
    warnings.append(
        f'no tail behavior: all {summary["anchors"]} behaviors are anchors; '
        'stage 2 has nothing rare to learn (data.anchor_share)')
  if summary['unseen']:
    warnings.append(
        f'behaviors seen only in the test split: {summary["unseen"]}, with '
        f'{summary["unseen_test_events"]} events in all; they may stand in '
        'contexts and are never candidates')
  return warnings


def _fingerprint(digests, users, places, behaviors) -> str:
  """SHA-256 of the columns, names and groups; the shard size is not in it."""
  listed = [[item.name, item.group] for item in behaviors]
  text = json.dumps([digests, users, places, listed])
  return hashlib.sha256(text.encode()).hexdigest()


# Opening.


def open_events(folder) -> Events:
  """Memory-maps a prepared folder; zero copy where it has one shard."""
  folder = pathlib.Path(folder)
  shards = [_map(path) for path in sorted(folder.glob('part-*.arrow'))]
  assert shards, f'{folder} holds no events'
  columns = {}
  for name in _DTYPES:
    parts = [shard[name].to_numpy(zero_copy_only=True) for shard in shards]
    columns[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
  starts = np.flatnonzero(np.diff(columns['user'], prepend=-1))
  behaviors = [Behavior(**item) for item in json.loads(
      (folder / 'behaviors.json').read_text('utf-8'))]
  users, places = (_map(folder / f'{name}.arrow')['name'].to_pylist()
                   for name in ('users', 'places'))
  summary = json.loads((folder / 'summary.json').read_text('utf-8'))
  return Events(
      **columns, first=starts[columns['user']], users=users, places=places,
      behaviors=behaviors, fingerprint=summary['fingerprint'],
      known=sum(item.group != 'unseen' for item in behaviors))


def _map(path) -> pa.RecordBatch:
  return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
