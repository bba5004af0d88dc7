"""Text for a terminal: what would steer it is shown instead of obeyed.

Names and words of a file are whatever somebody wrote into it: an escape sequence can clear a line, set a title or turn
the reading order around, so that a terminal shows another verdict than the one that was printed.
"""

from __future__ import annotations

import re

_STEERING = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # C0, DEL, C1
    "\u00ad\u200b\ufeff"  # takes no room
    "\u061c\u200e\u200f\u202a-\u202e\u2060-\u206f"  # order of reading, and more that takes no room
    "\u2028\u2029"  # separators of lines and paragraphs
    "\ufff9-\ufffb\U000e0000-\U000e007f"  # annotations and tags
    "\ud800-\udfff"  # halves of a pair, which no encoding takes
    "]"
)


def visible(text: str, keep: str = "\n\t") -> str:
    """The text with control characters written out, as in ``\\x1b``; what is in ``keep`` stays.

    Steering characters are those of C0 and C1, DEL, marks that change the order of reading or take no room, separators
    of lines and paragraphs, and lone surrogates.
    """
    return _STEERING.sub(lambda m: m[0] if m[0] in keep else m[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """The text as :func:`visible` shows it, its lines joined by blanks."""
    return visible(" ".join(line.strip() for line in text.split("\n")), keep="")


__all__ = ["one_line", "visible"]
