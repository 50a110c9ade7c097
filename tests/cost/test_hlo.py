"""What compiled modules say of their traffic, on texts and on real ones."""

import json
import os
import subprocess
import sys

import pytest

from behaviorlm_jax.cost import hlo

# Shaped like what libtpu writes: a loop of 8, in it a weight that is gathered
# beside other work, and another loop in which that goes on.
TEXT = """HloModule jit_step

%body (p: (s32[], bf16[8,64], bf16[4,64,16])) -> (s32[], bf16[8,64]) {
  %p = (s32[], bf16[8,64]{1,0}, bf16[4,64,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %w = bf16[4,64,16]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %part = bf16[64,16]{1,0:T(8,128)(2,1)} fusion(%w, %i), kind=kLoop, calls=%cut
  %begin = (bf16[64,16]{1,0}, bf16[64,64]{1,0:S(1)}) fusion(%part), kind=kCustom, calls=%async.1
  %inner = (s32[], bf16[64,64]{1,0}) while(%begin), condition=%until, body=%go_on
  ROOT %out = (s32[], bf16[8,64]{1,0}) tuple(%i, %x)
}

%go_on (p.1: (s32[], bf16[64,64])) -> (s32[], bf16[64,64]) {
  %p.1 = (s32[], bf16[64,64]{1,0}) parameter(0)
  %half = bf16[64,16]{1,0} get-tuple-element(%p.1), index=1
  ROOT %more = (s32[], bf16[64,64]{1,0}) fusion(%half), kind=kCustom, calls=%async.2
}

%async.1 (q: bf16[64,16]) -> (bf16[64,16], bf16[64,64]) {
  %q = bf16[64,16]{1,0} parameter(0)
  %all-gather.1 = bf16[64,64]{1,0} all-gather(%q), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={1}
  ROOT %pair = (bf16[64,16]{1,0}, bf16[64,64]{1,0}) tuple(%q, %all-gather.1)
}

%async.2 (r: bf16[64,16]) -> (bf16[64,16], bf16[64,64]) {
  %r = bf16[64,16]{1,0} parameter(0)
  %all-gather.2 = bf16[64,64]{1,0} all-gather(%r), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={1}
  ROOT %pair.1 = (bf16[64,16]{1,0}, bf16[64,64]{1,0}) tuple(%r, %all-gather.2)
}

%cut (s: bf16[4,64,16], t: s32[]) -> bf16[64,16] {
  %s = bf16[4,64,16]{2,1,0} parameter(0)
  %t = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,64,16]{2,1,0} dynamic-slice(%s, %t, %zero, %zero), dynamic_slice_sizes={1,64,16}
  ROOT %flat = bf16[64,16]{1,0} bitcast(%slice)
}

%until (u: (s32[], bf16[64,64])) -> pred[] {
  %u = (s32[], bf16[64,64]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%u), index=0
  %three = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%n, %three), direction=LT
}

%bound (v: (s32[], bf16[8,64], bf16[4,64,16], s32[])) -> pred[] {
  %v = (s32[], bf16[8,64]{1,0}, bf16[4,64,16]{2,1,0}, s32[]) parameter(0)
  %m = s32[] get-tuple-element(%v), index=0
  %end = s32[] get-tuple-element(%v), index=3
  ROOT %lt.1 = pred[] compare(%m, %end), direction=LT
}

ENTRY %main (a: bf16[8,64], b: bf16[4,64,16]) -> bf16[8,64] {
  %a = bf16[8,64]{1,0} parameter(0)
  %b = bf16[4,64,16]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %eight = s32[] constant(8)
  %copied = s32[] copy(%eight)
  %state = (s32[], bf16[8,64]{1,0}, bf16[4,64,16]{2,1,0}, s32[]) tuple(%start, %a, %b, %copied)
  %loop = (s32[], bf16[8,64]{1,0}) while(%state), condition=%bound, body=%body
  ROOT %y = bf16[8,64]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501

# Eight devices gather the weights of each of five layers, and add up gradients.
WORKER = """
import jax, jax.numpy as jnp, json
from jax.sharding import NamedSharding, PartitionSpec as P
from behaviorlm_jax.cost import hlo
mesh = jax.make_mesh((2, 4), ('data', 'fsdp'),
                     axis_types=(jax.sharding.AxisType.Auto,) * 2)
