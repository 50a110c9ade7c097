"""The house: imports go one way."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / 'behaviorlm_jax'
# Each may import from those before it, and from itself.
LAYERS = (
  ('errors', 'seeds'),
  ('config',),
  ('ablations',),
  ('io',),
  ('cluster',),
  ('data', 'model'),
  ('train', 'score'),
  ('evaluate',),
  ('report',),
  ('setup',),
  ('measure',),
  ('estimate',),
  ('curriculum',),
  ('run',),
  ('sweep', 'cost'),
  ('cli',),
  ('main', 'aot', 'inspect', 'sweep.__main__'),
)
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def room(module):
  """The part of LAYERS that a dotted module belongs to."""
  return module if module in RANK else module.split('.')[0]


def imports(path):
  """Modules below the package that a file imports, dotted."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (
      (node.module or '').split('.')[0] == PACKAGE.name
    ):
      inside = node.module.split('.')[1:]
      for alias in node.names:
        yield '.'.join([*inside, alias.name])


def test_imports_go_one_way():
  wrong = []
  for path in sorted(PACKAGE.rglob('*.py')):
    module = '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)
    if module == '__init__':
      continue
    for other in imports(path):
      mine, theirs = room(module), room(other)
      if RANK[theirs] >= RANK[mine] and theirs != mine:
        wrong.append(f'{module} imports {other}')
  assert not wrong


def test_no_jax_where_logs_become_plans():
  for path in (PACKAGE / 'data').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      names = (
        [alias.name for alias in node.names]
        if isinstance(node, ast.Import)
        else [node.module or '']
        if isinstance(node, ast.ImportFrom)
        else []
      )
      assert not any(name.split('.')[0] == 'jax' for name in names), path
