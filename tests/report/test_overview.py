"""inspect: what it prints, and that no log makes it fail with a traceback."""

import csv
import datetime
import gzip
import io
import json
import os
import re
import subprocess
import sys

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from behaviorlm_jax import config as config_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.report import overview

EXAMPLES = int(os.environ.get('LOGS', 500))  # LOGS=5000 by hand.
START = datetime.datetime(2024, 1, 1, 8, 17)


def make_config(path, **fields):
  config = config_lib.default()
  config.data.events = str(path)
  config.data.update(fields)
  return config


def write_log(path, rows, header='user,time,behavior'):
  path.write_text('\n'.join([header, *rows]) + '\n')
  return path


def weeks(users=5, events=40):
  """Rows of users who do one thing after the other, an hour apart."""
  names = ('work', 'lunch', 'gym', 'sleep', 'read')
  return [
    f'u{u},{START + datetime.timedelta(hours=i)},{names[(i + u) % 5]}'
    for u in range(users)
    for i in range(events)
  ]


def said(capsys, path, **fields):
  overview.look(make_config(path, **fields))
  return capsys.readouterr().out


def test_a_sound_log_is_described(tmp_path, capsys):
  rows = [*weeks(), 'u0,2024-01-01 08:17:00,work', 'NULL,2024-01-01 09:17,gym']
  text = said(capsys, write_log(tmp_path / 'log.csv', rows))
  assert 'times      ISO 8601, 2024-01-01 to 2024-01-02' in text
  assert 'rows       202 = 200 kept + 1 dropped + 1 rejected' in text
  assert 'rejected   1: user means none (data.nulls)' in text
  assert 'users      5, of 40 to 40 events' in text
  assert 'behaviors  5: 5 anchors, 0 tail' in text
  assert re.search(r'08:00 █+ +10\n', text)
  assert list(tmp_path.iterdir()) == [tmp_path / 'log.csv']  # Nothing is left.


def test_what_is_odd_is_named(tmp_path, capsys):
  rows = [*weeks(12, 30), *weeks(1, 400)]
  rows = [row.replace('gym', '7').replace('read', 'Work') for row in rows]
  rows = [re.sub(r' \d\d:17', ' 00:00', row) for row in rows]
  rows += [f'unknown,2024-03-01 00:00:00,{name}' for name in ('work', 'sleep')]
  rows += ['u1,2024-04-01 00:00:00,sleep', 'u1,2024-04-02 00:00:00,sleep'] * 99
  text = said(capsys, write_log(tmp_path / 'log.csv', rows), collapse_repeats=True)
  odd = text[text.index('\nodd\n') :]
  for part in (
    "'Work' and 'work'",
    '1 of 5 behaviors are numbers',
    "user 'u0' has ",
    "look like nobody: 'unknown'",
    '100% of events are at 00:00',
  ):
    assert part in odd, odd
  assert 'nothing odd' not in text


def test_repeats_are_odd_where_they_are_many(tmp_path, capsys):
  rows = [
    f'{row[:-1]}{row[-1]}'
    for row in weeks()
    for row in (row, row.replace(':17:', ':18:'))
  ]
  text = said(capsys, write_log(tmp_path / 'log.csv', rows))
  assert '50% of rows repeat the behavior before them' in text


def test_a_log_without_a_clock_is_shown_by_weekday(tmp_path, capsys):
  rows = [row.replace(' 08:17:00', '') for row in weeks()]
  rows = [re.sub(r' \d\d:17:00', '', row) for row in rows]
  text = said(capsys, write_log(tmp_path / 'log.csv', rows))
  assert 'events by weekday' in text and '  Mon ' in text
  assert 'dates alone' in text


