"""launch/slurm.sbatch: what reaches the trainer, and what is requeued."""

import pytest

# Two tasks, one after the other; it ends with their highest code, as Slurm's.
SRUN = """
while [[ $1 == --* ]]; do shift; done
highest=0
for task in 0 1; do
  SLURM_PROCID=$task "$@"
  code=$?
  ((code <= highest)) || highest=$code
done
exit $highest
"""
TASK = 'codes=($CODES); exit ${codes[SLURM_PROCID]}'


@pytest.fixture
def submit(programs, launch):
  """Runs the script as Slurm would, with the exit codes of its two tasks."""
  programs('srun', SRUN)
  programs('python', TASK)
  programs('scontrol')

  def run(codes, *arguments, **variables):
    return launch(
      'slurm.sbatch', *arguments, CODES=codes, SLURM_JOB_ID='7', **variables
    )

  return run


def test_arguments_reach_every_task(submit, programs, odd):
  done = submit('0 0', *odd, SLURM_CPUS_PER_TASK='3')
  assert (done.returncode, done.stderr) == (0, '')
  assert programs.calls('python') == 2 * [
    ['-u', '-m', 'behaviorlm_jax.main', *odd, '--config.distributed.coordinator=auto']
  ]
  assert programs.calls('srun')[0][:4] == [
    '--label',
    '--kill-on-bad-exit=0',
    '--cpus-per-task=3',
    'bash',
  ]
  assert not programs.calls('scontrol')


@pytest.mark.parametrize(
  'codes, code', [('75 75', 75), ('76 137', 137), ('134 76', 134), ('143 75', 143)]
)
def test_a_run_that_can_go_on_is_requeued(submit, programs, codes, code):
  done = submit(codes)
  assert done.returncode == code
  assert done.stderr == f'slurm.sbatch: the run ended with {code}; requeued.\n'
  assert programs.calls('scontrol') == [['requeue', '7']]


@pytest.mark.parametrize(
  'codes, code', [('2 76', 2), ('76 2', 2), ('1 134', 1), ('137 1', 1), ('2 2', 2)]
)
def test_one_that_fails_for_good_is_not(submit, programs, codes, code):
  done = submit(codes)
  assert done.returncode == code
  assert done.stderr == (
    f'slurm.sbatch: the run ended with {code}; it failed for good, see above.\n'
  )
  assert not programs.calls('scontrol')


def test_requeues_have_an_end(submit, programs):
  assert submit('75 75', SLURM_RESTART_COUNT='19').returncode == 75
  assert len(programs.calls('scontrol')) == 1
  for count, variables in ((20, {}), (3, {'MAX_REQUEUES': '3'})):
    done = submit('75 75', SLURM_RESTART_COUNT=str(count), **variables)
    assert done.returncode == 75
    assert f'requeued {count} times already' in done.stderr
  assert len(programs.calls('scontrol')) == 1


def test_a_cancelled_job_stays_away(submit, programs):
  # scancel signals the script, too.
  programs('srun', 'kill -TERM $PPID; exit 75')
  done = submit('75 75')
  assert done.returncode == 75
  assert 'the job was cancelled or out of time' in done.stderr
  assert not programs.calls('scontrol')


def test_a_task_waits_for_its_trainer_on_sigterm(submit, programs):
  """Slurm signals all processes of a task: the trainer and the shell around."""
  programs('python', 'trap "exit 75" TERM; kill -TERM $PPID $$; sleep 9')
  assert submit('').returncode == 75


def test_dry_run(launch):
  done = launch('slurm.sbatch', '--dry-run', "--config.stages=('a', 'b')")
  assert done.returncode == 0
  assert done.stdout == (
    "'srun' '--label' '--kill-on-bad-exit=0' 'bash' '-c' 'trap : TERM; "
    '"$@"; code=$?; exit $((code == 1 || code == 2 ? 200 + code : code))\' '
    "'task' 'python' '-u' '-m' 'behaviorlm_jax.main' "
    "'--config.stages=('\\''a'\\'', '\\''b'\\'')' "
    "'--config.distributed.coordinator=auto'\n"
  )


def test_what_a_dry_run_prints_is_what_runs(submit, launch, programs, odd):
  printed = submit('0 0', '--dry-run', *odd).stdout
  assert not programs.calls('srun')
  submit('0 0', *odd)
  launch.shell('-c', printed, CODES='0 0')
  first, second = programs.calls('srun')
  assert first == second
