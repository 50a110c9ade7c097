"""Prepares the shards of a large log with Apache Beam: on Dataflow, or locally.

  python launch/beam_prepare.py --shards=64 --log=gs://bucket/log.parquet \
    --workdir=gs://bucket/run --config=configs/stage1.py \
    --config.data.columns.user=user_id \
    --runner=DataflowRunner --project=P --region=R \
    --temp_location=gs://bucket/tmp --sdk_container_image=IMAGE

Every element is one task of `--config.data.shard=i/n`, run as a command of its
own on a worker. Flags that begin with --config go to that command, all others
but the three above to Beam. What has a scheme (gs://) is copied from and to by
Beam. Needs `pip install apache-beam[gcp]` beside this project, on the workers
too: an image that has both.

A task that is run again writes the same bytes. config.json comes last: a shard
without it is refused when the shards are joined.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import apache_beam as beam
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

_LAST = 'config.json'
# The bytes as they are: Beam would unpack what is called .gz.
_AS_IS = {'compression_type': CompressionTypes.UNCOMPRESSED}


def prepare(index, count, log, workdir, flags):
  """Prepares one shard, copies it to the work directory, returns its name."""
  name = f'{index}-of-{count}'
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    if '://' in log:
      log, source = str(folder / os.path.basename(log)), log
      with FileSystems.open(source, **_AS_IS) as one, open(log, 'wb') as other:
        shutil.copyfileobj(one, other, 1 << 20)
    command = [sys.executable, '-m', 'behaviorlm_jax.main', *flags,
               f'--workdir={folder / "work"}', f'--config.data.events={log}',
               f'--config.data.shard={index}/{count}']
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True,
                          check=False)
    if done.returncode:
      lines = done.stderr.strip().splitlines() or ['it said nothing']
      raise RuntimeError(f'shard {index}/{count} ended with exit code '
                         f'{done.returncode}: {lines[-1]}')
    files = (folder / 'work' / 'events.shards' / name).iterdir()
    for path in sorted(files, key=lambda path: (path.name == _LAST, path)):
      target = FileSystems.join(workdir, 'events.shards', name, path.name)
      with open(path, 'rb') as one, FileSystems.create(
          target, **_AS_IS) as other:
        shutil.copyfileobj(one, other, 1 << 20)
  return name


def main(argv=None):
  parser = argparse.ArgumentParser(allow_abbrev=False)
  parser.add_argument('--shards', type=int, required=True)
  parser.add_argument('--log', required=True)
  parser.add_argument('--workdir', required=True)
  known, rest = parser.parse_known_args(argv)
  flags = [flag for flag in rest if flag.startswith('--config')]
  rest = [flag for flag in rest if flag not in flags]
  options = PipelineOptions(rest, save_main_session=True)
  with beam.Pipeline(options=options) as pipeline:
    _ = (pipeline | beam.Create(range(known.shards))
         | beam.Reshuffle()  # Or one worker would get them all.
         | beam.Map(prepare, known.shards, known.log, known.workdir, flags))


if __name__ == '__main__':
  main()
