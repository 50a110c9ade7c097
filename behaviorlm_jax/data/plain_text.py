"""Text of a log as tokens: all of it is text, none of it a control token.

A tokenizer looks for its added tokens in any text, so a behavior that is named
'<|im_end|>' would end the turn. Here they are not looked for, whether they are
called special or not ('<think>' is not): such a name is written with the tokens
of its letters. Text without them has the tokens it always has. For that, added
tokens that are ordinary text stay: runs of blanks and single letters, without
which some models have never seen a word.
"""

from typing import TYPE_CHECKING

import numpy as np
import tokenizers

from behaviorlm_jax.errors import InputError

if TYPE_CHECKING:  # It takes seconds to import, and a dry run needs none of it.
  from transformers import PreTrainedTokenizerFast

# Control tokens that are not called special are told from text by these.
_BRACKETS = frozenset('<>[]{}|')


class PlainText:
  """Encodes text of a log with the vocabulary of a tokenizer."""

  def __init__(self, tokenizer: 'PreTrainedTokenizerFast'):
    """`tokenizer`: a transformers tokenizer, which stays as it is."""
    backend = tokenizer.backend_tokenizer
    # The same vocabulary, not a copy; no post-processor, so nothing is added.
    self._tokenizer = tokenizers.Tokenizer(backend.model)
    self._tokenizer.normalizer = backend.normalizer
    self._tokenizer.pre_tokenizer = backend.pre_tokenizer
    self._controls = {}
    # In the order of their ids all get the ids that they have, so none is left
    # out: what is not to be found is called special, and those are passed over.
    added = sorted(backend.get_added_tokens_decoder().items())
    for number, token in added:
      if token.special or _BRACKETS & set(token.content):
        token.special = True
        self._controls[number] = token.content
    self._tokenizer.add_tokens([token for _, token in added])
    self._tokenizer.encode_special_tokens = True  # As text: see the module.

  def encode(self, text: str, whose: str) -> np.ndarray:
    """Token ids int32 [n] of `text`; `whose` is for the error: "behavior 'Gym'".

    Raises InputError if a control token also stands in the vocabulary as text.
    """
    ids = self._tokenizer.encode(text, add_special_tokens=False).ids
    found = self._controls.keys() & ids
    if found:
      raise InputError(
        f'data.events: the {whose} cannot be written in the tokenizer of '
        f'model.address without its control token '
        f'{self._controls[min(found)]!r}; rename it in the log.'
      )
    return np.asarray(ids, np.int32)
