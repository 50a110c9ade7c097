"""SIGTERM: what stops at once, also where it came before."""

import pytest

from behaviorlm_jax.cluster import preemption


def test_what_stops_at_once_does_not_begin_after_a_stop(monkeypatch):
  monkeypatch.setattr(preemption, '_requested', True)
  with pytest.raises(preemption.Preempted), preemption.at_once():
    raise AssertionError('it began')
