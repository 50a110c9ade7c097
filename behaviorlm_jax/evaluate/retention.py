"""What a tuned model still knows of what its base model knew.

Measured on conversations held out of training: perplexity of their answer
tokens, exp(mean of -log p), and how far the tuned model p moved from the base
model p0 there, in nats per answer token:

  KL(p0 || p) = mean_t sum_v p0(v | x_t) (log p0(v | x_t) - log p(v | x_t))

Invariants:
  * The output head sees answer positions alone, some at a time: logits of the
    shape [batch, length, vocabulary] never exist. An adapter does not touch
    the head, so one program serves the base and every adapter.
  * Intervals hold 95 % of 1,000 seeded redraws of whole conversations. A ratio
    compares both models on the same redraw.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from behaviorlm_jax.data.conversations import Conversation
from behaviorlm_jax.model import lora
from behaviorlm_jax.score import scorer as scorer_lib
from behaviorlm_jax.score import tree_scores

_DRAWS = 1000
_WIDTH = 32  # Conversations are padded to a multiple of this many tokens.
_Batch = dict[str, np.ndarray]  # tokens int32 [B, L] and lengths int32 [B].


class Retention:
  """Measures adapters against their base model, on the same conversations."""

  def __init__(
    self,
    attach: scorer_lib.Attach,
    params: Mapping[str, jax.Array],
    layout: scorer_lib.Places,
    conversations: Sequence[Conversation],
    batch: int = 8,
  ):
    """Compiles nothing yet.

    Without any conversations there is nothing to `measure`; `batch`: of a pass.
    """
    self.layout, self.params, self._base = layout, params, None
    self.conversations = conversations
    parts = layout.row_parts
    self.batch = scorer_lib.round_up(batch, parts)
    # Logits that leave a CPU's cache take twice as long.
    rows = 64 if jax.default_backend() == 'cpu' else 512
    self.block = scorer_lib.round_up(rows, parts)

    def hidden(adapter: lora.Adapter | None, params: dict, batch: _Batch) -> jax.Array:
      tokens, lengths = batch['tokens'], batch['lengths']
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
      segments = (positions < lengths[:, None]).astype(jnp.int32)  # 0: padding.
      return attach(params, adapter).packed_hidden(tokens, positions, segments)[0]

    def log_probs(params: dict, states: jax.Array, tokens: jax.Array) -> jax.Array:
      return tree_scores.log_probs(attach(params, None), states, tokens)

    def divergence(params: dict, base: jax.Array, ours: jax.Array) -> jax.Array:
      # One head for both: an adapter does not touch it.
      logits = attach(params, None).logits
      base, ours = (jax.nn.log_softmax(logits(x)) for x in (base, ours))
      return jnp.sum(jnp.exp(base) * (base - ours), axis=-1)

    compiled = lambda f: jax.jit(f, out_shardings=layout.replicated)
    self._hidden, self._log_probs = compiled(hidden), compiled(log_probs)
    self._divergence = compiled(divergence)

  def rows(self, adapter: lora.Adapter | None) -> int:
    """How many rows `measure` will run: the base's, too, the first time."""
    passes = (self._base is None) + (adapter is not None)
    return passes * len(self.conversations)

  def measure(
    self, adapter: lora.Adapter | None, progress: Callable[[int], None] = lambda n: None
  ) -> dict[str, dict[str, int | float | list[float] | None]]:
    """Numbers of an adapter (None: the base model), plain int and float.

    `progress`: called with the number of rows of each finished batch.

    Returns:
      {'conversations': {'n', 'answer_tokens', 'perplexity', 'kl_to_base',
      'perplexity_ratio'}}; the ratio is to the base. Every name but counts has
      a `<name>_interval` [low, high]; it is None where a single conversation
      leaves nothing to redraw.
    """
    if self._base is None:  # Kept, the hidden states for every later KL.
      self._base = self._run(None, progress)
    base_states, base_totals = self._base
    states, totals = self._base if adapter is None else self._run(adapter, progress)
    n, tokens = len(states), np.array([len(x) for x in states])
    kl = self._in_blocks(
      self._divergence, np.concatenate(base_states), np.concatenate(states)
    )
    # `times` says how often a conversation counts. Sums over sums, so a long one
    # weighs as its tokens do.
    per_token = lambda sums: lambda times: times @ sums / (times @ tokens)
    loss, change = per_token(-totals), per_token(base_totals - totals)
    return {
      'conversations': {
        'n': n,
        'answer_tokens': int(tokens.sum()),
        **_estimate('perplexity', n, lambda times: np.exp(loss(times))),
        # Of the whole sum over the vocabulary, not of sampled tokens.
        **_estimate('kl_to_base', n, per_token(_sums(kl, states))),
        **_estimate('perplexity_ratio', n, lambda times: np.exp(change(times))),
      }
    }

  def _run(self, adapter, progress):
    """What one model says of each conversation.

    Returns hidden states [n, D], in the compute dtype, of the positions that
    predict its n answer tokens, and the sum of their log p: float64
    [conversations], in nats.
    """
    states = self._states(adapter, progress)
    tokens = np.concatenate([c.tokens[1:][c.answers[1:]] for c in self.conversations])
    found = self._in_blocks(self._log_probs, np.concatenate(states), tokens[:, None])
    return states, _sums(found[:, 0], states)

  def _states(self, adapter, progress):
    """The hidden states of `_run`."""
    states = [None] * len(self.conversations)
    prompts = [c.tokens for c in self.conversations]
    for chosen, batch in _padded_batches(prompts, self.batch):
      found = self._hidden(adapter, self.params, self.layout.put_same(batch))
      for i, hidden in zip(chosen, np.asarray(found), strict=False):
        # Token t + 1 is predicted from t.
        states[i] = hidden[np.flatnonzero(self.conversations[i].answers[1:])]
      progress(len(chosen))
    return states

  def _in_blocks(self, function, *arrays):
    """function(params, *arrays) of arrays [N, ...], a few rows at a time."""
    count, found = len(arrays[0]), []
    for begin in range(0, count, self.block):
      parts = [x[begin : begin + self.block] for x in arrays]
      more = self.block - len(parts[0])  # One shape, one compilation.
      parts = [np.pad(x, ((0, more), (0, 0))) for x in parts]
      placed = self.layout.put_same(dict(enumerate(parts)))
      found.append(np.asarray(function(self.params, *placed.values())))
    return np.concatenate(found)[:count]


