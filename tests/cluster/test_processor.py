"""The dtype follows the processor, and an unknown one gets float32."""

import pytest

from behaviorlm_jax.cluster import processor

AMD = 'vendor_id : AuthenticAMD\nflags : fma avx512f {}\n'
INTEL = 'vendor_id : GenuineIntel\nflags : fma avx512f {}\n'


@pytest.mark.parametrize(
  'text, expected',
  [
    pytest.param(AMD.format('avx512_bf16'), 'bfloat16', id='AMD with it'),
    pytest.param(AMD.format('avx512vl'), 'float32', id='AMD without'),
    pytest.param(INTEL.format('avx512_bf16'), 'float32', id='Intel, vectors'),
    pytest.param(INTEL.format('avx512_bf16 amx_bf16'), 'bfloat16', id='AMX'),
  ],
)
def test_cpus_use_bfloat16_where_it_is_faster(tmp_path, text, expected):
  path = tmp_path / 'cpuinfo'
  path.write_text(text)
  assert processor.fastest_dtype('cpu', path) == expected


def test_a_cpu_that_says_nothing_uses_float32(tmp_path):
  assert processor.fastest_dtype('cpu', tmp_path / 'none') == 'float32'


@pytest.mark.parametrize('backend', ['gpu', 'tpu'])
def test_accelerators_use_bfloat16(backend, tmp_path):
  assert processor.fastest_dtype(backend, tmp_path / 'none') == 'bfloat16'
