"""Our SASRec beside one in torch, both trained on the same log.

  python benchmarks/sasrec_peer.py --workdir=runs/nyc --seeds=0,1,2 \
    --config=configs/foursquare_nyc.py --config.sasrec.steps=1500

--workdir is any run's; of it only `events/` is read. The peer shares nothing
with evaluate.sasrec but sizes and what it is told: its layers, their first
weights, dropout and optimizer are torch's, its windows are cut here, user by
user. Each side is trained with every seed and kept as it was when it did best
on validation events; both then say all test events that have enough of a past.
Accuracy and mean log p of both should differ by little more than their seeds
do.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from absl import app, flags
from ml_collections import config_flags

from behaviorlm_jax.data import events as events_lib
from behaviorlm_jax.evaluate import sasrec as ours

_CHECKED = 2000  # Validation events of a check.


class Peer(torch.nn.Module):
  """Logits float32 [B, L, Y] of the behavior after each event."""

  def __init__(self, recipe, known):
    super().__init__()
    self.known, width = known, recipe.width
    self.tables = torch.nn.ModuleList(
      [torch.nn.Embedding(count, width) for count in (known + 1, recipe.history, 24, 7)]
    )
    for table in self.tables:
      torch.nn.init.normal_(table.weight, std=width**-0.5)
    self.layers = torch.nn.ModuleList(
      [
        torch.nn.TransformerEncoderLayer(
          width, recipe.heads, width, recipe.dropout, batch_first=True, norm_first=True
        )
        for _ in range(recipe.layers)
      ]
    )
    self.norm = torch.nn.LayerNorm(width)
    self.dropout = torch.nn.Dropout(recipe.dropout)

  def forward(self, *ids):
    """`ids`: behavior, place, hour and day int64 [B, L]. Windows are
    left-aligned, so what is padded comes last and no event sees it."""
    x = self.dropout(
      sum(table(part) for table, part in zip(self.tables, ids, strict=True))
    )
    mask = torch.nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    for layer in self.layers:
      x = layer(x, src_mask=mask, is_causal=True)
    return self.norm(x) @ self.tables[0].weight[: self.known].T


def cut(events, end, recipe):
  """behavior, place, hour, day and target int64 [L] of the window before `end`.

  Places count from the far end of a full window, as ours do. Targets are the
  next events of the training split; -1: none.
  """
  length = recipe.history
  begin = max(int(events.first[end]), end - length)
  row = np.zeros((5, length), np.int64)
  row[4] = -1
  for i, at in enumerate(range(begin, end)):
    seconds, following = int(events.time[at + 1]), int(events.behavior[at + 1])
    learned = (
      following < events.known and events_lib.SPLITS[events.split[at + 1]] == 'train'
    )
    row[:, i] = (
      min(int(events.behavior[at]), events.known),
      length - (end - at),
      seconds // 3600 % 24,
      seconds // 86400 % 7 if recipe.weekday else 0,
      following if learned else -1,
    )
  return row, end - begin - 1


def stack(events, ends, recipe):
  """The windows int64 [5, B, L], and where in each the last event stands."""
  rows, last = zip(*(cut(events, int(end), recipe) for end in ends), strict=True)
  return torch.tensor(np.stack(rows, axis=1)), torch.tensor(last)


def positions(events, split, recipe):
  place = np.arange(len(events.behavior)) - events.first
  return np.flatnonzero(
    (np.array(events_lib.SPLITS)[events.split] == split)
    & (np.asarray(events.behavior) < events.known)
    & (place >= recipe.min_context)
  )


def train(events, recipe):
  """A peer, as it was when it did best on validation events."""
  torch.manual_seed(recipe.seed)
  rng = np.random.default_rng(recipe.seed)
  model = Peer(recipe, events.known)
  optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate)
  learned, held = (
    positions(events, split, recipe) for split in ('train', 'validation')
  )
  held = rng.choice(held, min(len(held), _CHECKED), replace=False)
  best, kept = np.inf, None
  for step in range(1, recipe.steps + 1):
    model.train()
    rows, _ = stack(events, rng.choice(learned, recipe.batch), recipe)
    logits = model(*rows[:4])
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(
      logits.flatten(0, 1), rows[4].flatten(), ignore_index=-1
    ).backward()
    optimizer.step()
    if step % -(-recipe.steps // 10) == 0 or step == recipe.steps:
      loss = -scores(model, events, held, recipe)[1]
      if loss < best:
        best, kept = (
          loss,
          {name: value.clone() for name, value in model.state_dict().items()},
        )
  model.load_state_dict(kept)
  return model


@torch.no_grad()
def scores(model, events, ends, recipe):
  """Accuracy and mean log p of what happens at `ends`."""
  model.eval()
  found = []
  for part in np.array_split(ends, -(-len(ends) // 256)):
    rows, last = stack(events, part, recipe)
    logits = model(*rows[:4])[torch.arange(len(part)), last]
    found.append(torch.log_softmax(logits, -1).numpy())
  return _scores(np.concatenate(found), events, ends)


def _scores(log_p, events, ends):
  true = events.behavior[ends]
  return (
    float(np.mean(log_p.argmax(1) == true)),
    float(log_p[np.arange(len(ends)), true].mean()),
  )


def main(argv):
  del argv
  config = flags.FLAGS.config
  events = events_lib.open_events(Path(flags.FLAGS.workdir) / 'events')
  recipe = ours.Recipe(
    **config.sasrec,
    weekday=config.data.weekday,
    min_context=config.plan.min_context,
    seed=config.seed,
  )
  ends = positions(events, 'test', recipe)
  print(f'{len(ends)} test events, {recipe.steps} steps')
  found = {'ours': [], 'peer': []}
  for seed in map(int, flags.FLAGS.seeds):
    recipe = dataclasses.replace(recipe, seed=seed)
    model = ours.fit_model(events, recipe)
    found['ours'].append(
      _scores(ours.predict_log_p(model, events, ends, recipe), events, ends)
    )
    found['peer'].append(scores(train(events, recipe), events, ends, recipe))
    for side, values in found.items():
      print(
        f'seed {seed}, {side}: accuracy {values[-1][0]:.4f}, '
        f'mean log p {values[-1][1]:.4f}',
        flush=True,
      )
  for i, name in enumerate(('accuracy', 'mean log p')):
    one, other = (np.array(found[side])[:, i] for side in ('ours', 'peer'))
    print(
      f'{name}: ours {one.mean():.4f} (seeds apart {np.ptp(one):.4f}), '
      f'peer {other.mean():.4f} ({np.ptp(other):.4f}), '
      f'ours less the peer {one.mean() - other.mean():+.4f}'
    )


if __name__ == '__main__':  # Not where tests import it: they have such flags.
  config_flags.DEFINE_config_file('config', None, 'Config file.')
  flags.DEFINE_string('workdir', None, 'Of a run.')
  flags.DEFINE_list('seeds', ['0', '1', '2'], 'Of both sides.')
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main)
