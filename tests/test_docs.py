"""The docs: links lead somewhere, and commands name what there is.

Commands are those of fenced code blocks, joined over backslashes. The notebook
is history: of docs/results only the links are checked.
"""

import functools
import re
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags, ConfigDict

from behaviorlm_jax import config as config_lib

ROOT = Path(__file__).parents[1]
PAGES = (
  ROOT / 'README.md',
  ROOT / 'CONTRIBUTING.md',
  *sorted(ROOT.glob('docs/*.md')),
  *sorted(ROOT.glob('launch/*.md')),
  ROOT / 'benchmarks/README.md',
)
HISTORY = tuple(sorted(ROOT.glob('docs/results/**/*.md')))
FENCE = re.compile(r'^```.*?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
FILE = re.compile(r'(?<![\w./:-])(?:benchmarks|configs|docs|launch|tests)/[\w./-]*\w')
MODULE = re.compile(r'-m behaviorlm_jax\.([\w.]+)')
FLAG = re.compile(r'--config(?:\.[\w.]+)?=\S+')
WORD = re.compile(r'`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`')  # `a.steps=9`
SUFFIXES = ('csv', 'html', 'json', 'jsonl', 'md', 'parquet', 'py', 'txt')


def name_of(page):
  return str(page.relative_to(ROOT))


def prose(page):
  """A page without its code blocks."""
  return FENCE.sub('', page.read_text(encoding='utf-8'))


def commands():
  """(page, line) of code blocks, lines that end with a backslash joined."""
  for page in PAGES:
    for block in FENCE.findall(page.read_text(encoding='utf-8')):
      for line in re.sub(r'\\\n\s*', ' ', block).splitlines():
        yield name_of(page), line


# Links.


def slug(heading):
  """The anchor that GitHub gives to a heading."""
  text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading).replace('`', '')
  return re.sub(r'[^\w\- ]', '', text.strip().lower()).replace(' ', '-')


@functools.cache
def anchors(page):
  return {slug(text) for text in re.findall(r'^#+ (.*)$', prose(page), re.MULTILINE)}


@pytest.mark.parametrize('page', [*PAGES, *HISTORY], ids=name_of)
def test_links_lead_somewhere(page):
  broken = []
  for link in re.findall(r'\]\(([^)\s]+)\)', prose(page)):
    if re.match(r'\w+:', link):
      continue
    path, _, anchor = link.partition('#')
    target = (page.parent / path).resolve() if path else page
    if not target.exists() or (anchor and anchor not in anchors(target)):
      broken.append(link)
  assert not broken


def test_anchors_are_those_of_github():
  assert slug('Does it work?') == 'does-it-work'
  assert slug('Several devices, `several` hosts') == 'several-devices-several-hosts'


# Commands.


def read_flags(line):
  """The config that the --config flags of a command give."""
  # What is left of a quoted command's end.
  found = [re.sub(r"'\)?$", '', flag) for flag in FLAG.findall(line)]
  files = [flag for flag in found if flag.startswith('--config=')]
  fields = [flag for flag in found if flag not in files]
  argv = ['command', *(files or ['--config=configs/stage1.py']), *fields]
  argv[1] = argv[1].replace('=', f'={ROOT}/', 1)
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
  values(argv)
  return values.config


CONFIGURED = sorted({line for _, line in commands() if FLAG.search(line)})


def test_there_are_commands_to_check():
  assert len(CONFIGURED) > 20


@pytest.mark.parametrize('line', CONFIGURED, ids=lambda line: line.strip()[:60])
def test_a_command_has_a_config_file_and_its_fields(line):
  assert isinstance(read_flags(line), ConfigDict)


def test_modules_that_commands_run_exist():
  package = ROOT / 'behaviorlm_jax'
  missing = [
    (page, module)
    for page, line in commands()
    for module in MODULE.findall(line)
    if not (package / f'{module.replace(".", "/")}.py').exists()
    and not (package / module.replace('.', '/') / '__main__.py').exists()
  ]
  assert not missing


def test_files_that_commands_name_exist():
  missing = [
    (page, path)
    for page, line in commands()
    for path in FILE.findall(line)
    if not (ROOT / path).exists()
  ]
  assert not missing


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_fields_that_are_spoken_of_exist(page):
  """`section.field` in the text, of the config's sections."""
  names = list(config_lib.FIELDS)
  known = {'.'.join(name.split('.')[:i]) for name in names for i in range(1, 4)}
  sections = {name.split('.')[0] for name in names if '.' in name} | {'a', 'b'}
  assert not [
    word
    for word in WORD.findall(prose(page))
    if word.split('.')[0] in sections
    and word.split('.')[-1] not in SUFFIXES
    and word not in known
  ]
