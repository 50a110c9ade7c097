"""The whole story on one page: log -> A-Tuning -> difficulty -> B-Tuning.

    events -> base scores, baselines
           -> stage a: plan of anchors and conversations -> train -> evaluate
           -> stage b: candidates -> difficulty -> balanced plan -> train ->
              evaluate
           -> report

Each arrow is a file in the work directory. What is finished is not done again,
so the same command resumes a run wherever it ended.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging

from behaviorlm_jax import addresses
from behaviorlm_jax import bucket
from behaviorlm_jax import config as config_lib
from behaviorlm_jax import files
from behaviorlm_jax import hosts
from behaviorlm_jax import hub
from behaviorlm_jax import seeds
from behaviorlm_jax import workdir as workdir_lib
from behaviorlm_jax.data import conversations
from behaviorlm_jax.data import loader
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.data import prompts as prompts_lib
from behaviorlm_jax.data import samples as samples_lib
from behaviorlm_jax.data import self_written
from behaviorlm_jax.data import subset as subset_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model import lora
from behaviorlm_jax.model import sample
from behaviorlm_jax.model import weights
from behaviorlm_jax.score import difficulty
from behaviorlm_jax.score import evaluation
from behaviorlm_jax.score import labels
from behaviorlm_jax.score import report
from behaviorlm_jax.score import retention as retention_lib
from behaviorlm_jax.score import sasrec
from behaviorlm_jax.score import scorer as scorer_lib
from behaviorlm_jax.train import checkpoints as checkpoints_lib
from behaviorlm_jax.train import loop
from behaviorlm_jax.train import preemption
from behaviorlm_jax.train import sharding
from behaviorlm_jax.train import step as step_lib


@dataclasses.dataclass
class Run:
  """What the stages of one call have in common."""
  config: object
  workdir: pathlib.Path
  layout: sharding.Layout
  base: weights.Base
  prompts: prompts_lib.Prompts
  conversations: list  # To train on.
  attach: object  # (params, adapter) -> Decoder
  params: dict  # Base weights in model.dtype.
  scorer: scorer_lib.Scorer
  retention: retention_lib.Retention

  @property
  def events(self):
    return self.prompts.events

  @functools.cached_property
  def tree(self):
    """The names within which train.loss teaches, or None."""
    if self.config.train.loss == 'answers':
      return None
    return labels.build(labels.shortest(self.prompts.labels))

  @property
  def fingerprints(self):
    return workdir_lib.fingerprints(self.events, self.base)


def run(config, workdir):
  """Runs the config's stages in `workdir` and writes the report.

  With data.shard it only prepares that part of the log.
  """
  config_lib.check(config)
  if config.data.shard:
    prepare_shard(config, workdir)
    return
  with preemption.at_once():
    hosts.meet(config.distributed)
  hosts.start(config.distributed)
  preemption.share()
  workdir = workdir_lib.make(workdir)
  workdir_lib.check_hosts(config, workdir)
  config = workdir_lib.pin(config, workdir)
  workdir_lib.check_config(config, workdir)
  this = open_run(config, workdir, sharding.make_layout(config))
  workdir_lib.check_fingerprints(config, workdir, this.fingerprints)
  evaluate_base(this)
  for stage in config.stages:
    run_stage(this, stage)
  hosts.first(report.write, workdir, 'BehaviorLM: ' + _log_name(config),
              this.base.tokenizer.decode)
  logging.info('report: %s', workdir / 'report.html')


def prepare_shard(config, workdir):
  """Prepares data.shard's part of the log; SIGTERM stops it at once."""
  try:
    with preemption.at_once():
      workdir_lib.prepare_shard(config, workdir)
  except RuntimeError:  # What DuckDB makes of a stop while it works.
    preemption.check()
    raise


def _log_name(config):
  return pathlib.PurePosixPath(config.data.events).name


