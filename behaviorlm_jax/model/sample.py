"""Answers by the model itself: seeded draws, token after token.

A prompt runs once and leaves its keys and values, with room for the tokens to
come. Each of these is drawn from softmax(logits / temperature) and runs against
them. A draw depends on the seed, the number of its prompt and its own place:
how prompts are put together in batches changes no more than rounding.

Shapes: B prompts at a time, P their width, T tokens drawn at most.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from behaviorlm_jax.model import attention
from behaviorlm_jax.model import decoder

BATCH = 32  # Prompts at a time: a step of one row reads the weights as well.
WIDTH = 32  # Prompts are padded to a multiple of this many tokens.


@dataclasses.dataclass(frozen=True)
class Settings:
  """How answers are drawn."""

  tokens: int  # Of an answer, at most.
  temperature: float  # 1: as the model says; 0: always the likeliest.
  ends: tuple[int, ...]  # Tokens that end an answer, as its last one.


def answers(
  config, params, prompts, seed, settings, progress=lambda n: None, where=None
):
  """Draws an answer to each prompt.

  Args:
    config: families.DecoderConfig.
    params: base weights, on the devices.
    prompts: list of int32 arrays.
    seed: int.
    settings: Settings.
    progress: called with the number of prompts of each finished batch; may
      raise.
    where: Sharding of what the devices return; None: that of one device.

  Returns:
    List of int32 arrays of 1 to settings.tokens tokens.
  """

  @functools.partial(jax.jit, out_shardings=where)
  def run(params, *arguments):
    return _draw(decoder.Decoder(config, params), settings, *arguments)

  key, found = jax.random.key(seed), [None] * len(prompts)
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  for begin in range(0, len(order), BATCH):
    chosen = order[begin : begin + BATCH]
    tokens, lengths = _pad([prompts[i] for i in chosen])
    numbers = np.zeros(BATCH, np.int32)
    numbers[: len(chosen)] = chosen
    drawn, counts = map(np.asarray, run(params, key, tokens, lengths, numbers))
    for row, i in enumerate(chosen):
      found[i] = drawn[row, : counts[row]]
    progress(len(chosen))
  return found


def _pad(prompts):
  """Tokens int32 [B, P] and lengths int32 [B]; 0 in rows without a prompt."""
  width = -(-max(map(len, prompts)) // WIDTH) * WIDTH
  tokens = np.zeros((BATCH, width), np.int32)
  lengths = np.zeros(BATCH, np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
    lengths[row] = len(prompt)
  return tokens, lengths


def _draw(model, settings, key, tokens, lengths, numbers):
  """Tokens int32 [B, T] after prompts, and how many int32 [B] of each row.

  numbers: int32 [B], of the prompts.
  """
  keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(numbers)
  ends = jnp.asarray(settings.ends, jnp.int32)
  last, cache = model.prefill(tokens, jnp.maximum(lengths, 1))
  room = [(0, 0)] * 2 + [(0, settings.tokens)] + [(0, 0)] * 2
  cache = tuple(jnp.pad(x, room) for x in cache)

  def unfinished(carry):
    at, _, _, _, _, open_ = carry
    return (at < settings.tokens) & jnp.any(open_)

  def step(carry):
    at, last, cache, drawn, counts, open_ = carry
    chosen = _choose(model.logits(last), keys, at, settings.temperature)
    drawn = drawn.at[:, at].set(chosen)
    counts += open_
    open_ &= ~jnp.isin(chosen, ends)
    last, cache = _advance(model, cache, chosen, lengths, tokens.shape[1], at)
    return at + 1, last, cache, drawn, counts, open_

  rows = len(tokens)
  start = (
    jnp.int32(0),
    last,
    cache,
    jnp.zeros((rows, settings.tokens), jnp.int32),
    jnp.zeros(rows, jnp.int32),
    lengths > 0,
  )
  _, _, _, drawn, counts, _ = jax.lax.while_loop(unfinished, step, start)
  return drawn, counts


def _choose(logits, keys, at, temperature):
  """Tokens int32 [B] by logits [B, V]; `at`: how many were drawn before."""
  if not temperature:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  draw = lambda key, x: jax.random.categorical(jax.random.fold_in(key, at), x)
  return jax.vmap(draw)(keys, logits / temperature).astype(jnp.int32)


def _advance(model, cache, tokens, lengths, width, at):
  """Runs tokens int32 [B], the `at`-th of each answer.

  Returns the hidden state after each [B, D] and the cache with them in it.
  """
  places = jnp.arange(cache[0].shape[2])
  seen = (places < lengths[:, None]) | ((places >= width) & (places < width + at))
  itself = jnp.ones((len(tokens), 1), bool)
  mask = jnp.concatenate([seen, itself], axis=1)[:, None, None]

  def attend(q, k, v, cache_k, cache_v):
    keys = jnp.concatenate([cache_k, k], axis=1)
    values = jnp.concatenate([cache_v, v], axis=1)
    return attention.grouped(attention.scaled(q), keys, values, mask)

  positions = lengths[:, None] + at
  hidden, new = model(tokens[:, None], positions, attend, memory=cache, keep_cache=True)
  cache = tuple(
    jax.lax.dynamic_update_slice_in_dim(old, more, width + at, axis=2)
    for old, more in zip(cache, new, strict=True)
  )
  return hidden[:, 0], cache
