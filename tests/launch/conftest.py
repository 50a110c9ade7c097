"""Launchers run with small programs in place of Slurm, gcloud and kubectl."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What must arrive as it is, whatever shells it passes on its way.
ODD = (
  "--config.stages=('a', 'b')",
  '--x=it\'s "$5" $(HOME) ${HOME} & \\n *',
  '--y=',
  '--z=two\nlines',
)


@pytest.fixture
def odd():
  return ODD


@pytest.fixture
def programs(tmp_path):
  """Adds a program to the PATH of launchers: name and body, in bash.

  It first writes down its arguments; `programs.calls(name)`: those of all its
  calls.
  """
  folder = tmp_path / 'bin'
  folder.mkdir()

  def add(name, body=''):
    path = folder / name
    path.write_text(
      f'#!/bin/bash\nprintf "%s\\0" "$@" $\'\\1\' >>"{tmp_path}/{name}.calls"\n{body}\n'
    )
    path.chmod(0o755)

  def calls(name):
    file = tmp_path / f'{name}.calls'
    text = file.read_text() if file.exists() else ''
    return [call.split('\0')[:-1] for call in text.split('\1\0')[:-1]]

  add.folder, add.calls = folder, calls
  return add


@pytest.fixture
def launch(programs):
  """Runs a script of launch/ with arguments and variables."""

  def run(script, *arguments, **variables):
    return shell(f'{ROOT}/launch/{script}', *arguments, **variables)

  def shell(*command, **variables):
    environment = {
      'PATH': f'{programs.folder}:{os.environ["PATH"]}',
      'HOME': '/home/me',
    }
    return subprocess.run(
      ['bash', *command],
      cwd=ROOT,
      env=environment | variables,
      capture_output=True,
      text=True,
      check=False,
      timeout=60,
    )

  run.shell = shell
  return run
