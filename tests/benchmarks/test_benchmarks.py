"""The benchmarks count what they say, and both sides get the same samples."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from behaviorlm_jax.model import families

sys.path.append(str(Path(__file__).parents[2] / 'benchmarks'))

import costs
import peers

TINY = families.PRESETS['tiny']


def test_step_flops_are_the_closed_form_of_a_tiny_model():
  flops = costs.step_flops(TINY, rank=4, tokens=10, answers=3, pairs=55)
  # Per layer: q and o 64 x 64, k and v 32 x 64, three of the MLP 128 x 64.
  weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
  low = 2 * 4 * (2 * 128 + 2 * 96 + 3 * 192)
  assert flops == {
    'frozen projections': 4 * weights * 10,
    'LoRA': 6 * low * 10,
    'head': 4 * 384 * 64 * 3,
    'attention': 12 * 2 * 64 * 55,
  }


def test_step_flops_count_only_the_projections_with_an_adapter():
  flops = costs.step_flops(TINY, 4, 10, 3, 55, ('q_proj',))
  assert flops['LoRA'] == 6 * 2 * 4 * 128 * 10


def test_pairs_are_causal_inside_segments_and_padding_has_none():
  assert costs.causal_pairs(np.array([[1, 1, 1, 2, 0], [1, 0, 0, 0, 0]])) == 8


@pytest.fixture(scope='module')
def program():
  """HLO of five products [8, 16] x [16, 16] and a batched one, then a sine."""

  def run(x, w):
    x = jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
    x = x.reshape(2, 4, 16)
    return jnp.sin(jnp.einsum('bij,bkj->bik', x, x))

  x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
  return jax.jit(run).lower(x, w).compile().as_text()


def test_product_flops_follow_loops(program):
  assert costs.product_flops(program) == (5 * 2 * 8 * 16 * 16 + 2 * 2 * 4 * 4 * 16)


def test_kinds_tell_products_with_weights_from_those_of_attention(program):
  assert {
    'products with weights',
    'products of attention',
    'elementwise and reductions',
  } <= set(costs.kinds(program).values())


BATCH = {
  'tokens': np.array([[11, 12, 13, 21, 22, 0], [31, 32, 33, 34, 35, 36]]),
  'segments': np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]]),
  'positions': np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]),
  'answer_positions': np.array([[1, 3, 0], [2, 3, 4]]),
  'answer_tokens': np.array([[13, 22, 0], [34, 35, 36]]),
  'answer_weights': np.array([[1, 1, 0], [1, 1, 1]], np.float32),
}


@pytest.mark.parametrize('layout', ['packed', 'padded', 'sorted'])
def test_every_layout_asks_for_the_same_tokens(layout):
  pairs = [
    (int(token), int(answer))
    for part in peers.parts(BATCH, layout)
    for token, answer in zip(
      part.tokens.flatten()[part.where], part.answers, strict=True
    )
  ]
  assert sorted(pairs) == [(12, 13), (21, 22), (33, 34), (34, 35), (35, 36)]


def test_similar_lengths_share_a_batch_and_others_do_not():
  lengths = (100, 20, 95, 98)
  samples = [peers.Sample(np.zeros(n), (), ()) for n in lengths]
  groups = [[len(s.tokens) for s in group] for group in peers.by_length(samples)]
  assert groups == [[100, 98, 95], [20]]
