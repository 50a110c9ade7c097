"""Times of a log: their form, the clock that is shown, and the order."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from behaviorlm_jax.data.log import reader, text_rows
from behaviorlm_jax.errors import InputError

TEN = 1704103200  # 2024-01-01 10:00 of a local clock.
DATE = 1704067200


def lines(texts):
  """Rows of one user, of other behaviors in turn."""
  return [f'u,"{text}",{"xyz"[i % 3]}' for i, text in enumerate(texts)]


@pytest.mark.parametrize(
  'one, two, seconds, form',
  [
    ('2024-01-01 10:00', '2024-01-31 11:30:05', TEN, 'ISO 8601'),
    ('2024-01-01T10:00:00.999', '2024-01-31T11:30:05.1', TEN, 'ISO 8601'),
    ('2024-01-01 10:00:00,123', '2024-01-31 11:30:05,123', TEN, 'ISO 8601'),
    ('2024-1-1 9:05', '2024-1-31 11:30', TEN - 3300, 'ISO 8601'),
    ('2024/01/01 10:00:00', '2024/01/31 11:30:05', TEN, 'ISO 8601'),
    ('2024-01-01 10:00 AM', '2024-01-31 11:30:05 pm', TEN, 'ISO 8601'),
    ('2024-01-01 12:10 AM', '2024-01-31 12:10 PM', DATE + 600, 'ISO 8601'),
    ('20240101T100000', '20240131T1130', TEN, 'ISO 8601'),
    ('20240101 10:00:00', '20240131 11:30', TEN, 'ISO 8601'),
    ('2024-01-01T10:00:00Z', '2024-01-31T11:30Z', TEN, 'ISO 8601 with offsets'),
    (
      '2024-01-01 10:00:00 UTC',
      '2024-01-31 11:30:05 UTC',
      TEN,
      'ISO 8601 with offsets',
    ),
    (
      '2024-01-01T10:00:00.123456789Z',
      '2024-01-31T11:30:05.123456789Z',
      TEN,
      'ISO 8601 with offsets',
    ),
    (
      '2024-01-01 10:00:00+05:30',
      '2024-01-31T11:30-0800',
      TEN,
      'ISO 8601 with offsets',
    ),
    ('2024-01-01T10:00-08', '2024-01-31T11:30Z', TEN, 'ISO 8601 with offsets'),
    (
      '2024-01-01 10:00:00 +0000 UTC',
      '2024-01-31 11:30:05 +0000 UTC',
      TEN,
      'ISO 8601 with offsets',
    ),
    ('20240101T100000Z', '20240131T113005Z', TEN, 'ISO 8601 with offsets'),
    ('2024-01-01', '2024-01-31', DATE, 'ISO 8601, dates alone'),
    ('01/01/2024 10:00', '31/01/2024 11:30', TEN, 'day/month/year'),
    ('1.1.2024', '31.1.2024', DATE, 'day/month/year, dates alone'),
    ('01/01/2024 10:00:00 AM', '01/31/2024 11:30:05 PM', TEN, 'month/day/year'),
    ('20240101', '20240131', DATE, 'YYYYMMDD, dates alone'),
    ('202401011000', '202401311130', TEN, 'YYYYMMDD'),
    ('20240101100000', '20240131113005', TEN, 'YYYYMMDD'),
    ('1704103200', '1706700605', TEN, 'seconds since 1970'),
    ('1704103200.0', '1706700605.75', TEN, 'seconds since 1970'),
    ('1704103200,5', '1706700605,75', TEN, 'seconds since 1970'),
    ('1704103200999', '1706700605000', TEN, 'milliseconds since 1970'),
    ('1704103200999.5', '1706700605000.25', TEN, 'milliseconds since 1970'),
    ('1704103200000001', '1706700605000000', TEN, 'microseconds since 1970'),
    ('1704103200000000001', '1706700605000000000', TEN, 'nanoseconds since 1970'),
    ('45292.4166666667', '45322.4791666667', TEN, 'spreadsheet days'),
    ('45292.416666666664', '45322.479166666664', TEN, 'spreadsheet days'),
    ('45292,4166666667', '45322,4791666667', TEN, 'spreadsheet days'),
    ('45292', '45322', DATE, 'spreadsheet days, dates alone'),
  ],
)
def test_every_form_is_read_and_said(tmp_path, one, two, seconds, form, prepare):
  log, summary, _ = prepare(tmp_path, lines([two, one]), split=(1, 0, 0))
  assert log.time[0] == seconds
  shown = form + ', shown by the clock of UTC' * ('since 1970' in form)
  assert summary['times'] == f'{shown}, 2024-01-01 to 2024-01-31'
  assert summary['rejected'] == 0
  assert log.clock == summary['clock'] == ('dates alone' not in form)
  assert any('dates alone' in text for text in summary['warnings']) == (not log.clock)


def documented():
  """(data.time_format, a time) of the table of forms in the docs."""
  page = Path(__file__).parents[3] / 'docs/your_log.md'
  table = page.read_text().split('| `data.time_format` | examples |')[1]
  for words, examples in re.findall(r'^\| (`.*`) \| (.*) \|$', table, re.M):
    yield from (
      (re.findall('`(.*?)`', words), time) for time in re.findall('`(.*?)`', examples)
    )


@pytest.mark.parametrize('words, time', documented())
def test_every_time_of_the_docs_is_read(tmp_path, words, time, prepare):
  log, summary, _ = prepare(
    tmp_path,
    lines([time, time]),
    split=(1, 0, 0),
    time_format='' if words[0].startswith('epoch') else words[0],
  )
  assert summary['rejected'] == 0
  day = np.datetime64(int(log.time[0]), 's').astype('datetime64[D]')
  assert str(day) == '2024-01-31'


def test_day_or_month_first_is_found_from_the_whole_column(
  tmp_path, monkeypatch, prepare
):
  monkeypatch.setattr(text_rows, 'LINES', 3)
  monkeypatch.setattr(reader, '_CHUNKS', 2)
  texts = [f'0{i % 9 + 1}/02/2024 10:0{i % 10}' for i in range(40)]
  log, summary, _ = prepare(
    tmp_path, lines([*texts, '13/02/2024 10:00']), split=(1, 0, 0)
  )
  assert summary['times'] == 'day/month/year, 2024-02-01 to 2024-02-13'
  assert (summary['rows'], summary['rejected']) == (41, 0)
  assert log.time.min() == 1706781600


def test_a_form_that_later_rows_refute_is_given_up(tmp_path, monkeypatch, prepare):
  monkeypatch.setattr(text_rows, 'LINES', 3)
  monkeypatch.setattr(reader, '_CHUNKS', 2)
  texts = ['2024-01-01'] + [f'2024-01-02 10:{i:02d}' for i in range(40)]
  _, summary, _ = prepare(
    tmp_path, lines(['2024-01-01'] * 6 + texts), split=(1, 0, 0), max_rejected=0.5
  )
  assert summary['times'].startswith('ISO 8601, 2024-01-02')
  assert (summary['rows'], summary['rejected']) == (47, 7)


def test_an_open_order_of_day_and_month_is_refused(tmp_path, refuse, prepare):
  texts = [f'0{i + 1}/02/2024 10:00' for i in range(9)]
  refuse(tmp_path, lines(texts), 'data.time_format', 'day_first', 'month_first')
  for order, day in (('day_first', '2024-02-01'), ('month_first', '2024-01-02')):
    (tmp_path / order).mkdir()
    _, summary, _ = prepare(
      tmp_path / order, lines(texts), split=(1, 0, 0), time_format=order
    )
    assert f', {day} to ' in summary['times']


def test_a_column_of_both_orders_is_refused(tmp_path, refuse):
  refuse(
    tmp_path,
    lines(['13/02/2024 10:00', '02/13/2024 10:00']),
    '1 times can only have the day first and 1 only the month',
  )


def test_numbers_that_may_be_hours_or_seconds_are_refused(tmp_path, refuse, prepare):
  refuse(
    tmp_path, lines(['2034010110', '2034010211', '2034010312']), 'epoch_s', '%Y%m%d%H'
  )
  log, _, _ = prepare(
    tmp_path,
    lines(['2034010110', '2034010211']),
    time_format='%Y%m%d%H',
    split=(1, 0, 0),
  )
  assert str(np.datetime64(int(log.time[0]), 's')) == '2034-01-01T10:00:00'


@pytest.mark.parametrize(
  'texts', [['1969-01-01 10:00', '1969-01-02 10:00'], ['2101-01-01', '2101-01-02']]
)
def test_other_years_need_a_format(tmp_path, texts, refuse, prepare):
  refuse(
    tmp_path,
    lines(texts),
    'outside of 1990 to 2100',
    'data.time_format',
    split=(1, 0, 0),
  )
  log, _, _ = prepare(tmp_path, lines(texts), time_format='iso', split=(1, 0, 0))
  assert len(log.time) == 2


@pytest.mark.parametrize(
  'texts',
  [
    ['12345678', '12345679'],
    ['3', '4'],
    ['noon', 'noon'],
    ['240101'] * 2,
    ['01/02/24 10:00'] * 2,
    ['1.7E+09'] * 2,
  ],
)
def test_times_of_no_known_form_are_refused_with_a_way_out(tmp_path, texts, refuse):
  refuse(tmp_path, lines(texts), texts[0], 'data.time_format', 'strptime')


def test_a_number_of_other_years_is_malformed(tmp_path, prepare):
  _, summary, _ = prepare(
    tmp_path,
    lines(['1704103200000', '1704103260000', '1704103200']),
    split=(1, 0, 0),
    max_rejected=0.5,
  )
  assert summary['reasons'] == {
    'time is not of the form milliseconds since 1970, shown by the clock of UTC': 1
  }


@pytest.mark.parametrize(
  'word, texts, seconds',
  [
    ('%d %b %Y %H:%M', ['01 Jan 2024 10:00', '02 Jan 2024 10:00'], TEN),
    (
      '%a %b %d %H:%M:%S %z %Y',
      ['Mon Jan 01 10:00:00 -0500 2024', 'Tue Jan 02 10:00:00 +0000 2024'],
      TEN,
    ),
    ('%d-%m-%Y %H:%M%z', ['01-01-2024 10:00+05:30', '02-01-2024 10:00+00:00'], TEN),
    ('epoch_s', ['36000', '122400'], 36000),
    ('epoch_ms', ['36000000', '122400000'], 36000),
    ('%d.%m.%y', ['01.01.24', '02.01.24'], DATE),
  ],
)
def test_a_format_that_is_given_is_used(tmp_path, word, texts, seconds, prepare):
  log, summary, _ = prepare(tmp_path, lines(texts), time_format=word, split=(1, 0, 0))
  assert log.time.tolist() == [seconds, seconds + 86400]
  assert summary['clock'] == (word != '%d.%m.%y')


@pytest.mark.parametrize(
  'field, value',
  [
    ('time_format', 'noon'),
    ('time_format', '%Q'),
    ('time_zone', 'Mars'),
    ('time_format', 'typed'),
  ],
)
def test_a_format_or_zone_that_is_none_is_refused(
  tmp_path, field, value, history, refuse
):
  refuse(tmp_path, history('xy'), f'data.{field} is {value!r}', **{field: value})


def test_a_zone_for_local_clocks_is_refused(tmp_path, history, refuse):
  refuse(
    tmp_path,
    history('xy'),
    "data.time_zone is 'Asia/Kolkata'",
    'local clocks',
    time_zone='Asia/Kolkata',
  )


# Order and clock.


def clocks(log):
  return [str(np.datetime64(int(t), 's'))[11:16] for t in log.time]


def test_events_are_ordered_by_instant_and_shown_by_their_clock(
  tmp_path, prepare, names
):
  # The clock goes back from 02:00 to 01:00.
  rows = [
    'u,2024-11-03T01:10:00-05:00,late',
    'u,2024-11-03T01:50:00-04:00,mid',
    'u,2024-11-03T01:40:00-04:00,early',
  ]
  log, _, _ = prepare(tmp_path, rows, split=(1, 0, 0))
  assert names(log) == ['early', 'mid', 'late']
  assert clocks(log) == ['01:40', '01:50', '01:10']


def test_one_instant_on_two_clocks_is_one_event(tmp_path, prepare):
  rows = [
    'u,2024-01-01T10:00:00+01:00,x',
    'u,2024-01-01T09:00:00Z,x',
    'u,2024-01-01T09:00:00Z,y',
  ]
  log, summary, _ = prepare(tmp_path, rows, split=(1, 0, 0))
  assert (summary['duplicates'], len(log.time)) == (1, 2)


@pytest.mark.parametrize(
  'texts',
  [
    ['1730613000', '1730616600'],
    ['2024-11-03T05:50Z', '2024-11-03T06:50Z'],
    ['2024-11-03T11:20+05:30', '2024-11-03T06:50Z'],
  ],
)
def test_instants_are_shown_by_the_zone_that_is_given(tmp_path, texts, prepare):
  log, summary, _ = prepare(
    tmp_path, lines(texts), split=(1, 0, 0), time_zone='America/New_York'
  )
  assert clocks(log) == ['01:50', '01:50']
  assert 'shown by the clock of America/New_York' in summary['times']
  assert not any('UTC' in text for text in summary['warnings'])


# Parquet.


@pytest.fixture
def read_times(read, write_parquet):
  def read_times(times, name='log.parquet', **fields):
    behaviors = list('xyz')[: len(times)]
    path = write_parquet(name, user=['u'] * len(times), time=times, behavior=behaviors)
    return read(path, **fields)

  return read_times


@pytest.mark.parametrize(
  'times, seconds',
  [
    (pa.array([TEN, TEN + 5]), TEN),
    (pa.array([float(TEN), TEN + 5.5]), TEN),
    (pa.array([TEN * 1e9, (TEN + 5) * 1e9]), TEN),
    (
      pa.array([TEN * 10**9 + 999_999_999, (TEN + 5) * 10**9]).cast(pa.timestamp('ns')),
      TEN,
    ),
    (pa.array([DATE // 86400, DATE // 86400 + 1], pa.int32()).cast(pa.date32()), DATE),
    (pa.array(['2024-01-01 10:00', '2024-01-01 10:01']), TEN),
  ],
)
def test_parquet_times_of_any_type_are_read(times, seconds, read_times):
  log, summary = read_times(times)
  assert log.time[0] == seconds
  assert summary['rejected'] == 0
  assert log.clock == (seconds == TEN)


def test_parquet_instants_are_shown_by_the_zone_of_the_column(read_times):
  instants = (
    pa.array([1730613000, 1730616600])
    .cast(pa.timestamp('s'))
    .cast(pa.timestamp('us', tz='America/New_York'))
  )
  log, summary = read_times(instants)
  assert log.time[0] == log.time[1]
  assert 'Parquet timestamps, shown by the clock of America' in summary['times']


def test_parquet_times_before_1990_need_a_word(read_times):
  times = pa.array([TEN, TEN + 1]).cast(pa.timestamp('us'))
  with pytest.raises(InputError, match='lies outside of 1990 to 2100'):
    read_times(times)
  log, _ = read_times(times, time_format='typed')
  assert log.time[0] == TEN // 10**6


@pytest.mark.parametrize('zone', ['UTC', '+05', 'Europe/Paris'])
def test_parquet_nanoseconds_with_a_zone_are_read(zone, read_times):
  times = pa.array([TEN * 10**9 + 999_999_999, (TEN + 5) * 10**9])
  times = times.cast(pa.timestamp('ns')).cast(pa.timestamp('ns', tz=zone))
  log, summary = read_times(times)
  ahead = {'UTC': 0, '+05': 5 * 3600, 'Europe/Paris': 3600}[zone]
  assert log.time[0] == TEN + ahead
  warned = [text for text in summary['warnings'] if 'the clock of UTC' in text]
  assert bool(warned) == (zone == 'UTC')


def test_folders_named_like_columns_leave_the_columns_alone(tmp_path, read_times):
  (tmp_path / 'user=all').mkdir()
  log, _ = read_times(pa.array([TEN, TEN + 5]), 'user=all/log.parquet')
  assert list(log.users) == ['u']


def test_a_float_column_with_nan_is_read(read_times):
  times = pa.array([float(TEN), float('nan'), TEN + 5.0])
  _, summary = read_times(times, max_rejected=0.5)
  assert (summary['rows'], summary['rejected']) == (3, 1)


@pytest.mark.parametrize(
  'odd', ['1970-01-01 00:00', '0001-01-01 00:00', '9999-12-31 23:59']
)
def test_a_row_of_another_century_is_malformed(tmp_path, odd, prepare):
  texts = [f'2024-01-01 10:{i:02d}' for i in range(20)]
  log, summary, _ = prepare(
    tmp_path, lines([*texts, odd]), split=(1, 0, 0), max_rejected=0.1
  )
  assert summary['reasons'] == {'time lies outside of 1990 to 2100': 1}
  assert (
    summary['times'] == 'ISO 8601, 2024-01-01 to 2024-01-01' and len(log.time) == 20
  )


@pytest.mark.parametrize(
  ('most', 'few'),
  [('20240131', '202401310815'), ('202401310815', '20240131'), ('45292', '45292.5')],
)
def test_dates_alone_and_clocks_are_two_forms(tmp_path, most, few, prepare):
  _, summary, _ = prepare(
    tmp_path, lines([most] * 3 + [few]), split=(1, 0, 0), max_rejected=0.5
  )
  assert summary['rejected'] == 1


@pytest.mark.parametrize('impossible', ['01/99/2024 08:00', '99/01/2024 08:00'])
def test_a_date_that_is_none_settles_no_order(tmp_path, impossible, refuse):
  texts = [f'0{i + 1}/02/2024 10:00' for i in range(9)]
  refuse(tmp_path, lines([*texts, impossible]), 'day_first', max_rejected=0.5)


def test_names_of_zones_are_instants_without_a_clock(tmp_path, prepare):
  texts = ['2024-01-01 05:00:00 EST', '2024-01-01 10:00:05 UTC']
  log, summary, _ = prepare(
    tmp_path, lines(texts), split=(1, 0, 0), time_format='%Y-%m-%d %H:%M:%S %Z'
  )
  assert log.time.tolist() == [TEN, TEN + 5]
  assert 'shown by the clock of UTC' in summary['times']
  assert any('data.time_zone' in text for text in summary['warnings'])


@pytest.mark.parametrize('zone', ['BST', 'EST', '+99:99', '+19:00'])
def test_zones_that_are_several_or_none_are_refused(tmp_path, zone, refuse):
  refuse(
    tmp_path, lines(['1704103200', '1704103205']), 'data.time_zone', time_zone=zone
  )


def test_a_format_that_the_times_contradict_is_refused(tmp_path, refuse):
  refuse(
    tmp_path,
    lines(['2024-01-01 10:00', '2024-01-01 10:05']),
    "data.time_format = 'day_first'",
    'leave it out',
    time_format='day_first',
  )


def test_a_number_beyond_all_years_is_malformed(tmp_path, prepare):
  texts = [f'17041032{i:02d}000000' for i in range(20)]
  _, summary, _ = prepare(
    tmp_path,
    lines([*texts, '9223372036854775807', '-9223372036854775807']),
    split=(1, 0, 0),
    max_rejected=0.2,
    time_format='epoch_us',
    time_zone='Europe/Paris',
  )
  assert (summary['rows'], summary['rejected']) == (22, 2)
