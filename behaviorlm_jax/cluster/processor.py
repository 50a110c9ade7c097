"""Which dtype the processors of this machine multiply fastest."""

from pathlib import Path

CPU_INFO = Path('/proc/cpuinfo')


def fastest_dtype(backend: str, cpu_info: Path = CPU_INFO) -> str:
  """'bfloat16' or 'float32', the same on every machine of one kind.

  TPUs and GPUs since NVIDIA's Ampere have units for bfloat16, and so have CPUs
  with AMX (3.3 times float32 by XLA, measured on a Xeon). AVX512-BF16 doubles
  the rate of float32 on AMD's processors (measured on an EPYC); on Intel's, XLA
  and torch reach 0.6 of it (measured on a Xeon of model 207 that shows no AMX).
  Hosts of one run must be alike.

  Args:
    backend: jax.default_backend().
    cpu_info: what the Linux kernel says of the processor, if it is there.
  """
  if backend != 'cpu':
    return 'bfloat16'
  words = set(cpu_info.read_text().split()) if cpu_info.exists() else set()
  fast = 'amx_bf16' in words or {'AuthenticAMD', 'avx512_bf16'} <= words
  return 'bfloat16' if fast else 'float32'
