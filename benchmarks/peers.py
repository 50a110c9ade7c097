"""The other side: the same model in transformers and PEFT, on torch.

Every choice that a user of these libraries has is a setting here, and the
benchmarks report the fastest. Both sides read the same weights and the same
adapter, run only what is needed (no logits but those of answers), and torch
gets all cores. Sequences are padded on the right, so causal attention needs no
mask and torch may take its fastest kernel.
"""

import contextlib
import dataclasses

import common
import numpy as np
import peft
import torch
import transformers

DTYPES = {'bfloat16': torch.bfloat16, 'float32': torch.float32}


@dataclasses.dataclass(frozen=True)
class Setting:
  """How torch trains.

  Attributes:
    dtype: of the base weights.
    adapter: 'float32' (PEFT's default), 'bfloat16', or 'autocast': float32
      weights whose products are cast to bfloat16.
    layout: 'packed' rows as ours, one 'padded' batch, or 'sorted': batches of
      similar lengths, their gradients summed.
  """

  dtype: str
  adapter: str
  layout: str

  def __str__(self):
    return f'{self.dtype}, adapter {self.adapter}, {self.layout}'


@dataclasses.dataclass(frozen=True)
class Sample:
  """One sequence: hidden states at `where` predict `answers`."""

  tokens: np.ndarray
  where: np.ndarray
  answers: np.ndarray


@dataclasses.dataclass(frozen=True)
class Part:
  """What runs in one forward pass."""

  tokens: torch.Tensor  # int64 [B, L].
  positions: torch.Tensor | None  # int64 [B, L] of packed rows.
  where: torch.Tensor  # int64 [A], into the flattened [B * L].
  answers: torch.Tensor  # int64 [A].


def tensor(x):
  return torch.from_numpy(np.asarray(x, np.int64))


def unpack(batch):
  """The Samples of a loader's batch."""
  samples = []
  for row in range(len(batch['tokens'])):
    segments = batch['segments'][row]
    real = batch['answer_weights'][row] > 0
    assert (batch['answer_weights'][row][real] == 1).all()
    at = batch['answer_positions'][row][real]
    for number in range(1, segments.max() + 1):
      inside = np.flatnonzero(segments == number)
      mine = segments[at] == number
      samples.append(
        Sample(
          batch['tokens'][row][inside],
          at[mine] - inside[0],
          batch['answer_tokens'][row][real][mine],
        )
      )
  return samples


def pack(batch):
  """A loader's batch as one Part; transformers tells segments by positions."""
  real = batch['answer_weights'] > 0
  length = batch['tokens'].shape[1]
  flat = batch['answer_positions'] + length * np.arange(len(real))[:, None]
  return Part(
    tensor(batch['tokens']),
    tensor(batch['positions']),
    tensor(flat[real]),
    tensor(batch['answer_tokens'][real]),
  )


def pad(samples):
  """Some Samples as one Part, filled up on the right."""
  length = max(len(s.tokens) for s in samples)
  tokens = np.zeros((len(samples), length), np.int64)
  for row, sample in enumerate(samples):
    tokens[row, : len(sample.tokens)] = sample.tokens
  where = np.concatenate([s.where + i * length for i, s in enumerate(samples)])
  return Part(
    torch.from_numpy(tokens),
    None,
    tensor(where),
    tensor(np.concatenate([s.answers for s in samples])),
  )


def by_length(samples, waste=0.1):
  """Groups of similar lengths: at most this share of each is padding."""
  groups = []
  for sample in sorted(samples, key=lambda s: -len(s.tokens)):
    group = [*groups[-1], sample] if groups else [sample]
    used = sum(len(s.tokens) for s in group)
    if groups and used >= (1 - waste) * len(group) * len(group[0].tokens):
      groups[-1] = group
    else:
      groups.append([sample])
  return groups


def parts(batch, layout):
  if layout == 'packed':
    return [pack(batch)]
  samples = unpack(batch)
  groups = [samples] if layout == 'padded' else by_length(samples)
  return [pad(group) for group in groups]


def load(folder, dtype):
  torch.set_num_threads(common.THREADS)
  transformers.utils.logging.disable_progress_bar()
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=DTYPES[dtype], attn_implementation='sdpa'
  )


class Trainer:
  """LoRA with AdamW and clipping, logits of answers alone."""

  def __init__(self, folder, adapter, setting, learning_rate):
    model = peft.PeftModel.from_pretrained(
      load(folder, setting.dtype),
      adapter,
      is_trainable=True,
      autocast_adapter_dtype=setting.adapter != 'bfloat16',
    )
    self.core = model.train().get_base_model()
    self.trained = [p for p in model.parameters() if p.requires_grad]
    self.optimizer = torch.optim.AdamW(
      self.trained, learning_rate, weight_decay=0.0, fused=True
    )
    self.cast = contextlib.nullcontext()
    if setting.adapter == 'autocast':
      self.cast = torch.autocast('cpu', torch.bfloat16)

  def loss(self, part):
    """Sum of the negative log-likelihoods of a Part's answers."""
    with self.cast:
      hidden = self.core.model(
        input_ids=part.tokens, use_cache=False, position_ids=part.positions
      ).last_hidden_state
      logits = self.core.lm_head(hidden.flatten(0, 1)[part.where])
    return torch.nn.functional.cross_entropy(
      logits.float(), part.answers, reduction='sum'
    )

  def step(self, batch):
    """Updates the adapter on some Parts; returns mean loss, gradient norm."""
    total, weight = 0.0, sum(len(part.answers) for part in batch)
    for part in batch:
      loss = self.loss(part) / weight
      loss.backward()
      total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
    self.optimizer.step()
    self.optimizer.zero_grad()
    return total, norm.item()


def limit(dtype, n=3072):
  """GFLOP/s of a large matrix product in torch."""
  torch.set_num_threads(common.THREADS)
  x = torch.ones((n, n), dtype=DTYPES[dtype])
  return common.best_rate(lambda: x @ x.T, n)
