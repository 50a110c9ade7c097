"""The HTML of a report: escaped, sortable, and closed to other scripts."""

import base64
import hashlib
import re

from behaviorlm_jax.report import page
from behaviorlm_jax.report.blocks import (
  Details,
  Figure,
  Heading,
  Listing,
  Strong,
  Table,
  Text,
)

ATTACK = '<script>alert(1)</script>" onload="x'


def body(blocks, folder=None, title='t'):
  text = page.html(title, blocks, folder)
  return text[text.index('<body>') : text.rindex('<script>')]


def test_every_kind_of_block_escapes_its_text(tmp_path):
  (tmp_path / 'f.png').write_bytes(b'png')
  text = body(
    [
      Heading(1, ATTACK),
      Text(ATTACK, Strong(ATTACK)),
      Listing(ATTACK),
      Table((ATTACK,), [(ATTACK,), (ATTACK,)], ATTACK),
      Figure('f.png', ATTACK, ATTACK, ATTACK),
      Details(ATTACK, [Text(ATTACK)]),
    ],
    tmp_path,
  )
  assert text.count('&lt;script&gt;alert(1)&lt;/script&gt;') == 13
  assert '<script' not in text and '" onload' not in text
  assert '<title>&lt;script' in page.html(ATTACK, [], tmp_path)


def test_numbers_carry_what_they_sort_by():
  text = body([Table(('name', 'n', 'p'), [('a', 12345, 0.12345), ('b', None, -2.0)])])
  assert '<th scope="col">name</th>' in text
  assert '<th scope="col" class="number">n</th>' in text
  assert '<td class="number" data-value="12345">12,345</td>' in text
  assert '<td class="number" data-value="0.12345">0.123</td>' in text
  assert '<td class="number" data-value="">-</td>' in text
  assert '<th scope="row">a</th>' in text


def test_a_table_of_one_row_does_not_offer_to_sort():
  assert 'class="sorts"' not in body([Table(('a',), [(1,)])])
  assert 'class="sorts"' in body([Table(('a',), [(1,), (2,)])])


def test_images_travel_inside_and_stand_side_by_side(tmp_path):
  (tmp_path / 'f.png').write_bytes(b'\x89PNG data')
  figure = Figure('f.png', 'Title', 'Caption', 'What one sees')
  text = body([figure, figure, Text('between'), figure], tmp_path)
  assert text.count('<div class="figures">') == 2
  data = base64.b64encode(b'\x89PNG data').decode()
  assert (
    text.count(f'<img alt="What one sees" src="data:image/png;base64,{data}">') == 3
  )


def test_policy_allows_exactly_the_script_and_style_of_the_page():
  text = page.html('t', [], None)
  policy = re.search('http-equiv="Content-Security-Policy" content="(.*?)"', text)[1]
  assert "default-src 'none'" in policy and 'unsafe' not in policy
  for tag in ('script', 'style'):
    inside = re.search(f'<{tag}>(.*?)</{tag}>', text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(inside.encode()).digest())
    assert f"{tag}-src 'sha256-{digest.decode()}'" in policy
