"""Orbax checkpoints of one stage: adapter, optimizer, step and plan hash.

All hosts write them together. Only finished steps count (Orbax renames a complete
folder into place, or marks it in a bucket); one that is damaged is skipped with a
warning, and deleted.
"""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from behaviorlm_jax import errors
from behaviorlm_jax.cluster import processes
from behaviorlm_jax.errors import InputError

KEPT = 2  # The latest: one to resume from, and one before, should that be damaged.
# For what host 0 does alone, without waiting for the others.
_ALONE = ocp.options.MultiprocessingOptions(
  primary_host=0, active_processes={0}, barrier_sync_key_prefix='alone'
)


class _Manager(ocp.CheckpointManager):
  def reached_preemption(self, step: int) -> bool:
    del step
    # It would ask JAX by its own count of steps, and JAX, which keeps one count,
    # would forget that of cluster.preemption.
    return False

  def _finalize(self, step, steps_to_remove):
    # What this host could not write is raised at once: Orbax first waits for the
    # other hosts, and they for this one, 20 minutes. These are names of Orbax's
    # own, which tests/train/test_checkpoints.py guards.
    self._non_blocking_metadata_store.wait_until_finished()
    self._wait_for_checkpointers()
    super()._finalize(step, steps_to_remove)


class Checkpoints:
  """The `checkpoints/` folder of a stage."""

  def __init__(self, folder: Path, plan_hash: str):
    self.plan_hash = plan_hash
    latest = checkpoint_managers.LatestN(n=KEPT)
    self._manager = _Manager(
      folder,
      options=ocp.CheckpointManagerOptions(preservation_policy=latest),
      item_names=('state', 'facts'),
    )

  def save(self, state: dict) -> None:
    """Starts to write `state`, also between two that are due."""
    self._manager.save(
      int(state['step']),
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        facts=ocp.args.JsonSave({'plan_hash': self.plan_hash}),
      ),
      force=True,
    )

  def latest_step(self) -> int:
    """The last finished step, or 0."""
    return self._manager.latest_step() or 0

  def restore_latest(self, state: dict, first: int) -> dict:
    """`state`, or the newest readable checkpoint in its shape and place.

    Args:
      state: of step 0.
      first: the step of the stage's first checkpoint. If all are torn and none
        is later, training begins anew, as if killed right before it.

    Raises:
      InputError: there are later checkpoints, but none can be read.
    """
    # Host 0 reads each by itself first: a host that cannot read its part would
    # leave the others waiting. All go on from its step, whatever each of them sees.
    newest, torn = processes.shared(processes.on_primary(self._newest, state))
    if torn and not newest and max(torn) > first:
      raise InputError(
        f'{self._manager.directory}: none of the checkpoints {torn} can be '
        'read; delete the folder to train this stage from its start.'
      )
    for step in torn:  # Training will write these steps again.
      self._manager.delete(step)
    return self._restore(newest, state) if newest else state

  def _newest(self, state):
    """The newest step that can be read, or 0, and those after it."""
    handler = ocp.CompositeCheckpointHandler(
      composite_options=ocp.CompositeOptions(multiprocessing_options=_ALONE),
      state=ocp.PyTreeCheckpointHandler(multiprocessing_options=_ALONE),
      facts=ocp.JsonCheckpointHandler(multiprocessing_options=_ALONE),
    )
    # To memory of the host: devices may have no room for a second state.
    whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), state)
    wanted = ocp.args.Composite(
      state=ocp.args.PyTreeRestore(state, restore_args=whole),
      facts=ocp.args.JsonRestore(),
    )
    torn = []
    with ocp.Checkpointer(handler, multiprocessing_options=_ALONE) as reader:
      for step in sorted(self._manager.all_steps(), reverse=True):
        try:
          reader.restore(self._manager.directory / str(step), wanted)
        # What Orbax makes of missing files, missing arrays and broken ones.
        except (OSError, KeyError, ValueError) as error:
          # A disk that fails is no reason to give up a checkpoint.
          if errors.of_disk(error):
            raise
          logging.warning(
            'checkpoint %d cannot be read (%s); going on from before it.',
            step,
            str(error).split('\n')[0],
          )
          torn.append(step)
        else:
          return step, torn
    return 0, torn

  def _restore(self, step, state):
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract), facts=ocp.args.JsonRestore()
      ),
    )
    # Batches follow from plan and step: with another plan, from others.
    found = restored['facts']['plan_hash']
    if found != self.plan_hash:
      raise InputError(
        f'{self._manager.directory}/{step} belongs to another plan (hash '
        f'{found[:12]}, now {self.plan_hash[:12]}); use another --workdir.'
      )
    return restored['state']

  def restore_adapter(self, state: dict) -> dict:
    """The adapter of the last finished step."""
    return self._restore(self.latest_step(), state)['adapter']

  def wait(self) -> None:
    """Returns when everything that was saved is on disk.

    Raises what kept this host from writing its part of it, as the next `save` does.
    """
    self._manager.wait_until_finished()

  def close(self) -> None:
    self.wait()
    self._manager.close()
