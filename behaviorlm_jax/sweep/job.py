"""One run of a sweep."""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Job:
  log: str
  seed: int
  name: str  # Of the method.
  method: ConfigDict
  folder: Path
  config: ConfigDict  # Of the run, ablations applied.
  settings: str  # results.settings_hash.

  @property
  def key(self) -> tuple[str, str, int]:
    return self.log, self.name, self.seed

  @property
  def finished(self) -> bool:
    # Written last: folders of stages may be there before.
    path = self.folder / 'settings.txt'
    return path.exists() and path.read_text() == self.settings