def open_run(config, workdir, layout, shapes_only=False):
  """Events, base model and scorer; every input is checked on the way.

  `shapes_only`: weights are not read, and can be compiled for but not run.
  """
  base = weights.open_base(config.model.address)
  layout = layout.of(base.config)
  lora.shapes(base.config, config.lora.rank, config.lora.targets)
  talks, questions = _conversations(config, base), _questions(config, base)
  events = workdir_lib.open_events(config, workdir)
  prompts = prompts_lib.Prompts(events, base.tokenizer, config.data)
  plan_lib.check_lengths(prompts, config)
  prompts.check_lengths(base.config.max_length, config.train.length)
  evaluation.test_samples(events, config)  # Refuses a log without any.
  hosts.agree(workdir_lib.facts(config) | {
      'the events': events.fingerprint, 'the base model': base.fingerprint,
      'the conversations': conversations.digest(talks or []),
      'the questions': conversations.digest(
          row for question in questions for row in question.choices)})
  attach = step_lib.attacher(base.config, config, layout,
                             config.model.dtype)
  place = layout.abstract if shapes_only else layout.place
  params = weights.read_params(base, jnp.dtype(config.model.dtype), place)
  scored, attach_scored = params, attach
  if config.score.dtype != config.model.dtype:
    scored = weights.read_params(base, jnp.dtype(config.score.dtype), place)
    attach_scored = step_lib.attacher(base.config, config, layout,
                                      config.score.dtype, 'auto')
  scorer = scorer_lib.Scorer(attach_scored, scored, prompts.labels,
                             config.score, layout)
  if talks is None:  # At last: it takes minutes.
    talks = _self_written(config, base, params, layout)
  talks, held = retention_lib.hold_out(talks, config.retention.conversations)
  if not talks and _shares(config):
    raise InputError(
        f'data.conversations: all {len(held)} conversations are held out to '
        'measure retention and none is left to train on; give more, or set '
        'retention.conversations=0.')
  retention = retention_lib.Retention(attach_scored, scored, layout, held,
                                      questions, config.score.batch)
  return Run(config, workdir, layout, base, prompts, talks, attach, params,
             scorer, retention)


def _shares(config):
  """Whether any stage learns conversations."""
  return (config.plan.conversation_share or
          config.plan.balanced_conversation_share)


def _questions(config, base):
  """A seeded draw of the multiple-choice questions, in their order."""
  if not config.retention.questions:
    return []
  path = addresses.resolve(config.retention.questions, 'retention.questions')
  found = retention_lib.read_questions(path, base.tokenizer,
                                       base.config.max_length)
  if len(found) <= config.retention.max_questions:
    return found
  rng = seeds.stream(config.seed, 'retention', 'questions')
  chosen = rng.choice(len(found), config.retention.max_questions, False)
  return [found[i] for i in sorted(chosen)]


def _conversations(config, base):
  """What data.conversations names; None: the model is still to write it."""
  if not _shares(config) and not config.retention.conversations:
    return []
  if config.data.conversations == self_written.ADDRESS:
    return None
  path = conversations.DEFAULT
  if config.data.conversations:
    path = addresses.resolve(config.data.conversations, 'data.conversations')
  return conversations.read(path, base.tokenizer, config.train.length)


def _self_written(config, base, params, layout):
  """Conversations that the untuned model answers."""

  def draw(task):
    settings = sample.Settings(self_written.TOKENS, self_written.TEMPERATURE,
                               task.ends)
    with tqdm.tqdm(total=len(task.prompts), desc='conversations') as bar:

      def progress(done):
        bar.update(done)
        preemption.check()

      return sample.answers(base.config, params, task.prompts, config.seed,
                            settings, progress, layout.replicated)

  return self_written.read(base, config.model.dtype, config.seed,
                           config.train.length, draw)


def evaluate_base(this):
  """The untuned model and the free baselines, once per work directory."""
  folder = this.workdir / 'base'
  if not hosts.exists(folder / 'config.json'):
    hosts.first(workdir_lib.claim, folder, this.config, this.fingerprints)
  samples = evaluation.test_samples(this.events, this.config)
  path = this.workdir / 'baselines.json'
  if not hosts.exists(path):
    hosts.first(evaluation.write_baselines, path, this.events, samples,
                this.config)
  evaluate(this, folder, None, samples)
  if this.config.sasrec.steps:
    evaluate_sasrec(this, samples)