@pytest.mark.parametrize(
  'rows, match',
  [
    ([], 'holds no rows'),
    (['u,2024-01-01 08:17,x'], 'holds one behavior alone'),
    (weeks(40, 3), 'test split has no sample'),
  ],
)
def test_what_a_run_would_refuse_is_refused(tmp_path, rows, match):
  with pytest.raises(InputError, match=match):
    overview.look(make_config(write_log(tmp_path / 'log.csv', rows)))


def test_one_behavior_alone_is_said_to_be_one(tmp_path):
  rows = [
    f'u{u},{START + datetime.timedelta(hours=i)},on'
    for u in range(12)
    for i in range(60)
  ]
  with pytest.raises(
    InputError,
    match=(
      r"one behavior alone, 'on'.*of 720 rows 0 were malformed, 0 duplicates "
      'and 708 immediate repeats'
    ),
  ):
    overview.look(make_config(write_log(tmp_path / 'log.csv', rows)))


def test_the_command_ends_with_its_codes(tmp_path):
  log = write_log(tmp_path / 'log.csv', weeks())

  def run(*flags):
    return subprocess.run(
      [
        sys.executable,
        '-m',
        'behaviorlm_jax.inspect',
        '--config=configs/stage1.py',
        *flags,
      ],
      capture_output=True,
      text=True,
      check=False,
    )

  done = run(f'--config.data.events={log}')
  assert done.returncode == 0 and 'rows       200 = 200 kept' in done.stdout
  done = run(f'--config.data.events={tmp_path}/none.csv')
  assert done.returncode == 2
  assert re.fullmatch(
    r"error: data.events: '.*none.csv' does not exist.*\n", done.stderr
  )
  done = run(f'--config.data.events={log}', '--config.data.time_format=noon')
  assert done.returncode == 2 and 'Traceback' not in done.stderr


# Logs by chance.

TIMES = {
  'iso': lambda t: t.isoformat(' '),
  'T': lambda t: t.isoformat(),
  'Z': lambda t: t.isoformat() + 'Z',
  'utc': lambda t: f'{t} UTC',
  'offset': lambda t: t.isoformat() + '+05:30',
  'slashes': lambda t: t.strftime('%Y/%m/%d %H:%M'),
  'day': lambda t: t.strftime('%d/%m/%Y %H:%M'),
  'month': lambda t: t.strftime('%m/%d/%Y %I:%M %p'),
  'date': lambda t: str(t.date()),
  'compact': lambda t: f'{t:%Y%m%d}',
  'compact14': lambda t: f'{t:%Y%m%d%H%M%S}',
  's': lambda t: int(t.timestamp()),
  'float': lambda t: t.timestamp() + 0.25,
  'ms': lambda t: int(t.timestamp()) * 1000,
  'ns': lambda t: int(t.timestamp()) * 10**9,
  'serial': lambda t: 45292 + t.hour / 24,
  'words': lambda t: f'{t:%d %b %Y}',
  'early': lambda t: str(t.replace(year=1969)),
}
ODD = st.sampled_from(
  [
    'NULL',
    'nan',
    '',
    ' ',
    '7',
    '7.0',
    7,
    7.0,
    None,
    True,
    '<|im_end|>',
    '\0',
    '\u200b',
    'Café',
    'Cafe\u0301',
    'a"b',
    "it's",
    'a\\"b',
    'x,y;z\tw|v',
    'two\nlines',
    '"',
    '\ufeffx',
    'x' * 300,
    '=1+1',
    '👩‍💻',
    '\ud7ff',
    '[1]',
  ]
)
LABELS = st.one_of(
  st.sampled_from(['work', 'gym', 'sleep', 'read']),
  st.sampled_from(['work', 'gym', 'sleep', 'read']),
  ODD,
  st.text(max_size=6),
)


