"""How a text of a log becomes a name, as SQL.

Names are composed (NFC), without control and zero-width characters, trimmed,
with one blank for any white space; 7.0 is 7. What spells nothing (`data.nulls`)
is no name. Names that differ by case alone stay apart.
"""

from collections.abc import Iterable

_WHITE = r'[\p{Z}\t-\r\x{1C}-\x{1F}\x{85}]+'
# Not all of Unicode's format characters: flags are spelled with some of them.
_HIDDEN = (
  r'[\p{Cc}\x{AD}\x{34F}\x{61C}\x{180E}\x{200B}-\x{200F}'
  r'\x{202A}-\x{202E}\x{2060}-\x{206F}\x{FEFF}]+'
)
# Most texts are printable ASCII with single blanks; looking first pays.
_PLAIN = r'[!-~]+(?: [!-~]+)*'
_WHOLE = r'^(-?(?:0|[1-9]\d*))\.0+$'  # not 007.0, which is a code


def macros(nulls: Iterable[str]) -> str:
  """SQL that makes the macros tidy(text), clean(text) and named(tidied).

  `tidy` composes and trims, `clean` also takes 7.0 for 7. `named` is `clean` of
  what is tidy already, and NULL for '' and for what `nulls` spell, in any case.
  """
  words = (word for null in nulls for word in str(null).split(','))
  spelled = ', '.join(
    "'" + word.strip().lower().replace("'", "''") + "'" for word in words
  )
  # White space first: tabs and line ends are control characters, too.
  # Cheap looks before expensive replacements: `_PLAIN`, ends_with and contains.
  return rf"""
      CREATE OR REPLACE MACRO tidy(text) AS
        CASE WHEN regexp_full_match(text, '{_PLAIN}') THEN text
        ELSE nfc_normalize(trim(regexp_replace(regexp_replace(regexp_replace(
          text, '{_WHITE}', ' ', 'g'), '{_HIDDEN}', '', 'g'),
          ' {{2,}}', ' ', 'g'))) END;
      CREATE OR REPLACE MACRO whole(text) AS
        CASE WHEN ends_with(text, '0') AND contains(text, '.0')
        THEN regexp_replace(text, '{_WHOLE}', '\1') ELSE text END;
      CREATE OR REPLACE MACRO clean(text) AS whole(tidy(text));
      CREATE OR REPLACE MACRO named(tidied) AS
        CASE WHEN tidied <> '' AND lower(tidied) NOT IN ({spelled or "''"})
        THEN whole(tidied) END;
  """