def _sums(values, like):
  """float64 sums of values [N], in runs as long as the arrays of `like`."""
  ends = np.cumsum([len(x) for x in like])
  parts = np.split(values.astype(np.float64), ends[:-1])
  return np.array([part.sum() for part in parts])


def _estimate(name, n, statistic):
  """A statistic of n items and its interval; the same redraws for each name.

  statistic: of `times` [n], how often each item counts.
  """
  rng, interval = np.random.default_rng(0), None
  if n > 1:  # One alone is always redrawn as itself.
    draws = [
      statistic(np.bincount(rng.integers(n, size=n), minlength=n))
      for _ in range(_DRAWS)
    ]
    interval = np.quantile(draws, [0.025, 0.975]).tolist()
  return {name: float(statistic(np.ones(n))), f'{name}_interval': interval}


def hold_out(
  conversations: Iterable[Conversation], share: float = 0.1
) -> tuple[list[Conversation], list[Conversation]]:
  """Splits conversations into (training, held out), both in their order.

  The SHA-256 of its tokens decides each: other conversations and their order
  do not matter, and equal ones stay together. `share` is that of a long list.
  """
  parts = [], []
  for conversation in conversations:
    # Little-endian: the same bytes on any machine.
    digest = hashlib.sha256(conversation.tokens.astype('<i4').tobytes())
    value = int.from_bytes(digest.digest()[:8], 'big') / 2**64
    parts[value < share].append(conversation)
  return parts


def _padded_batches(
  texts: Sequence[np.ndarray], size: int
) -> Iterator[tuple[list[int], _Batch]]:
  """Yields batches of `size` rows, and the indices of the texts in each.

  By length: neighbors need little padding, and a width is compiled for once.
  """
  order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
  for begin in range(0, len(order), size):
    chosen = order[begin : begin + size]
    width = scorer_lib.round_up(len(texts[chosen[-1]]), _WIDTH)
    tokens = np.zeros((size, width), np.int32)
    # Rows without a prompt have one token: a state is read at length - 1.
    lengths = np.ones(size, np.int32)
    for row, i in enumerate(chosen):
      lengths[row] = len(texts[i])
      tokens[row, : lengths[row]] = texts[i]
    yield chosen, {'tokens': tokens, 'lengths': lengths}