@st.composite
def logs(draw):
  """(name, bytes) of a log."""
  kind = draw(
    st.sampled_from(
      ['csv', 'csv', 'csv', 'jsonl', 'array', 'pretty', 'parquet', 'bytes']
    )
  )
  if kind == 'bytes':
    return 'log.csv', draw(st.binary(max_size=200))
  forms = draw(
    st.lists(
      st.sampled_from(sorted(TIMES)),
      min_size=1,
      max_size=draw(st.sampled_from([1, 1, 1, 2])),
    )
  )
  labels = draw(st.lists(LABELS, min_size=2, max_size=8))
  users = draw(st.lists(LABELS, min_size=1, max_size=4))
  count = draw(st.integers(0, 90))
  rng = draw(st.randoms(use_true_random=False))
  rows = [
    (
      rng.choice(users),
      TIMES[rng.choice(forms)](START + datetime.timedelta(hours=7 * i)),
      rng.choice(labels),
    )
    for i in range(count)
  ]
  if draw(st.booleans()):
    rng.shuffle(rows)
  if draw(st.integers(0, 9)) == 0:
    rows.append(('u', START.isoformat(), 'y' * 200_000))
  header = ('user', 'time', 'behavior')
  if kind == 'parquet':
    return 'log.parquet', _parquet(rows, header)
  encoding = draw(st.sampled_from(['utf-8', 'utf-8', 'utf-8-sig', 'utf-16', 'latin-1']))
  text = _csv(draw, rows, header) if kind == 'csv' else _json(kind, rows, header)
  if draw(st.integers(0, 9)) == 0:
    text = text[: rng.randrange(len(text) + 1)]  # Torn.
  content = text.encode(encoding, 'replace')
  packed = draw(st.sampled_from(['', '', 'gzip', 'zstd']))
  if packed == 'gzip':
    content = gzip.compress(content)
  elif packed:
    content = pa.compress(content, 'zstd', asbytes=True)
  return f'log.{kind}', content


def _csv(draw, rows, header):
  options = {
    'delimiter': draw(st.sampled_from(',;\t|')),
    'quoting': draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
  }
  if draw(st.booleans()):
    options |= {'escapechar': '\\', 'doublequote': False}
  out = io.StringIO()
  csv.writer(out, **options).writerows([header, *rows])
  return out.getvalue()


def _json(kind, rows, header):
  found = [dict(zip(header, row, strict=True)) for row in rows]
  if kind == 'array':
    return json.dumps(found)
  indent = 1 if kind == 'pretty' else None
  return '\n'.join(json.dumps(row, indent=indent) for row in found)


def _parquet(rows, header):
  columns = zip(*rows, strict=True) if rows else ([], [], [])
  out = io.BytesIO()
  pq.write_table(
    pa.table(
      {
        name: pa.array(
          [None if value is None else str(value) for value in values], pa.string()
        )
        for name, values in zip(header, columns, strict=True)
      }
    ),
    out,
  )
  return out.getvalue()


@pytest.mark.slow
@hypothesis.settings(
  max_examples=EXAMPLES,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(
  log=logs(), lenient=st.sampled_from([True, True, False]), collapse=st.booleans()
)
def test_any_log_is_read_or_refused_in_one_sentence(
  tmp_path, capsys, log, lenient, collapse
):
  name, content = log
  path = tmp_path / name
  path.write_bytes(content)
  fields = {'collapse_repeats': collapse}
  if lenient:
    fields |= {'max_rejected': 1.0, 'split': (0.5, 0.1, 0.4)}
  try:
    text = said(capsys, path, **fields)
  except InputError as error:
    assert '\n' not in str(error).strip() and len(str(error)) < 2000
    text = capsys.readouterr().out  # Printed where only the splits are amiss.
  if 'rows  ' in text:
    rows, kept, dropped, rejected = (
      int(n.replace(',', ''))
      for n in re.search(
        r'rows +([\d,]+) = ([\d,]+) kept \+ ([\d,]+) dropped \+ ([\d,]+)', text
      ).groups()
    )
    assert rows == kept + dropped + rejected
  hypothesis.event('read' if 'rows  ' in text else 'refused')