def evaluate_sasrec(this, samples):
  """Trains and evaluates the baseline, once per work directory."""
  config, events = this.config, this.events
  folder = this.workdir / 'sasrec'
  if hosts.exists(folder / 'evaluation.json'):
    return
  hosts.first(workdir_lib.claim, folder, config, this.fingerprints)
  with tqdm.tqdm(total=config.sasrec.steps, desc='sasrec', unit='step') as bar:

    def progress(done):
      bar.update(done)
      preemption.check()

    model = sasrec.fit(events, config, progress)
  validation = evaluation.draw_samples(
      events, 'validation', config.eval.validation_samples, config)
  scored = [
      evaluation.Scored(positions, sasrec.log_probs(model, events, positions,
                                                    config),
                        [this.prompts.question(p) for p in positions], None)
      for positions in (samples, validation) if len(positions)]
  fitted = scored[1] if config.eval.fit and len(validation) else None
  hosts.first(evaluation.write, folder, this.prompts, scored[0], fitted, config)


def evaluate(this, folder, adapter, samples):
  """Writes predictions and evaluation of one arm, unless they stand there."""
  if hosts.exists(folder / 'evaluation.json'):
    return
  config = this.config
  measure_retention(this, folder, adapter)
  test = score(this, adapter, samples, f'{folder.name}: evaluate')
  validation = None
  if config.eval.fit:
    drawn = evaluation.draw_samples(this.events, 'validation',
                                    config.eval.validation_samples, config)
    if len(drawn):
      validation = score(this, adapter, drawn, f'{folder.name}: validation')
  hosts.first(evaluation.write, folder, this.prompts, test, validation, config)


def measure_retention(this, folder, adapter):
  """Writes retention.json, if there is anything to measure it on."""
  path, rows = folder / 'retention.json', this.retention.rows(adapter)
  if hosts.exists(path) or not rows:
    return
  with tqdm.tqdm(total=rows, desc=f'{folder.name}: retention') as bar:

    def progress(done):
      bar.update(done)
      preemption.check()

    hosts.first(files.write_json, path,
                this.retention.measure(adapter, progress))


def score(this, adapter, samples, what, stop=preemption.check, past=True):
  """What scorer.Scorer says of samples: evaluation.Scored.

  `stop` is called between batches and may raise; `past`: whether questions show
  the events before the sample.
  """
  questions = [this.prompts.question(p, past) for p in samples]
  with tqdm.tqdm(total=len(samples), desc=what, unit='prompt') as bar:

    def progress(done):
      bar.update(done)
      stop()

    scores, uncertified = this.scorer(
        adapter, questions, this.events.behavior[samples], progress)
    return evaluation.Scored(samples, scores, questions, uncertified)


def run_stage(this, stage):
  """Plans, trains, exports and evaluates one stage."""
  whole, folder = this.config, this.workdir / workdir_lib.FOLDERS[stage]
  folder.mkdir(exist_ok=True)
  config = config_lib.of_stage(whole, stage)
  this = dataclasses.replace(this, config=config)
  adapter = first_adapter(this, stage)
  plan, plan_hash = make_plan(this, stage, folder, adapter)
  if hosts.exists(folder / 'evaluation.json'):
    logging.info('%s is finished.', folder)
    return
  hosts.first(workdir_lib.claim, folder, whole, this.fingerprints)
  start = this.layout.gather(adapter)  # Training takes its place.
  adapter = train(this, stage, folder, plan, plan_hash, adapter)
  adapter = interpolate(start, adapter, config.train.interpolation)
  # A name that others have, too, before the folder it was fetched to.
  address = config.model.address
  name, revision = hub.repository(address) or (
      address if bucket.is_address(address)
      else this.base.folder or this.base.address, None)
  hosts.first(lora.export, folder / 'adapter', this.layout.gather(adapter),
              config.lora.alpha, name, revision)
  hosts.first(evaluation.write_labels, folder / 'labels.json', this.prompts)
  evaluate(this, folder, adapter,
           evaluation.test_samples(this.events, config))


def interpolate(start, end, share):
  """The adapter `share` of the way from one to the other, factor by factor.

  After Wortsman et al., Robust fine-tuning of zero-shot models (CVPR 2022): a
  point on the way often keeps what the start knew and has much of what was
  learned since. On the factors a and b, not on their product: the rank stays.
  From a fresh adapter, whose b is zero, a is the end's, so that the product has
  `share` of what was learned.
  """
  if share == 1:
    return end
  mix = lambda x, y: (1 - share) * x + share * y
  return {name: {
      'a': mix(ab['a'], end[name]['a']) if np.any(ab['b']) else end[name]['a'],
      'b': mix(ab['b'], end[name]['b'])} for name, ab in start.items()}


