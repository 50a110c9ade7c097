"""The command that compiles ahead of time."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_command_compiles_for_this_machine(
  run_fields, command_environment, tmp_path
):
  flags = [f'--config.{name}={value}' for name, value in run_fields.items()]
  found = subprocess.run(
    [sys.executable, '-m', 'behaviorlm_jax.aot', '--config=configs/stage1.py', *flags],
    env=command_environment,
    text=True,
    capture_output=True,
    check=True,
  )
  for line in (
    'training step on 1 x cpu',
    'reading 8 rows of 512 tokens on 1 x cpu',
    'asking ',
    'arguments ',
    'temporaries ',
    'peak ',
    'products ',
    'memory moved ',
  ):
    assert line in found.stdout
  assert 'roofline' not in found.stdout  # Of a CPU no datasheet is known.
