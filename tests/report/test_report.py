"""The report from synthetic work directories: what is there, and only that."""

import datetime
import html.parser
import json
import re
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behaviorlm_jax.evaluate import baselines, metrics, probabilities
from behaviorlm_jax.report import report, run_files
from behaviorlm_jax.score import label_tree

ATTACK = '<script>alert(1)</script>'
CONTROL = '<|im_end|> #'
SCORES = ('log_p', 'map', 'coverage@5', 'accuracy@1', 'accuracy@3', 'accuracy@5')
SCORES = (*SCORES, 'ndcg@5', 'f1_weighted', 'f1_macro')
POINTS = {'accuracy': 0.0, 'macro_f1': 0.3, 'tail': 0.6}  # Each one's tau.


class Work:
  """A work directory of a run that never was; `add_*` writes its files."""

  def __init__(self, folder, count=20, n=120):
    self.folder, self.rng = folder, np.random.default_rng(0)
    share = 1 / np.arange(1, count + 1) ** 1.3
    share /= share.sum()
    self.anchor = share > 0.05
    self.names = [f'Behavior {i} of the log' for i in range(count)]
    long = 'A very <b>long</b> name: ' + 'x' * 40
    self.names[:4] = [ATTACK, 'Bar | Pub $x_1$', long, CONTROL]
    self.true = self.rng.choice(count, n, p=share)
    self.true[: count // 2] = np.arange(count // 2)
    self.behavior = self.rng.choice(count, 3000, p=share)
    self.samples = np.arange(n) * 7
    self.behavior[self.samples] = self.true
    counts = np.bincount(self.behavior, minlength=count)
    self.log_pi = np.log((counts + 1) / (counts + 1).sum())
    behaviors = [
      {'name': name, 'train_count': int(c), 'group': 'anchor' if a else 'tail'}
      for name, c, a in zip(self.names, counts, self.anchor, strict=True)
    ]
    behaviors.append({'name': 'only at the end', 'train_count': 0, 'group': 'unseen'})
    rows = np.arange(3000)
    split = np.where(rows % 7 == 3, 1, 0)
    split[self.samples] = 2
    self.events = types.SimpleNamespace(
      behavior=self.behavior,
      user=rows // 75,
      time=rows * 3600,
      split=split,
      first=rows // 75 * 75,
      known=count,
      behaviors=[types.SimpleNamespace(**row) for row in behaviors],
    )
    self.json('events/behaviors.json', behaviors)
    self.json(
      'events/summary.json',
      {
        'rows': 3105,
        'rejected': 3,
        'events': 3100,
        'users': 40,
        'clock': True,
        'splits': {'train': 2600, 'validation': 250, 'test': 250},
        'warnings': ['1 behavior occurs only in the test split'],
      },
    )

  def json(self, name, value):
    path = self.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))

  def evaluation(self, stage):
    return json.loads((self.folder / stage / 'evaluation.json').read_text())

  def log_p(self, skill):
    """Of every behavior; the truth gets a start of `skill`."""
    score = 3 * self.rng.random((len(self.true), len(self.names)))
    score[np.arange(len(self.true)), self.true] += 3 * skill
    return label_tree.log_softmax(score)

  def judged(self, log_p):
    """(evaluation, columns of what was chosen), as they are written of log p."""
    names, top = np.array(self.names), label_tree.best(log_p)
    found = metrics.by_group(self.true, top, self.anchor)
    for group, more in probabilities.by_group(self.true, log_p, self.anchor).items():
      found[group] |= more
    table = probabilities.reliability(self.true, log_p)
    found |= {
      'ece': probabilities.calibration_error(table),
      'reliability': table.tolist(),
      'calibration': {'a': 1.0, 'b': 0.0, 'validation_samples': 250},
      'points': {},
    }
    own = log_p[np.arange(len(self.true)), self.true]
    columns = {'log_prob': pa.array(own, pa.float32())}
    for point, tau in POINTS.items():
      ranked = label_tree.best(log_p - tau * self.log_pi)
      scores = metrics.by_group(self.true, ranked, self.anchor)
      found['points'][point] = {'how': f'tau {tau}', **scores}
      columns[f'point_{point}'] = names[ranked[:, 0]]
    return found, columns

  def add_baselines(self):
    counts, found = baselines.Counts(self.events, history=9, seed=11), {}
    table = {'sample': self.samples}
    for name in baselines.NAMES:
      log_p = label_tree.log_softmax(counts.scores(name, self.samples))
      found[name], columns = self.judged(log_p)
      table |= {f'{name}_{column}': values for column, values in columns.items()}
    self.json('baselines.json', found)
    pq.write_table(pa.table(table), self.folder / 'baselines.parquet')

  def add_predictions(self, stage, skill, old=False):
    """`old`: as versions before operating points wrote them."""
    log_p, n = self.log_p(skill), len(self.true)
    names, top = np.array(self.names), label_tree.best(log_p)
    found, chosen = self.judged(log_p)
    found['fitted'] = {'mixed': {'a': 1.0, 'b': 0.5}}
    mixed, more = self.judged(label_tree.log_softmax(1.2 * log_p))
    found['fitted']['mixed'] |= mixed
    chosen |= {f'mixed_{column}': values for column, values in more.items()}
    if old:
      found = metrics.by_group(self.true, top, self.anchor)
      chosen = {'log_prob': chosen['log_prob']}
    self.json(f'{stage}/evaluation.json', found)
    hours = [datetime.timedelta(hours=i) for i in range(n)]
    start = datetime.datetime(2012, 4, 3, 18, 5)
    columns = {
      'sample': self.samples,
      'user': [f'u{i // 4}' for i in range(n)],
      'time': pa.array([start + hour for hour in hours], pa.timestamp('s')),
      'group': np.where(self.anchor[self.true], 'anchor', 'tail'),
      'behavior': names[self.true],
      'predicted': names[top[:, 0]],
      'top5': names[top].tolist(),
      'top5_log_prob': np.take_along_axis(log_p, top, axis=1).tolist(),
      'prompt_tokens': [[i, 7] for i in range(n)],
      'in_context': self.rng.random(n) < 0.6,
      **chosen,
    }
    pq.write_table(pa.table(columns), self.folder / stage / 'predictions.parquet')

  def add_log_p(self, stage):
    log_p = np.log(self.rng.dirichlet(np.ones(len(self.names)), 2 * len(self.true)))
    split = ['validation', 'test'] * len(self.true)
    n = np.arange(len(split))
    table = {'split': split, 'sample': n, 'start': n, 'log_p': log_p.tolist()}
    (self.folder / stage / 'log_p').mkdir()
    pq.write_table(pa.table(table), self.folder / stage / 'log_p/00000.parquet')

  def add_training(self, stage, name=None):
    """`name`: a | b | one, of the stage of the config."""
    self.json(
      f'{stage}/config.json',
      {
        'model': {'address': 'hf://tiny'},
        'train': {'batch': 8, 'length': 512},
        'a': {
          'steps': 60,
          'learning_rate': 0.002,
          'interpolation': 1.0,
          'content': 'all',
          'conversation_share': 0.2,
          'softmax': 'names',
          'prior': 'drawn',
        },
        'b': {'softmax': 'names', 'prior': 'natural', 'conversation_share': 0.0},
        'seed': 11,
        'stage': name or stage[0],
        'data': {'history': 9},
        'ablations': [],
      },
    )
    rows = [
      {'step': i, 'loss': 5 / i, 'tokens': 900.0, 'samples': 30.0, 'padding': 0.25}
      | ({'seconds': 3.0} if i > 1 else {'seconds_to_first_step': 12.0})
      | ({} if i % 10 else {'val_loss': 5.3 / i})
      for i in range(1, 61)
    ]
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    (self.folder / stage / 'metrics.jsonl').write_text(lines)
    self.add_plan(stage, 50)

  def add_plan(self, stage, rows):
    """Each row: a window with four targets and a conversation without."""
    allowed = np.arange(3000)
    if stage == 'a_tuning':
      allowed = allowed[self.anchor[self.behavior]]
    self.drawn = self.rng.choice(allowed, (rows, 4))
    conversation = {'kind': 'conversation', 'targets': [5, 6]}
    rows = [
      {'segments': [{'kind': 'window', 'targets': targets}, conversation]}
      for targets in self.drawn.tolist()
    ]
    pq.write_table(pa.Table.from_pylist(rows), self.folder / stage / 'plan.parquet')