def first_adapter(this, stage):
  """Where training starts: a fresh adapter, or for stage b that of stage a."""
  config = this.config
  shapes = lora.shapes(this.base.config, config.lora.rank, config.lora.targets)
  if stage == 'b' and workdir_lib.needs_stage_a(config):
    return load_adapter(this, workdir_lib.stage_a_adapter(config, this.workdir))
  adapter = jax.device_get(
      lora.init(this.base.config, config.lora.rank, config.lora.targets,
                jax.random.key(config.seed)))
  return jax.device_put(adapter, this.layout.adapter(shapes))


def load_adapter(this, folder):
  """An adapter of this config's shapes, on the devices."""
  config = this.config
  shapes = lora.shapes(this.base.config, config.lora.rank, config.lora.targets)
  adapter, alpha = lora.load(folder)
  if jax.tree.map(np.shape, adapter) != shapes or alpha != config.lora.alpha:
    raise InputError(
        f'{folder} holds an adapter with other lora.rank, lora.alpha, '
        'lora.targets or for another model than this config; use the config '
        'that made it.')
  return jax.device_put(adapter, this.layout.adapter(shapes))


def fingerprint(this, stage, adapter, sections):
  """SHA-256 of what decides an artifact of a stage."""
  digest = hashlib.sha256()
  values = workdir_lib.as_dict(this.config)
  for path in ('events', 'conversations'):  # Their content counts, see below.
    del values['data'][path]
  chosen = {name: values[name] for name in sections}
  parts = (stage, this.events.fingerprint, this.base.fingerprint,
           json.dumps(chosen, sort_keys=True))
  for part in parts:
    digest.update(part.encode())
  for conversation in this.conversations:
    digest.update(conversation.tokens.tobytes())
  for one in (adapter, reference(this)):
    one = this.layout.gather(one or {})
    for name in sorted(one):
      for side in ('a', 'b'):
        digest.update(one[name][side].tobytes())
  hosts.agree({f'what decides stage {stage}': digest.hexdigest()})
  return digest.hexdigest()


def make_plan(this, stage, folder, adapter):
  """The stage's plan and its hash; read if it stands there already."""
  config, path = this.config, folder / 'plan.parquet'
  sections = ('data', 'plan', 'difficulty', 'train', 'seed', 'score')
  made_from = fingerprint(this, stage, adapter, sections)
  if hosts.exists(path):
    plan = plan_lib.load(path, made_from)
    return plan, plan_lib.content_hash(plan)
  rng = seeds.stream(config.seed, stage, 'plan')
  stream = segments(this, stage, 'train', rng, adapter, folder)
  plan = plan_lib.take(stream, config, config.train.steps, made_from)
  logging.info('%s: plan of %s.', folder.name,
               plan_lib.summary(plan, config.train.length))
  plan_hash = plan_lib.content_hash(plan)
  hosts.agree({f'the plan of {folder.name}': plan_hash})
  hosts.first(plan_lib.save, path, plan, config.train.batch)
  return plan, plan_hash


def segments(this, stage, split, rng, adapter=None, folder=None):
  """The endless stream of segments of a stage, for training or validation."""
  config, plan = this.config, this.config.plan
  windows = plan_lib.Windows(this.prompts, config, this.tree)
  share = plan.conversation_share
  if stage == 'b':
    share = plan.balanced_conversation_share
    stream = drawn(this, split, windows, rng, adapter, folder)
  elif plan.content == 'balanced':
    samples = samples_lib.by_behavior(
        this.events, samples_lib.eligible(this.events, split, config))
    rates = dict.fromkeys(samples, 1)
    stream = plan_lib.spread(windows, samples, rates, rng, neighbours(this))
  else:
    samples = samples_lib.of_split(this.events, split, config,
                                   _only_anchors(this, stage))
    stream = plan_lib.tile(windows, samples, rng)
  if split == 'train':
    stream = plan_lib.mix(stream, this.conversations, share, rng)
  return stream


