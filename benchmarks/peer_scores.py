"""Scores of names in transformers: per name, with a cache, and in one row.

The adapter is merged into the weights, and the head runs on nothing but the
positions that predict a token of a name.
"""

import numpy as np
import peers
import peft
import torch
import transformers


def _question(prompt, name):
  """A prompt and a name, whose last token predicts nothing, as a Sample."""
  where = len(prompt) - 1 + np.arange(len(name))
  return peers.Sample(np.concatenate([prompt, name[:-1]]), where, name)


class Scorer:
  """Log-probabilities of names after a prompt, with the adapter merged."""

  def __init__(self, folder, adapter, dtype):
    model = peft.PeftModel.from_pretrained(peers.load(folder, dtype), adapter)
    self.core = model.merge_and_unload().eval()

  def _log_p(self, hidden, answers):
    """log p of answers int64 [A] at hidden states [A, D]."""
    logits = self.core.lm_head(hidden).float()
    chosen = logits.gather(1, answers[:, None])[:, 0]
    return chosen - logits.logsumexp(1)

  @torch.inference_mode()
  def naive(self, prompt, names, rows):
    """float [Y]: one forward pass per name, `rows` of them in a batch."""
    scores = []
    for i in range(0, len(names), rows):
      chosen = names[i : i + rows]
      part = peers.pad([_question(prompt, name) for name in chosen])
      hidden = self.core.model(input_ids=part.tokens, use_cache=False).last_hidden_state
      log_p = self._log_p(hidden.flatten(0, 1)[part.where], part.answers)
      scores += [x.sum().item() for x in log_p.split(list(map(len, chosen)))]
    return np.array(scores)

  def _prompt(self, prompt, names):
    """log p of each name's first token, and the prompt's keys and values."""
    out = self.core.model(input_ids=peers.tensor(prompt)[None], use_cache=True)
    log_p = self.core.lm_head(out.last_hidden_state[0, -1]).float()
    first = peers.tensor([name[0] for name in names])
    return log_p.log_softmax(0)[first], out.past_key_values

  @torch.inference_mode()
  def cached(self, prompt, names, rows):
    """float [Y]: the prompt runs once; `rows` names are a padded batch."""
    scores, cache = self._prompt(prompt, names)
    memory = [(layer.keys, layer.values) for layer in cache.layers]
    long = [i for i, name in enumerate(names) if len(name) > 1]
    for i in range(0, len(long), rows):
      chosen = long[i : i + rows]
      scores[chosen] += self._rest(memory, [names[y] for y in chosen])
    return scores.numpy()

  def _rest(self, memory, names):
    """log p of all but each name's first token, one row per name."""
    cache = transformers.DynamicCache(config=self.core.config)
    for layer, (keys, values) in zip(cache.layers, memory, strict=True):
      layer.lazy_initialization(keys, values)
      # Views: appending the names' own keys copies them, and that once.
      layer.keys = keys.expand(len(names), -1, -1, -1)
      layer.values = values.expand(len(names), -1, -1, -1)
    part = peers.pad(
      [peers.Sample(name[:-1], np.arange(len(name) - 1), name[1:]) for name in names]
    )
    hidden = self.core.model(
      input_ids=part.tokens, use_cache=True, past_key_values=cache
    ).last_hidden_state
    log_p = self._log_p(hidden.flatten(0, 1)[part.where], part.answers)
    return torch.stack(
      [x.sum() for x in log_p.split([len(name) - 1 for name in names])]
    )

  @torch.inference_mode()
  def row(self, prompt, names, rows=None):
    """float [Y]: the prompt runs once, then all names side by side in a row.

    A mask made by hand keeps them apart, so nothing is padded and no key is
    copied. Faster than `cached`, but nothing that the libraries offer.
    """
    del rows
    scores, cache = self._prompt(prompt, names)
    sizes = [len(name) - 1 for name in names]
    owner = np.repeat(np.arange(len(names)), sizes)
    own = np.tril(owner[:, None] == owner)
    seen = np.ones((len(owner), len(prompt)), bool)
    positions = np.concatenate([np.arange(n) for n in sizes]) + len(prompt)
    tokens = np.concatenate([name[:-1] for name in names])
    hidden = self.core.model(
      input_ids=peers.tensor(tokens)[None],
      use_cache=True,
      attention_mask=torch.from_numpy(np.hstack([seen, own]))[None, None],
      position_ids=peers.tensor(positions)[None],
      past_key_values=cache,
    ).last_hidden_state[0]
    log_p = self._log_p(
      hidden, peers.tensor(np.concatenate([name[1:] for name in names]))
    )
    return scores.index_add(0, peers.tensor(owner), log_p).numpy()
