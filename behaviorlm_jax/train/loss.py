"""What a row teaches: the loss of its answer tokens.

The loss is a weighted sum over answer tokens. Hidden states are gathered at
answer positions before the output head: logits exist for answers alone, never
[B, L, V]. The tokens of behaviors are normalised over the vocabulary, or within
the list of names and then corrected for a prior (a.softmax, a.prior).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from behaviorlm_jax.data.plan import NameTree
from behaviorlm_jax.model import decoder


@dataclasses.dataclass(frozen=True, eq=False)
class Names:
  """What may follow each node of the tree of names (score.label_tree)."""

  tokens: np.ndarray  # int32 [nodes, F]; -1 is none.
  bonus: np.ndarray  # float32 [nodes, F], added to the logits of these tokens.

  def losses(self, logits: jax.Array, tokens: jax.Array, nodes: jax.Array) -> jax.Array:
    """Negative log-likelihoods float32 [...] of tokens int32 [...].

    Of a token at a node int32 [...] the softmax runs over what may follow that,
    logits [..., V] with their bonus; at node -1 over the vocabulary.
    """
    # At node -1 the last node's options are looked up, and thrown away below.
    options = jnp.asarray(self.tokens)[nodes]
    chosen = jnp.take_along_axis(logits, jnp.maximum(options, 0), axis=-1)
    chosen = chosen + jnp.asarray(self.bonus)[nodes]
    # A sum with one term, for a gather by equality: token ids are not positions.
    own = jnp.sum(jnp.where(options == tokens[..., None], chosen, 0), axis=-1)
    chosen = jnp.where(options >= 0, chosen, -jnp.inf)
    within = jax.nn.logsumexp(chosen, axis=-1) - own
    # Both are there for every token: conversations and names share the batch.
    return jnp.where(nodes >= 0, within, _over_vocabulary(logits, tokens))


# Of kept's share, what a name that is never drawn is given: next to nothing,
# but with a logarithm.
_NEVER = 1e-3


def names_of(
  tree: NameTree, drawn: np.ndarray | None = None, kept: np.ndarray | None = None
) -> Names:
  """The Names of a label_tree.Tree; without `drawn` there is no bonus.

  Teaching moves scores towards how often each name is drawn, in `drawn`, float
  [Y] of any sum. The bonus of a token, log drawn - log kept of the names below
  it, moves the softmax there instead, and the logits alone are left those of
  names that come as often as in `kept`, positive float [Y]: the logit-adjusted
  loss of Menon et al. (Long-tail learning via logit adjustment, ICLR 2021) for
  the prior drawn / kept, and with equal ones in `kept` the balanced softmax of
  Ren et al. (Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS
  2020).
  """
  bonus = np.zeros(len(tree.edge_tokens))
  if drawn is not None:
    # At every node: where drawn / kept differs among the names below a token, their
    # sums are used, whatever the context says of which it will be.
    kept = np.asarray(kept, np.float64) / np.sum(kept)
    drawn = np.maximum(np.asarray(drawn) / np.sum(drawn), _NEVER * kept)
    bonus = np.log(_below(tree, drawn)) - np.log(_below(tree, kept))
  pick = lambda values, none: np.append(values, none)[tree.node_edges]
  return Names(
    pick(tree.edge_tokens, -1).astype(np.int32), pick(bonus, 0).astype(np.float32)
  )


def _below(tree, values):
  """Sums float64 [E] of the names' values [Y] below each edge."""
  below = np.zeros(len(tree.edge_tokens))
  for name, value in enumerate(values):
    below[tree.path(name)] += value
  return below


def _over_vocabulary(logits, tokens):
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
  """Weighted negative log-likelihood of a batch's answer tokens."""

  attach: Callable[[dict, dict], decoder.Decoder]  # Of params and adapter.
  groups: int = 1  # G, of rows as they lie on devices; each keeps its own answers.
  # N, the most of some weight that a group has (plan.most_answers). Rows differ in
  # how many they have, and the head runs on G x N of them. None: on all B x A.
  answers: int | None = None
  names: Names | None = None  # None: over the vocabulary.

  def sums(
    self, adapter: dict, params: dict, batch: dict
  ) -> tuple[jax.Array, jax.Array]:
    """The loss and the weights, two float32 scalars: sums and not means.

    `batch`: see data.loader.
    """
    model = self.attach(params, adapter)
    hidden, _ = model.packed_hidden(
      batch['tokens'], batch['positions'], batch['segments']
    )
    where, tokens, nodes, weights = _chosen(batch, self.groups, self.answers)
    logits = model.logits(_at(hidden, where))
    losses = (
      self.names.losses(logits, tokens, nodes)
      if self.names
      else _over_vocabulary(logits, tokens)
    )
    return jnp.sum(losses * weights), jnp.sum(weights)


def _chosen(batch, groups, most):
  """Positions, tokens, nodes and weights [G, N] of answers of some weight."""
  most = most or batch['answer_weights'].size // groups
  split = lambda x: x.reshape(groups, -1, *x.shape[1:])
  compact = functools.partial(_compact, length=batch['tokens'].shape[1], most=most)
  names = ('positions', 'tokens', 'nodes', 'weights')
  return jax.vmap(compact)(*(split(batch[f'answer_{name}']) for name in names))


def _at(hidden, where):
  """Hidden states [G, N, D] of [B, L, D], at `where` [G, N] of _chosen."""
  # By groups, as rows lie on devices: no hidden state goes to another one.
  hidden = hidden.reshape(len(where), -1, hidden.shape[-1])
  return jnp.take_along_axis(hidden, where[..., None], axis=1)


def _compact(where, tokens, nodes, weights, length, most):
  """Those of some weight of a group's answers [rows, A], as [most] each.

  `where` becomes positions in all rows of the group, one after the other.
  """
  where = where + length * jnp.arange(len(where))[:, None]
  # A size that is known beforehand keeps shapes fixed. Slots that nothing fills lie
  # past the end and read zeros: no weight, no loss.
  (chosen,) = jnp.nonzero(weights.ravel(), size=most, fill_value=weights.size)
  pick = lambda x: x.ravel().at[chosen].get(mode='fill', fill_value=0)
  return pick(where), pick(tokens), pick(nodes), pick(weights)
