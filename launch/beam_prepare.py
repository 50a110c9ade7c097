"""Prepares the shards of a large log with Apache Beam: on Dataflow, or locally.

  python launch/beam_prepare.py --shards=64 --config=configs/stage1.py \
    --workdir=gs://BUCKET/RUN --config.data.events=gs://BUCKET/log.parquet \
    --runner=DataflowRunner --project=P --region=R \
    --temp_location=gs://BUCKET/tmp --sdk_container_image=IMAGE

Every element is one task of `--config.data.shard=i/n`, run as a command of its
own on a worker, which needs this project: an image that has it and Beam. Flags
that begin with --config, and --workdir, go to that command, all others to Beam;
write them with =, as above.
"""

import argparse
import subprocess
import sys


def prepare(index, count, flags):
  """Prepares one shard; returns its name."""
  name = f'{index}/{count}'
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'behaviorlm_jax.main',
      *flags,
      f'--config.data.shard={name}',
    ],
    stderr=subprocess.PIPE,
    text=True,
    check=False,
  )
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ['it said nothing']
    raise RuntimeError(
      f'shard {name} ended with exit code {done.returncode}: {lines[-1]}'
    )
  return name


def main(argv=None):
  import apache_beam as beam  # Here, so that tests do without.
  from apache_beam.options.pipeline_options import PipelineOptions

  parser = argparse.ArgumentParser(allow_abbrev=False)
  parser.add_argument('--shards', type=int, required=True)
  known, rest = parser.parse_known_args(argv)
  flags = [flag for flag in rest if flag.startswith(('--config', '--workdir='))]
  rest = [flag for flag in rest if flag not in flags]
  options = PipelineOptions(rest, save_main_session=True)
  with beam.Pipeline(options=options) as pipeline:
    _ = (
      pipeline
      | beam.Create(range(known.shards))
      | beam.Reshuffle()  # Or one worker would get them all.
      | beam.Map(prepare, known.shards, flags)
    )


if __name__ == '__main__':
  main()