def drawn(this, split, windows, rng, adapter, folder):
  """Stage b's stream: a subset, each behavior at the rate of its budget."""
  config, events = this.config, this.events
  if split == 'train':
    samples = choose_subset(this, adapter, folder)
    rates = {b: len(s) for b, s in samples.items()}
  else:
    every = samples_lib.eligible(events, split, config)
    samples = samples_lib.by_behavior(events, every)
    rates = dict(enumerate(subset_lib.budgets(events, config)))
    if config.plan.budget == 'natural':
      samples, rates = {subset_lib.NATURAL: every}, {subset_lib.NATURAL: 1}
  return plan_lib.spread(windows, samples, rates, rng, neighbours(this))


def neighbours(this):
  """Loss weights of a drawn sample's neighbours, or None: not learned."""
  if this.config.plan.neighbours:
    return subset_lib.neighbour_weights(this.events, this.config)
  return None


def choose_subset(this, adapter, folder):
  """Stage b's subset: candidates, their difficulty, the weighted draw."""
  config = this.config
  draw = lambda purpose: seeds.stream(config.seed, 'b', purpose)
  pools = subset_lib.candidates(this.events, config, draw('candidates'))
  scores = None
  if config.difficulty.score != 'random':
    if config.difficulty.candidates <= config.plan.per_behavior:
      logging.warning(
          'difficulty.candidates is %d and plan.per_behavior %d: every '
          'candidate is drawn, however difficult; raise the first, or save the '
          'scoring with difficulty.score=random.',
          config.difficulty.candidates, config.plan.per_behavior)
    scores = score_difficulty(this, adapter, folder, pools)
  return subset_lib.choose(pools, scores, this.events, config, draw('subset'))


def score_difficulty(this, adapter, folder, pools):
  """{sample: difficulty} under the model that stage b starts from."""
  path, name = folder / 'difficulty.parquet', this.config.difficulty.score
  made_from = fingerprint(this, 'difficulty', adapter,
                          ('data', 'plan', 'difficulty', 'seed', 'score'))
  if not hosts.exists(path):
    samples = np.concatenate(list(pools.values()))
    scores = score(this, adapter, samples, f'{folder.name}: difficulty').scores
    others = None
    if name == 'ifd':
      others = score(this, adapter, samples, f'{folder.name}: without past',
                     past=False).scores
    elif name == 'rho':
      others = score(this, reference(this), samples,
                     f'{folder.name}: reference').scores
    values = difficulty.compute(name, scores, this.events.behavior[samples],
                                others)
    hosts.first(difficulty.write, path, this.events, samples, values, made_from)
  return difficulty.read(path, made_from)


def reference(this):
  """The adapter of difficulty.reference; None is the untuned model."""
  config = this.config
  if not config.difficulty.reference:
    return None
  folder = workdir_lib.adapter_folder(config.difficulty.reference,
                                      'difficulty.reference')
  return load_adapter(this, folder)


def train(this, stage, folder, plan, plan_hash, adapter):
  """Trains (or resumes) a stage; returns the best checkpoint's adapter."""
  config = this.config
  step_fn, optimizer, places = trainer(this, stage, plan)
  state = step_lib.init_state(adapter, optimizer, places)
  saved = checkpoints_lib.Checkpoints(
      bucket.place(folder / 'checkpoints'), config.checkpoint.keep, plan_hash)
  state = saved.restore_latest(state, config.checkpoint.every)
  assemble = assembler(this, plan)
  show_example(this, assemble, plan)
  rows = config.train.batch
  batches = loader.batches(plan, assemble, rows, int(state['step']),
                           this.layout.host_rows(rows), config.train.workers)
  state = loop.run(
      folder, config, state, step_fn, this.params,
      (this.layout.put_rows(batch, rows) for batch in batches), saved,
      validator(this, stage))
  best = saved.best_step(config.checkpoint.best_by != 'last')
  logging.info('%s: the checkpoint of step %d goes on.', folder.name, best)
  adapter = saved.restore_adapter(best, state)
  saved.close()
  return adapter


def trainer(this, stage, plan):
  """A stage's jitted step (step.make_step), its optimizer and shardings."""
  config, base = this.config, this.base.config
  optimizer, schedule = step_lib.make_optimizer(config.train)
  shapes = lora.shapes(base, config.lora.rank, config.lora.targets)
  places = step_lib.state_shardings(this.layout, shapes, optimizer)
  step_fn = step_lib.make_step(this.attach, optimizer, schedule,
                               config.train.accumulate, places, this.layout,
                               *most_answers(this, plan),
                               names(this, stage, plan))
  return step_fn, optimizer, places


