"""All that a run is given, opened and checked: log, model, conversations."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from behaviorlm_jax.cluster import processes
from behaviorlm_jax.cluster import workspace as workdir_lib
from behaviorlm_jax.data import conversations
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.data import prepared
from behaviorlm_jax.data import prompts as prompts_lib
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.evaluate import evaluation
from behaviorlm_jax.evaluate import retention as retention_lib
from behaviorlm_jax.io import addresses
from behaviorlm_jax.model import lora
from behaviorlm_jax.model import weights
from behaviorlm_jax.score import label_tree
from behaviorlm_jax.score import scorer as scorer_lib
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
    return label_tree.build(label_tree.shortest(self.prompts.labels))

  @property
  def fingerprints(self):
    return workdir_lib.fingerprints(self.events, self.base)


def open_run(config, workdir, layout, shapes_only=False):
  """Events, base model and scorer; every input is checked on the way.

  `shapes_only`: weights are not read, and can be compiled for but not run.
  """
  base = weights.open_base(config.model.address)
  layout = layout.of(base.config)
  lora.shapes(base.config, config.lora.rank, config.lora.targets)
  talks = _conversations(config, base)
  events = prepared.load_events(config, workdir)
  prompts = prompts_lib.Prompts(events, base.tokenizer, config.data)
  plan_lib.check_lengths(prompts, config)
  prompts.check_lengths(base.config.max_length, config.train.length)
  evaluation.test_samples(events, config)  # Refuses a log without any.
  processes.assert_same(
    workdir_lib.facts(config)
    | {
      'the events': events.fingerprint,
      'the base model': base.fingerprint,
      'the conversations': conversations.tokens_digest(talks),
    }
  )
  attach = step_lib.attacher(base.config, config, layout, config.model.dtype)
  place = layout.abstract if shapes_only else layout.place
  params = weights.read_params(base, jnp.dtype(config.model.dtype), place)
  scored, attach_scored = params, attach
  if config.score.dtype != config.model.dtype:
    scored = weights.read_params(base, jnp.dtype(config.score.dtype), place)
    attach_scored = step_lib.attacher(
      base.config, config, layout, config.score.dtype, 'auto'
    )
  scorer = scorer_lib.Scorer(
    attach_scored, scored, prompts.labels, config.score, layout
  )
  talks, held = retention_lib.hold_out(talks, config.retention.conversations)
  if not talks and _shares(config):
    raise InputError(
      f'data.conversations: all {len(held)} conversations are held out to '
      'measure retention and none is left to train on; give more, or set '
      'retention.conversations=0.'
    )
  retention = retention_lib.Retention(
    attach_scored, scored, layout, held, config.score.batch
  )
  return Run(
    config, workdir, layout, base, prompts, talks, attach, params, scorer, retention
  )


def _shares(config):
  """Whether any stage learns conversations."""
  return config.plan.conversation_share or config.plan.balanced_conversation_share


def _conversations(config, base):
  """What data.conversations names, if anything needs it."""
  if not _shares(config) and not config.retention.conversations:
    return []
  path = conversations.DEFAULT
  if config.data.conversations:
    path = addresses.resolve(config.data.conversations, 'data.conversations')
  return conversations.read_conversations(path, base.tokenizer, config.train.length)


def load_adapter(this, folder):
  """An adapter of this config's shapes, on the devices."""
  config = this.config
  shapes = lora.shapes(this.base.config, config.lora.rank, config.lora.targets)
  adapter, alpha = lora.read_adapter(folder)
  if jax.tree.map(np.shape, adapter) != shapes or alpha != config.lora.alpha:
    raise InputError(
      f'{folder} holds an adapter with other lora.rank, lora.alpha, '
      'lora.targets or for another model than this config; use the config '
      'that made it.'
    )
  return jax.device_put(adapter, this.layout.adapter(shapes))
