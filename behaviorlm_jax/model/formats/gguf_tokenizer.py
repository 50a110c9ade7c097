"""The tokenizer of a GGUF file, in the format of Hugging Face.

llama.cpp's pre-tokenizer is a name (`tokenizer.ggml.pre`), not a rule: the
rules stand here, and an unknown name is refused rather than guessed. `fields`
is the metadata of the file, by key.
"""

from pathlib import Path

import tokenizers
from absl import logging
from tokenizers import decoders, models, pre_tokenizers, processors

from behaviorlm_jax.errors import InputError
from behaviorlm_jax.model.formats import gguf_file

_CONTROL, _USER_DEFINED = 3, 4  # token types

# The split of Llama 3's own tokenizer.json.
_LLAMA_3_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def build_tokenizer(fields: dict, path: Path) -> tokenizers.Tokenizer:
  """Byte-level BPE; control and user-defined tokens encode as one id."""
  get = lambda key: fields.get(f'tokenizer.ggml.{key}')
  if get('model') != 'gpt2' or not get('tokens') or get('merges') is None:
    raise InputError(
      f'model.address: {path} has a tokenizer of the kind {get("model")!r}; '
      "supported is 'gpt2' (byte-level BPE) with its tokens and merges."
    )
  tokens, pre = get('tokens'), get('pre') or 'default'
  vocab = {token: index for index, token in enumerate(tokens)}
  merges = [_merge(merge, vocab, path) for merge in get('merges')]
  # Llama 3 takes a whole piece that is in the vocabulary without merging.
  bpe = models.BPE(vocab, merges, ignore_merges=pre == 'llama-bpe')
  tokenizer = tokenizers.Tokenizer(bpe)
  tokenizer.pre_tokenizer = _pre_tokenizer(pre, path)
  tokenizer.decoder = decoders.ByteLevel()
  types = get('token_type') or [1] * len(tokens)
  for token, kind in zip(tokens, types, strict=False):
    if kind in (_CONTROL, _USER_DEFINED):
      special = kind == _CONTROL
      added = tokenizers.AddedToken(token, special=special, normalized=False)
      (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
  _add_bos(tokenizer, fields, pre == 'llama-bpe')
  return tokenizer


def tokenizer_config(fields: dict) -> dict:
  """Names of the special tokens, as transformers reads them."""
  result = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    'model_max_length': fields.get('llama.context_length'),
  }
  names = {'bos': 'bos', 'eos': 'eos', 'unknown': 'unk', 'padding': 'pad'}
  for theirs, name in names.items():
    if token := _special(fields, theirs):
      result[f'{name}_token'] = token
  return result


def _pre_tokenizer(name: str, path: Path) -> pre_tokenizers.PreTokenizer:
  # What comes before the split into bytes.
  first = {
    # The blank before a number is a token of its own.
    'smollm': pre_tokenizers.Digits(individual_digits=True),
    'llama-bpe': pre_tokenizers.Split(
      tokenizers.Regex(_LLAMA_3_SPLIT), behavior='isolated'
    ),
    'gpt-2': None,
    'default': None,
  }
  if name not in first:
    raise InputError(
      f'model.address: {path} has the pre-tokenizer {name!r}; supported are '
      "'smollm', 'llama-bpe', 'gpt-2' and 'default'."
    )
  if name == 'default':
    logging.warning('%s names no pre-tokenizer; that of GPT-2 is used.', path)
  # The regex is GPT-2's.
  byte_level = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=name != 'llama-bpe'
  )
  if first[name] is None:
    return byte_level
  return pre_tokenizers.Sequence([first[name], byte_level])


def _merge(merge: str, vocab: dict, path: Path) -> tuple[str, str]:
  left, _, right = merge.partition(' ')
  if not {left, right, left + right} <= vocab.keys():
    raise gguf_file.corrupt(path, f'its merge {merge!r} is not made of its tokens')
  return left, right


def _special(fields: dict, name: str) -> str | None:
  tokens = fields['tokenizer.ggml.tokens']
  index = fields.get(f'tokenizer.ggml.{name}_token_id')
  return tokens[index] if index is not None and index < len(tokens) else None


def _add_bos(tokenizer: tokenizers.Tokenizer, fields: dict, usual: bool) -> None:
  """Lets every text begin with the begin token, where the model wants that."""
  bos = _special(fields, 'bos')
  wanted = fields.get('tokenizer.ggml.add_bos_token')
  # llama.cpp, too, begins texts of Llama 3 with it where a file does not say.
  if bos is not None and (usual if wanted is None else wanted):
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f'{bos} $A',
      pair=f'{bos} $A {bos}:1 $B:1',
      special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