def assembler(this, plan):
  """What turns the rows of a plan into arrays."""
  return loader.Assembler(this.prompts, this.conversations,
                          this.config.train.length, plan.answers, this.tree)


def names(this, stage, plan):
  """`names` of step.make_step and make_validation; `plan` is what is drawn."""
  loss = this.config.train.loss
  if not this.tree:
    return None
  if loss == 'names':
    return step_lib.names_of(this.tree)
  kept = np.ones(this.events.known)
  if loss == 'natural':
    kept = np.maximum(subset_lib.counts(this.events, this.config), 1)
  return step_lib.names_of(this.tree, drawn_counts(this, stage, plan), kept)


def drawn_counts(this, stage, plan):
  """How much a stage teaches of each behavior, float [known], of any sum.

  Counted where behaviors take turns. Natural draws are known beforehand: what
  a short plan happens to hold of a rare behavior says little.
  """
  by_turns = this.config.plan.content == 'balanced'
  if stage == 'b':
    by_turns = this.config.plan.budget != 'natural'
  if by_turns:
    return plan_lib.taught(plan, this.events)
  drawn = subset_lib.counts(this.events, this.config)
  if _only_anchors(this, stage):
    drawn = drawn * samples_lib.anchor_mask(this.events)
  return drawn


def _only_anchors(this, stage):
  return stage == 'a' and this.config.plan.content == 'anchors'


def most_answers(this, plan):
  """`answers` and `auxiliary` of step.make_step, from a plan."""
  train = this.config.train
  most = lambda kind: plan_lib.most_answers(
      plan, train.batch, train.accumulate, this.layout.row_parts, kind)
  auxiliary = train.auxiliary == 'kl' and most(plan_lib.CONVERSATION)
  if auxiliary:
    return most(plan_lib.WINDOW), auxiliary
  return most(None), None


def show_example(this, assemble, plan):
  """Logs one decoded row, what it teaches in brackets."""
  row = assemble(plan.rows[0])
  learned = set(row['answer_positions'][row['answer_weights'] > 0] + 1)
  text = ''
  for i in range(int((row['segments'] > 0).sum())):
    token = this.base.tokenizer.decode([row['tokens'][i]])
    text += f'[{token}]' if i in learned else token
  logging.info('a row, the learned tokens in brackets:\n%s', text)


def validator(this, stage):
  """adapter -> {'val_loss', 'score'} on the stage's own kind of samples."""
  config, rows = this.config, this.config.train.batch
  rng = seeds.stream(config.seed, stage, 'validation')
  steps = -(-config.eval.validation_rows // rows)
  try:
    stream = segments(this, stage, 'validation', rng)
    plan = plan_lib.take(stream, config, steps, '')
  except samples_lib.NoSamples:
    logging.warning('the validation split has no sample for stage %s; the last '
                    'checkpoint will be taken for the best.', stage)
    return lambda adapter: {}
  assemble = assembler(this, plan)
  sums = step_lib.make_validation(
      this.attach, this.layout, plan_lib.most_answers(
          plan, rows, 1, this.layout.row_parts),
      names(this, stage, plan))
  samples = evaluation.draw_samples(this.events, 'validation',
                                    config.eval.validation_samples, config)

  def validate(adapter):
    loss = weight = 0.0
    for batch in loader.batches(plan, assemble, rows,
                                own=this.layout.host_rows(rows)):
      batch = this.layout.put_rows(batch, rows)
      one, w = sums(adapter, this.params, batch)
      loss, weight = loss + float(one), weight + float(w)
    result = {'val_loss': loss / weight, 'score': -loss / weight}
    if config.checkpoint.best_by == 'f1_macro':
      # Training stops after this, with everything saved.
      scored = score(this, adapter, samples, 'validate', lambda: None)
      summary = evaluation.summarize(this.events, samples, scored.scores)
      result['val_f1_macro'] = summary['all']['f1_macro']
      result['score'] = result['val_f1_macro']
    return result

  return validate
