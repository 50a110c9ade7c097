"""The least time of a program, from the datasheet of its chip."""

import types

import jax
import pytest

from behaviorlm_jax.cost import chips, hlo, roofline

V5E = chips.CHIPS['TPU v5 lite']
V5P = chips.CHIPS['TPU v5']
REFUSAL = (
  'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total '
  'memory required for HLO temporaries (17.25G) exceeds available HBM (15.75G). HLO '
  'module: jit_f.'
)


def slice_of(*sides):
  """Devices of a slice, x first."""
  coords = [()]
  for side in sides:
    coords = [(*c, i) for c in coords for i in range(side)]
  return [types.SimpleNamespace(coords=c) for c in coords]


@pytest.mark.parametrize(
  'chip, sides, links',
  [
    (V5E, (4, 1), 1),
    (V5E, (4, 4), 2),
    (V5E, (16, 16), 4),
    (V5E, (16, 4), 3),
    (V5P, (4, 4, 4), 6),
    (V5P, (2, 2, 1), 2),
    (V5E, (1, 1), 1),
  ],
)
def test_a_ring_brings_two_links_and_an_open_side_one(chip, sides, links):
  assert chips.links(chip, slice_of(*sides)) == links


def test_a_gather_takes_its_bytes_over_all_links():
  gather = hlo.Collective('all-gather', '{{0,1,2,3}}', 100e9, 1)
  assert roofline._seconds(gather, slice_of(2, 2), V5E) == 100 / (2 * 50)


def test_between_slices_the_network_counts():
  received = hlo.Collective('recv', '', 3.1e9, 1)
  assert roofline._seconds(received, slice_of(2, 2), V5E) == 1


def cost(**fields):
  return roofline.Cost('TPU v5e', V5E, **fields)


def test_the_slowest_resource_binds():
  one = hlo.Collective('all-gather', '{{0,1}}', 2**30, 4)
  found = cost(
    flops=197e12,
    needed=98.5e12,
    traffic=819e9 / 2,
    collectives=((one, 0.25),),
    peak=4 * 2**30,
  )
  assert (found.seconds, found.binds) == (1.0, 'products')
  assert found.mfu(found.seconds) == 0.5
  assert found.apart == 1 + 0.5 + 0.25
  slow = cost(flops=197e12, needed=197e12, traffic=819e9 * 4)
  assert (slow.seconds, slow.binds) == (4.0, 'memory')
  text = found.table()
  assert 'fits, 11.75 GiB to spare' in text
  assert 'all-gather           1.000 GiB in 4 among 2, 250.0 ms' in text
  assert 'products binds' in text and 'MFU of that   50.0%; 28.6%' in text


def test_a_program_that_cannot_be_read_has_its_memory_still():
  found = cost(flops=197e12, needed=197e12, peak=2**30)
  assert found.times == {'products': 1.0}
  text = found.table()
  assert 'fits' in text and 'between chips: not known' in text


def test_what_is_refused_is_told_by_how_much():
  def lowered(message):
    def refuse():
      raise jax.errors.JaxRuntimeError(message)

    return types.SimpleNamespace(compile=refuse)

  devices = [types.SimpleNamespace(device_kind='TPU v5 lite')] * 4
  refused = roofline.measure(lowered(REFUSAL), devices, 8, 4)
  assert (refused.chip, refused.flops, refused.needed) == ('TPU v5e', 2, 1)
  assert not refused.fits
  assert 'does not fit: too large by 1.50 GiB' in refused.table()
  with pytest.raises(jax.errors.JaxRuntimeError, match='something else'):
    roofline.measure(lowered('INTERNAL: something else'), devices)


def test_what_does_not_fit_is_told_by_how_much():
  large = cost(peak=16 * 2**30, traffic=1.0)
  assert not large.fits
  assert 'does not fit, 0.25 GiB too large' in large.table()
