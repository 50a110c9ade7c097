"""Every launcher can be read by bash."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [*ROOT.glob('launch/*.s*'), *ROOT.glob('docs/*.sh')]


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_syntax(launch, script):
  done = launch.shell('-n', str(script))
  assert (done.returncode, done.stderr) == (0, '')