def whole(folder):
  work = Work(folder)
  work.add_baselines()
  for stage, skill in (('base', 0.1), ('a_tuning', 0.5), ('b_tuning', 0.6)):
    work.add_predictions(stage, skill)
    work.add_log_p(stage)
    if stage != 'base':
      work.add_training(stage)
  return work


def decode(tokens):
  return '\n'.join([f'line {i}' for i in range(9)] + [f'of {tokens[0]}'])


def write_report(work, **options):
  """The text of a Work's report, which is written."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_files, 'open_events', lambda folder: work.events)
    report.write_report(work.folder, 'A run', **options)
  return (work.folder / 'report.md').read_text(encoding='utf-8')


class Page(html.parser.HTMLParser):
  """Tags, images and headings of a report.html, as a browser takes them in."""

  def __init__(self, folder):
    super().__init__()
    self.tags, self.images, self.texts = [], [], []
    self.feed((folder / 'report.html').read_text(encoding='utf-8'))

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    if tag == 'img':
      self.images.append(dict(attrs))

  def handle_data(self, data):
    if data.strip():
      self.texts.append((self.tags[-1] if self.tags else '', data))

  def all(self, tag):
    return [text for where, text in self.texts if where == tag]


@pytest.fixture(scope='module')
def done(tmp_path_factory):
  """A whole run with its report; tests only read it."""
  work = whole(tmp_path_factory.mktemp('work'))
  return types.SimpleNamespace(
    folder=work.folder, work=work, text=write_report(work, decode=decode)
  )


def row_of(text, head, name):
  """Cells of row `name` in the first table whose header starts with `head`."""
  lines = text[text.index(f'| {head} |') :].split('\n\n')[0].splitlines()
  return next(
    [cell.strip() for cell in line.strip('| ').split(' | ')]
    for line in lines
    if line.startswith(f'| {name} |')
  )


def test_whole_run_shows_every_section_and_plot(done):
  text = done.text
  images = sorted(path.name for path in (done.folder / 'report').iterdir())
  names = ('f1', 'loss', 'predictors', 'reliability', 'targets', 'trade_off')
  assert images == [f'{name}.png' for name in names]
  for name in images:
    assert f'(report/{name})' in text
    assert (done.folder / 'report' / name).read_bytes()[:4] == b'\x89PNG'
  assert text.startswith('# A run\n')
  assert text.count('\n## ') == 10
  assert row_of(text, 'stage', 'A-Tuning')[0] == 'A-Tuning'
  assert '| rejected | 3 |' in text and '1 behavior occurs only' in text
  for row in (
    'A-Tuning | 8 | 512 | 60 | 0.002 | 1.0 | names | drawn',
    'B-Tuning | 8 | 512 | 60 | 0.001 | 0.5 | names | natural',
  ):
    assert f'| {row} | 11 | none |' in text


def test_tables_hold_the_numbers_of_the_files(done):
  text, scores = done.text, done.work.evaluation('b_tuning')
  results = row_of(text, 'all behaviors', 'B-Tuning')
  shown = [*(scores['all'][key] for key in SCORES), scores['ece']]
  assert results[1:] == ['120', *(f'{value:.3f}' for value in shown)]
  group = row_of(text, 'by group', 'B-Tuning')
  assert group[8] == str(scores['tail']['n'])
  assert group[9] == f'{scores["tail"]["log_p"]:.3f}'
  assert group[14] == f'{scores["tail"]["f1_macro"]:.3f}'
  mixed = row_of(text, 'all behaviors', 'B-Tuning, with counts')
  assert mixed[2] == f'{scores["fitted"]["mixed"]["all"]["log_p"]:.3f}'
  table = pq.read_table(done.folder / 'b_tuning/predictions.parquet')
  inside = [r for r in table.to_pylist() if r['in_context']]
  want = np.mean([r['behavior'] == r['predicted'] for r in inside])
  assert row_of(text, 'stage', 'B-Tuning')[1:3] == [str(len(inside)), f'{want:.3f}']
  assert '| A-Tuning | 60 | 12.000 | 3.000 | 300 | 10.000 | 0.250 |' in text


def test_each_predictor_has_a_row_for_each_operating_point(done):
  lines = [
    line for line in done.text.splitlines() if line.startswith('| B-Tuning, with')
  ]
  rows = [line.strip('| ').split(' | ') for line in lines]
  rows = {row[1]: row for row in rows if 'tau' in row[2]}
  points = done.work.evaluation('b_tuning')['fitted']['mixed']['points']
  assert list(rows) == ['accuracy', 'macro f1', 'tail']
  for point, scores in points.items():
    row = rows[point.replace('_', ' ')]
    assert row[2:4] == [scores['how'], '120']
    assert row[4] == f'{scores["all"]["accuracy@1"]:.3f}'
    assert row[8:] == [str(scores['tail']['n']), f'{scores["tail"]["f1_macro"]:.3f}']
  assert ', adjusted |' not in done.text
  assert 'Tail macro-F1 grows with the number n of test events' in done.text


def test_the_first_screen_is_a_sentence_a_figure_and_an_example(done):
  sentence, figure, caption, example, lines, table = done.text.split('\n\n')[1:7]
  scores = {
    name: one['all']['log_p']
    for stage in run_files.STAGES
    for found in [done.work.evaluation(stage)]
    for name, one in ((stage, found), (f'{stage} mixed', found['fitted']['mixed']))
  }
  assert max(scores, key=scores.get) == 'b_tuning mixed'
  assert 'is the model after stage 2 mixed with counts: it names' in sentence
  counted = json.loads((done.folder / 'baselines.json').read_text())['markov']
  gain = scores['b_tuning mixed'] - counted['all']['log_p']
  assert f'{gain:.3f} nats higher' in sentence and 'so it beats counting' in sentence
  right = 100 * counted['points']['accuracy']['all']['accuracy@1']
  assert f'counting (markov) in {right:.1f} %' in sentence
  assert '(report/predictors.png)' in figure
  assert 'n = 120 test events of 30 users' in caption
  assert example.startswith('A test event drawn at random') and 'line 5' in lines
  assert table.count('\n| ') == 6 and table.count('✓') <= 1  # Head, rule and five.
  rest = done.text.split('\n\n')[7]
  assert rest.startswith('<details>')


def test_the_figure_has_the_best_count_baseline_that_is_not_markov(done):
  found = json.loads((done.folder / 'baselines.json').read_text())
  others = [name for name in found if not name.startswith('markov')]
  best = max(others, key=lambda name: found[name]['all']['log_p'])
  (alt,) = re.findall(r'!\[(.*)\]\(report/predictors', done.text)
  assert f' {best} {found[best]["all"]["log_p"]:.3f}' in alt
  assert not any(f'{name} ' in alt for name in {*others, 'markov_adjusted'} - {best})


def test_verdict_and_summary_agree_with_the_files(done):
  place = done.text.index('<summary>The verdict in numbers')
  verdict, summary = done.text[place:].split('\n\n')[1:3]
  assert verdict.startswith('On 120 test events of 30 users, B-Tuning reaches')
  scores = [done.work.evaluation(stage) for stage in run_files.STAGES]
  for group, key, name in (
    ('all', 'accuracy@1', 'accuracy'),
    ('tail', 'f1_macro', 'tail macro-F1'),
  ):
    base, a, b = (score[group][key] for score in scores)
    assert f'{name} {b:.3f}' in verdict
    assert f'{name} {b - base:+.3f}' in verdict.split('Against')[1]
    assert f'{name} {b - a:+.3f}' in verdict.split('Against')[2]
    order = f'{base:.3f} → {a:.3f} → {b:.3f}'
    assert f'{name}: {order} (best free baseline'.lower() in summary.lower()
  assert 'n = 120' in summary and '3,100 events of 40 users' in done.text
  assert 'The model is hf://tiny.' in done.text


def test_changes_stand_beside_the_best_baseline_of_the_file(done):
  found = json.loads((done.folder / 'baselines.json').read_text())
  name = max(found, key=lambda name: found[name]['all']['accuracy@1'])
  table = done.text[done.text.index('| score | compared with') :]
  row = next(
    line for line in table.splitlines() if line.startswith(f'| accuracy | {name} |')
  )
  assert row.split(' | ')[2] == f'{found[name]["all"]["accuracy@1"]:.3f}'


def test_both_files_say_the_same(done):
  page = Page(done.folder)
  folds = re.findall('<summary>(.*)</summary>', done.text)
  assert page.all('h1') == ['A run'] and page.all('summary') == folds
  assert len(folds) == 10 == page.tags.count('details')
  assert page.tags.count('table') == done.text.count('| --- |\n')
  assert len(page.images) == done.text.count('![') == 6
  assert all(len(image['alt']) > 30 for image in page.images)


def test_page_needs_no_other_file(done):
  page, text = Page(done.folder), (done.folder / 'report.html').read_text()
  assert all(i['src'].startswith('data:image/png;base64,iVBOR') for i in page.images)
  assert not {'link', 'iframe', 'object'} & set(page.tags)
  assert 'http://' not in text and 'https://' not in text
  assert 'src="report/' not in text and 'url(' not in text


def test_many_behaviors_fold_away_most_frequent_first(done):
  start = done.text.index('<summary>Scores of all 20 behaviors')
  rows = done.text[start : done.text.index('</details>', start)].splitlines()
  counts = [
    int(row.split(' | ')[-8].replace(',', ''))
    for row in rows
    if row.startswith('| ') and row[2:5] not in ('---', 'beh')
  ]
  assert len(counts) == 20 and counts == sorted(counts, reverse=True)
  assert 'details' in Page(done.folder).tags


def test_what_is_still_known_is_told_where_measured(done, tmp_path):
  assert 'What the model still knows' not in done.text
  work = Work(tmp_path)
  values = {'n': 7, 'perplexity': 9.5, 'perplexity_ratio': 1.25, 'kl_to_base': 0.125}
  values |= {f'{name}_interval': [0.5, 10.0] for name in list(values)[1:]}
  for stage in ('base', 'b_tuning'):
    work.add_predictions(stage, 0.5)
    work.json(f'{stage}/retention.json', {'conversations': values})
  text = write_report(work)
  assert '| stage | perplexity | perplexity ratio | kl to base |' in text
  assert '| B-Tuning | 9.500 (0.500 to 10.000) | 1.250' in text
  assert '(n = 7 conversations)' in text


def test_absent_stages_leave_no_rows(tmp_path):
  work = Work(tmp_path)
  work.add_predictions('a_tuning', 0.5)
  text = write_report(work)
  assert 'A-Tuning' in text
  assert 'B-Tuning' not in text and 'untuned' not in text


def test_a_directory_with_events_alone_still_reports(tmp_path):
  text = write_report(Work(tmp_path))
  assert re.findall('<summary>(.*)</summary>', text) == ['Data']
  assert 'Nothing has been evaluated yet.' in text


def test_an_older_directory_is_shown_and_said_to_lack_points(tmp_path):
  work = Work(tmp_path)
  work.add_predictions('base', 0.1, old=True)
  work.add_predictions('b_tuning', 0.6, old=True)
  text = write_report(work)
  assert 'Operating points are missing of untuned; B-Tuning: the files are' in text
  assert 'predictors.png' not in text and 'beats counting' not in text
  row = row_of(text, 'all behaviors', 'B-Tuning')
  assert row[2:5] == ['-'] * 3 and row[-1] == '-'
  assert 'B-Tuning reaches accuracy' in text


def test_what_has_another_n_is_refused_in_one_sentence(tmp_path):
  work = Work(tmp_path)
  work.add_baselines()
  work.add_predictions('b_tuning', 0.6)
  for stage in ('base', 'sasrec'):
    other = Work(tmp_path, n=90)
    other.add_predictions(stage, 0.1)
  text = write_report(work)
  assert (
    'Not compared with B-Tuning (n = 120), for tail macro-F1 grows with n: ' in text
  )
  assert 'untuned (n = 90), SASRec (n = 90).' in text
  assert '| untuned' not in text and '| SASRec' not in text


def test_a_log_without_a_tail_is_reported_too(tmp_path):
  work = Work(tmp_path, count=4)
  assert work.anchor.all()
  work.add_baselines()
  work.add_predictions('b_tuning', 0.6)
  text = write_report(work)
  assert '(120 anchor, 0 tail)' in text and '(report/predictors.png)' in text
  assert 'nothing is known of the tail' in text


def test_one_stage_run_is_named_so(tmp_path):
  work = Work(tmp_path)
  work.add_predictions('b_tuning', 0.5)
  work.add_training('b_tuning', 'one')
  text = write_report(work)
  assert '| one stage | 60 |' in text and 'B-Tuning' not in text


def test_names_of_the_log_cannot_break_the_page(done):
  assert 'Bar \\| Pub' in done.text
  assert '<b>' not in done.text.replace('\\<b>', '')
  assert '<script' not in done.text.replace('\\<script', '')
  page = Page(done.folder)
  assert page.tags.count('script') == 1 and 'b' not in page.tags
  assert {ATTACK, CONTROL, 'Bar | Pub $x_1$'} <= set(page.all('th'))


def test_every_row_of_a_table_has_the_columns_of_its_head(done):
  tables = [
    block.splitlines() for block in done.text.split('\n\n') if block.startswith('| ')
  ]
  assert len(tables) > 10
  for lines in tables:
    # As Markdown reads them: a bar behind a backslash is text.
    assert (
      len({len(re.findall(r'(?:^|[^\\])(?:\\\\)*\|', line)) for line in lines}) == 1
    )
  control = '\\<\\|im_end\\|>'
  assert f'| {control} # | ' in done.text
  assert f': {control} \\#\n' in done.text  # No end of a heading.


def test_decoded_prompt_shows_its_last_six_lines(done):
  assert done.text.count('    line 4\n    line 5\n') == 1 + 10  # One stands first.
  assert 'line 3' not in done.text


def test_plan_targets_leave_conversations_out(tmp_path):
  work = Work(tmp_path)
  (tmp_path / 'a_tuning').mkdir()
  work.add_plan('a_tuning', 6)
  targets = run_files.plan_targets(tmp_path / 'a_tuning/plan.parquet')
  assert targets.tolist() == work.drawn.ravel().tolist()


def test_writing_again_gives_the_same_page(done):
  page = (done.folder / 'report.html').read_bytes()
  assert write_report(done.work, decode=decode) == done.text
  assert (done.folder / 'report.html').read_bytes() == page