put = lambda shape, *spec: jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
def layer(x, w):
  w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
  return jnp.tanh(x @ w), None
f = lambda w, x: jax.lax.scan(layer, x, w)[0]
w, x = put((5, 64, 64), None, 'fsdp'), put((16, 64), ('data', 'fsdp'))
text = jax.jit(f).lower(w, x).compile().as_text()
g = jax.jit(lambda x: x.sum(axis=0), out_shardings=NamedSharding(mesh, P()))
added = g.lower(x).compile().as_text()
print(json.dumps([[(c.kind, c.received, c.runs, hlo.group_size(c.groups))
                   for c in hlo.Module(t).collectives()]
                  for t in (text, added)]))
"""


@pytest.fixture(scope='module')
def module():
  return hlo.Module(TEXT)


def test_a_collective_in_several_fusions_of_a_loop_is_one(module):
  (gather,) = module.collectives()
  assert (gather.kind, gather.runs) == ('all-gather', 8)
  assert gather.received == 8 * 64 * 64 * 2 * 3 / 4
  assert hlo.members(gather.groups) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_of_stacked_weights_a_loop_reads_a_slice_each_time(module):
  [gather] = module.collectives()
  constants = 4 * 2  # %eight is copied.
  slices = 8 * 2 * (64 * 16 * 2) + 8 * 4  # Read, written; the index.
  # What is gathered: read and written by the collective alone.
  assert module.traffic() == constants + slices + 2 * gather.received


def test_what_comes_from_another_slice_is_counted_as_received():
  line = (
    '  %recv.1 = (f32[2,8]{1,0:T(8,128)}, u32[], token[]) '
    'recv(%after-all.1), channel_id=28, is_host_transfer=true\n'
    '  %start = s32[] constant(0)'
  )
  head, tail = TEXT.split('ENTRY')
  module = hlo.Module(
    head + 'ENTRY' + tail.replace('  %start = s32[] constant(0)', line)
  )
  assert hlo.Collective('recv', '', 2 * 8 * 4, 1) in module.collectives()


def test_a_loop_that_cannot_be_counted_is_refused():
  text = TEXT.replace(
    '%copied = s32[] copy(%eight)', '%copied = s32[] add(%eight, %eight)'
  )
  with pytest.raises(ValueError, match='loop cannot be counted'):
    hlo.Module(text).collectives()


@pytest.mark.parametrize(
  'text, groups',
  [
    ('{{0,1},{2,3}}', [[0, 1], [2, 3]]),
    ('[2,2]<=[4]', [[0, 1], [2, 3]]),
    ('[2,2]<=[2,2]T(1,0)', [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
  ],
)
def test_every_notation_of_groups_is_read(text, groups):
  assert hlo.members(text) == groups


def test_groups_that_cannot_be_read_are_refused():
  with pytest.raises(ValueError, match='cannot be read'):
    hlo.members("mesh['a'=4] {'a':(1)2}")


def test_collectives_of_compiled_loops_count_every_run():
  found = subprocess.run(
    [sys.executable, '-c', WORKER],
    text=True,
    capture_output=True,
    check=True,
    env=os.environ | {'JAX_NUM_CPU_DEVICES': '8', 'JAX_PLATFORMS': 'cpu'},
  )
  loop, added = json.loads(found.stdout.splitlines()[-1])
  assert loop == [['all-gather', 5 * 64 * 64 * 4 * 3 / 4, 5, 4]]
  assert added == [['all-reduce', 2 * 64 * 4 * 7 / 8, 1, 8]]
