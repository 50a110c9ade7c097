"""All that a run is given, opened and checked: log, model, conversations."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from behaviorlm_jax import seeds
from behaviorlm_jax.cluster import preemption
from behaviorlm_jax.cluster import processes
from behaviorlm_jax.cluster import workspace as workdir_lib
from behaviorlm_jax.data import conversations
from behaviorlm_jax.data import plan as plan_lib
from behaviorlm_jax.data import prepared
from behaviorlm_jax.data import prompts as prompts_lib
from behaviorlm_jax.data import self_written
from behaviorlm_jax.errors import InputError
from behaviorlm_jax.evaluate import evaluation
from behaviorlm_jax.evaluate import retention as retention_lib
from behaviorlm_jax.io import addresses
from behaviorlm_jax.model import lora
from behaviorlm_jax.model import sample
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
  talks, questions = _conversations(config, base), _questions(config, base)
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
      'the conversations': conversations.tokens_digest(talks or []),
      'the questions': conversations.tokens_digest(
        row for question in questions for row in question.choices
      ),
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
  if talks is None:  # At last: it takes minutes.
    talks = _self_written(config, base, params, layout)
  talks, held = retention_lib.hold_out(talks, config.retention.conversations)
  if not talks and _shares(config):
    raise InputError(
      f'data.conversations: all {len(held)} conversations are held out to '
      'measure retention and none is left to train on; give more, or set '
      'retention.conversations=0.'
    )
  retention = retention_lib.Retention(
    attach_scored, scored, layout, held, questions, config.score.batch
  )
  return Run(
    config, workdir, layout, base, prompts, talks, attach, params, scorer, retention
  )


def _shares(config):
  """Whether any stage learns conversations."""
  return config.plan.conversation_share or config.plan.balanced_conversation_share


def _questions(config, base):
  """A seeded draw of the multiple-choice questions, in their order."""
  if not config.retention.questions:
    return []
  path = addresses.resolve(config.retention.questions, 'retention.questions')
  found = retention_lib.read_questions(path, base.tokenizer, base.config.max_length)
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
  return conversations.read_conversations(path, base.tokenizer, config.train.length)


def _self_written(config, base, params, layout):
  """Conversations that the untuned model answers."""

  def draw(task):
    settings = sample.Settings(self_written.TOKENS, self_written.TEMPERATURE, task.ends)
    with tqdm.tqdm(total=len(task.prompts), desc='conversations') as bar:

      def progress(done):
        bar.update(done)
        preemption.check()

      return sample.answers(
        base.config,
        params,
        task.prompts,
        config.seed,
        settings,
        progress,
        layout.replicated,
      )

  return self_written.read(
    base, config.model.dtype, config.seed, config.train.length, draw
  )


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
