"""Logs of any kind, read from where they lie."""

import csv
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behaviorlm_jax.data import events


@pytest.fixture
def read(tmp_path, log_config):
  def read(address, **fields):
    """Events and summary of the log at an address, all of it for training."""
    folder = tmp_path / 'work' / 'events'
    shutil.rmtree(folder, ignore_errors=True)
    summary = events.prepare(log_config(split=(1, 0, 0), **fields), address, folder, 0)
    return events.open_events(folder), summary

  return read


@pytest.fixture
def rejected(tmp_path):
  def rows():
    """The malformed rows of the log that was read last."""
    with open(tmp_path / 'work/events/rejected.csv', newline='') as file:
      return list(csv.DictReader(file))

  return rows


@pytest.fixture
def write_parquet(tmp_path):
  def write(name='log.parquet', **columns):
    """The path of a Parquet file of these columns."""
    pq.write_table(pa.table(columns), tmp_path / name)
    return tmp_path / name

  return write
