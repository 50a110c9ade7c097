"""All that a run is given, opened and checked: log, model, conversations.

And a clock, which all that do its parts tell the time.
"""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from behaviorlm_jax.cluster import ownership, processes
from behaviorlm_jax.cluster.workspace import Workspace
from behaviorlm_jax.data import conversations, prepared
from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.data import prompts as prompts_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.evaluate import baselines, evaluation
from behaviorlm_jax.evaluate import retention as retention_lib
from behaviorlm_jax.io import addresses, files
from behaviorlm_jax.model import lora, weights
from behaviorlm_jax.score import label_tree
from behaviorlm_jax.score import scorer as scorer_lib
from behaviorlm_jax.train import sharding, trainer
from behaviorlm_jax.train import step as step_lib


class Clock:
  """Where the time of a run goes."""

  def __init__(self):
    self.seconds = {}  # Of each part, in the order in which they ended.

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Counts the time inside for a part, but for that of parts inside of it."""
    begin, before = time.monotonic(), sum(self.seconds.values())
    yield
    inner = sum(self.seconds.values()) - before
    took = time.monotonic() - begin - inner
    self.seconds[name] = self.seconds.get(name, 0.0) + took

  def keep(self, workspace: Workspace) -> None:
    """Logs where the time went, and writes it to timing.json."""
    workspace.keep(self._write, workspace.folder / 'timing.json')
    total = sum(self.seconds.values())
    lines = [
      f'  {name:<22}{took:9.1f} s{took / total:6.0%}'
      for name, took in self.seconds.items()
    ]
    logging.info('where the time went:\n%s', '\n'.join(lines))

  def _write(self, path):
    before = json.loads(path.read_text()) if path.exists() else {}
    # What stands there was measured by the call that finished it.
    new = {k: round(took, 1) for k, took in self.seconds.items() if k not in before}
    if new:
      files.write_json(path, before | new)


@dataclasses.dataclass
class Setup:
  """What the stages of one run have in common."""

  config: ConfigDict
  workspace: Workspace
  base: weights.Base
  prompts: prompts_lib.Prompts
  conversations: list[conversations.Conversation]  # to train on
  model: trainer.Model  # in model.dtype
  scorer: scorer_lib.Scorer  # in score.dtype
  retention: retention_lib.Retention
  clock: Clock = dataclasses.field(default_factory=Clock)

  @property
  def events(self) -> events_lib.Events:
    return self.prompts.events

  @functools.cached_property
  def tree(self) -> label_tree.Tree:
    """The names within which softmax=names teaches."""
    return label_tree.build(label_tree.shortest(self.prompts.labels))

  @functools.cached_property
  def anchor_tree(self) -> label_tree.Tree:
    """The anchors alone, which are the first behaviors."""
    anchors = int(self.events.anchors.sum())
    return label_tree.build(label_tree.shortest(self.prompts.labels[:anchors]))

  @functools.cached_property
  def samples(self) -> evaluation.Drawn:
    """What every arm is evaluated on."""
    return _samples(self.events, self.config)

  @functools.cached_property
  def counts(self) -> baselines.Counts:
    """The free baselines, fitted once for all that mix with them."""
    return baselines.Counts(self.events, self.config.data.history, self.config.seed)

  @property
  def fingerprints(self) -> dict[str, str]:
    """What ties artifacts to the log and the model, beyond their addresses."""
    return {'events': self.events.fingerprint, 'base': self.base.fingerprint}


def open_setup(
  config: ConfigDict,
  workspace: Workspace,
  layout: sharding.Layout,
  shapes_only: bool = False,
) -> Setup:
  """Events, base model and scorer; every input is checked on the way.

  `shapes_only`: weights are not read, and can be compiled for but not run.
  """
  base = weights.open_base(config.model.address)
  layout = layout.of(base.config)  # Heads stay whole.
  shapes = lora.shapes(base.config, config.lora.rank, config.lora.targets)
  talks, clock = _conversations(config, base), Clock()
  with clock.part('log'):
    prompts = _prompts(config, workspace, base)
  processes.assert_same(
    ownership.facts(config)
    | {
      'the events': prompts.events.fingerprint,
      'the base model': base.fingerprint,
      'the conversations': conversations.tokens_digest(talks),
    }
  )
  # After all that can be wrong: weights take the longest to read.
  with clock.part('weights'):
    model = scored = _model(config, base, layout, shapes, shapes_only)
    if config.score.dtype != config.model.dtype:
      scored = _model(config, base, layout, shapes, shapes_only, scores=True)
  scorer = scorer_lib.Scorer(
    scored.attach, scored.params, prompts.labels, config.score, layout
  )
  talks, held = retention_lib.hold_out(talks, config.retention.conversations)
  if not talks and _shares(config):
    raise InputError(
      f'data.conversations: all {len(held)} conversations are held out to '
      'measure retention and none is left to train on; give more, or set '
      'retention.conversations=0.'
    )
  retention = retention_lib.Retention(
    scored.attach, scored.params, layout, held, config.score.batch
  )
  return Setup(config, workspace, base, prompts, talks, model, scorer, retention, clock)


def _prompts(config, workspace, base):
  """The events as text; refuses what does not fit the model or the rows."""
  events = prepared.load_events(config, workspace)
  data = config.data
  prompts = prompts_lib.Prompts(
    events, base.tokenizer, data.instruction, data.history, data.weekday
  )
  plan_lib.check_lengths(prompts, config.plan.min_context, config.train.length)
  prompts.check_lengths(base.config.max_length, config.train.length)
  _samples(events, config)  # Refuses a log without any.
  anchors = int(events.anchors.sum())
  alone = config.a.content == 'anchors' and config.a.softmax == 'names'
  if 'a' in config.stages and alone and anchors < 2:
    raise InputError(
      f'a.content is anchors, but the log has {anchors or "no"} anchor'
      f'{", which has nothing to be told from" if anchors else ""}; lower '
      'data.anchor_share or set a.content=all.'
    )
  return prompts


def _samples(events, config):
  return evaluation.draw_splits(
    events, config.eval, config.plan.min_context, config.seed
  )


def _model(config, base, layout, shapes, shapes_only, scores=False):
  """The base in model.dtype, or in score.dtype for what `scores`."""
  section = dict(config.model)
  if scores:  # Kernels of the one type may not serve the other.
    section |= {'dtype': config.score.dtype, 'attention': 'auto'}
  attach = step_lib.attacher(
    base.config, layout, section, config.train, config.lora.alpha
  )
  place = layout.abstract if shapes_only else layout.place
  params = weights.read_params(base, jnp.dtype(section['dtype']), place)
  return trainer.Model(attach, params, layout, shapes)


def _shares(config):
  """Whether any stage learns conversations."""
  return config.a.conversation_share or config.b.conversation_share


def _conversations(config, base):
  """What data.conversations names, if anything needs it."""
  if not _shares(config) and not config.retention.conversations:
    return []
  path = conversations.DEFAULT
  if config.data.conversations:
    path = addresses.resolve(config.data.conversations, 'data.conversations')
  return conversations.read_conversations(path, base.tokenizer, config.train.length)


def first_adapter(setup: Setup, stage: str) -> dict:
  """Where training starts: a fresh adapter, or for stage b that of stage a."""
  config, model = setup.config, setup.model
  if stage == 'b' and ownership.needs_stage_a(config):
    origin = ownership.stage_a_adapter(config, setup.workspace.folder)
    return _load_adapter(setup, origin)
  adapter = lora.init(
    setup.base.config,
    config.lora.rank,
    config.lora.targets,
    jax.random.key(config.seed),
  )
  # By way of the host: made on one device, it belongs on all of them.
  return jax.device_put(jax.device_get(adapter), model.layout.adapter(model.shapes))


def _load_adapter(setup, folder):
  """An adapter of this config's shapes, on the devices."""
  adapter, alpha = lora.read_adapter(folder)
  shapes = setup.model.shapes
  if jax.tree.map(np.shape, adapter) != shapes or alpha != setup.config.lora.alpha:
    raise InputError(
      f'{folder} holds an adapter with other lora.rank, lora.alpha, '
      'lora.targets or for another model than this config; use the config '
      'that made it.'
    )
  return jax.device_put(adapter, setup.model.layout.adapter(shapes))
