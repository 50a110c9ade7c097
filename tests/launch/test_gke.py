"""launch/gke.sh: the manifest, what its containers do, what kubectl is told."""

import re
import subprocess
import sys

import pytest
import yaml


@pytest.fixture
def manifest(launch):
  """The manifest of a dry run, parsed."""

  def make(*arguments, **settings):
    done = launch('gke.sh', '--dry-run', *arguments, **settings)
    assert (done.returncode, done.stderr) == (0, '')
    match = re.fullmatch(
      r"kubectl create --filename=- <<'EOF'\n(.*\n)EOF\n", done.stdout, re.S
    )
    return yaml.safe_load(match[1])

  return make


def parts(manifest):
  """The replicated job, the specs of its job and pod, the container."""
  [slices] = manifest['spec']['replicatedJobs']
  job = slices['template']['spec']
  pod = job['template']['spec']
  [container] = pod['containers']
  return slices, job, pod, container


def test_the_manifest_is_a_jobset(manifest):
  """The fields of v1alpha2, and what Kubernetes wants beside their types."""
  made = manifest('--workdir=gs://bucket/run')
  slices, job, pod, container = parts(made)
  assert made['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  assert made['kind'] == 'JobSet'
  assert set(made) == {'apiVersion', 'kind', 'metadata', 'spec'}
  assert set(made['spec']) == {'failurePolicy', 'replicatedJobs'}
  assert set(slices) == {'name', 'replicas', 'template'}
  assert set(job) == {
    'parallelism',
    'completions',
    'backoffLimit',
    'podFailurePolicy',
    'template',
  }
  for whole in (
    slices['replicas'],
    job['parallelism'],
    job['completions'],
    job['backoffLimit'],
    pod['terminationGracePeriodSeconds'],
    made['spec']['failurePolicy']['maxRestarts'],
  ):
    assert type(whole) is int
  assert pod['restartPolicy'] == 'Never'  # As podFailurePolicy wants it.
  # <JobSet>-<replicated job>-<index>-<index> is the name of a host.
  assert re.fullmatch('[a-z0-9-]{1,50}', made['metadata']['name'])
  for text in (
    *pod['nodeSelector'].values(),
    *container['args'],
    *container['command'],
    container['image'],
  ):
    assert type(text) is str


def test_what_fails_for_good_is_not_restarted(manifest):
  made = manifest('--workdir=gs://bucket/run', MAX_RESTARTS='3')
  _, job, _, container = parts(made)
  [rule] = job['podFailurePolicy']['rules']
  assert rule == {
    'action': 'FailJob',
    'onExitCodes': {
      'containerName': container['name'],
      'operator': 'In',
      'values': [1, 2],
    },
  }
  policy = made['spec']['failurePolicy']
  assert policy['maxRestarts'] == 3
  [rule] = policy['rules']
  assert re.fullmatch('[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?', rule['name'])
  assert rule['action'] == 'FailJobSet'
  assert rule['onJobFailureReasons'] == ['PodFailurePolicy']
  assert job['backoffLimit'] == 0  # Any other end of a pod ends the job.


@pytest.mark.parametrize(
  'topology, chips, hosts', [('4x4', 4, 4), ('2x4', 8, 1), ('4x4x8', 4, 32)]
)
def test_hosts_follow_from_the_topology(manifest, topology, chips, hosts):
  made = manifest(
    '--workdir=gs://bucket/run', TOPOLOGY=topology, CHIPS=str(chips), SLICES='2'
  )
  slices, job, pod, container = parts(made)
  assert slices['replicas'] == 2
  assert job['parallelism'] == job['completions'] == hosts
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
    'cloud.google.com/gke-tpu-topology': topology,
  }
  assert container['resources']['limits'] == {'google.com/tpu': chips}


def test_arguments_reach_the_trainer(manifest, odd):
  arguments = (*odd, '--name=@NAME@', '--args=@ARGS@', '\\"')
  args = parts(manifest(*arguments))[3]['args']
  assert [argument.replace('$$', '$') for argument in args] == [
    *arguments,
    '--config.distributed.coordinator=auto',
  ]
  assert not re.search(r'(?<!\$)(\$\$)*\$\(', args[1])  # Kubernetes' own.


@pytest.fixture
def contain(manifest, programs):
  """Starts what a container runs; `trainer` is what python does in it."""

  def start(trainer):
    programs('python', trainer)
    programs('sleep')
    container = parts(manifest('--x=a b'))[3]
    return subprocess.Popen(
      [*container['command'], *container['args']],
      stdout=subprocess.PIPE,
      env={'PATH': f'{programs.folder}:/usr/bin:/bin'},
      text=True,
    )

  return start


@pytest.mark.parametrize(
  'code, slept', [(0, 0), (1, 0), (2, 0), (75, 0), (76, 1), (134, 1), (137, 0)]
)
def test_a_host_that_lost_another_ends_last(contain, programs, code, slept):
  assert contain(f'exit {code}').wait(timeout=30) == code
  assert programs.calls('python') == [
    [
      '-u',
      '-m',
      'behaviorlm_jax.main',
      '--x=a b',
      '--config.distributed.coordinator=auto',
    ]
  ]
  assert len(programs.calls('sleep')) == slept


def test_sigterm_reaches_the_trainer_which_saves(contain):
  process = contain(f'''exec {sys.executable} -c "
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), sys.exit(75)))
print('ready', flush=True)
time.sleep(20)"''')
  assert process.stdout.readline() == 'ready\n'
  process.terminate()
  assert process.wait(timeout=30) == 75


def test_kubectl_is_told_the_same(launch, programs, manifest, tmp_path):
  programs('kubectl', f'cat >{tmp_path}/in')
  done = launch('gke.sh', '--workdir=gs://b/r', IMAGE='me/it:1', NAME='mine')
  assert done.returncode == 0
  assert yaml.safe_load((tmp_path / 'in').read_text()) == manifest(
    '--workdir=gs://b/r', IMAGE='me/it:1', NAME='mine'
  )
  for action in ('--logs', '--delete'):
    printed = launch('gke.sh', '--dry-run', action, NAME='mine').stdout
    launch('gke.sh', action, NAME='mine')
    assert printed.split() == ['kubectl', *programs.calls('kubectl')[-1]]


@pytest.mark.parametrize(
  'arguments, settings, sentence',
  [
    ([], {}, 'no ARGS'),
    (['--x'], {}, 'IMAGE is not set'),
    (['--x'], {'TOPOLOGY': 'four'}, "TOPOLOGY is 'four'"),
    (['--x'], {'TOPOLOGY': '2x3'}, 'has 6 chips, no whole hosts of CHIPS=4'),
  ],
)
def test_wrong_settings_are_refused(launch, programs, arguments, settings, sentence):
  programs('kubectl')
  done = launch('gke.sh', *arguments, **settings)
  assert done.returncode == 2
  assert done.stderr.startswith('error: ') and sentence in done.stderr
  assert not programs.calls('kubectl')
