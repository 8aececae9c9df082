"""Makes the relative links and pictures of a Markdown page absolute, in place.

    python .github/absolute_links.py README.md REPOSITORY COMMIT

REPOSITORY is the address of the repository. Links lead to its files as they are at COMMIT, so that the page of a
version shows what belongs to that version.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_FENCED = re.compile(r"^( *)(`{3,}|~{3,}).*?^\1\2 *$", re.M | re.S)
_LINK = re.compile(r"(\]\(|\b(?:src|href)=\")(?![a-z][a-z0-9+.-]*:|#|/)([^)\s\"]+)", re.I)
_PICTURES = (".gif", ".jpg", ".jpeg", ".png", ".svg")


def absolute(text: str, repository: str, commit: str) -> str:
    """Returns the page with absolute links; blocks of code stay as they are."""

    def link(found: re.Match[str]) -> str:
        kind = "raw" if found[2].lower().endswith(_PICTURES) else "blob"
        return f"{found[1]}{repository}/{kind}/{commit}/{found[2].removeprefix('./')}"

    parts, end = [], 0
    for block in _FENCED.finditer(text):
        parts += [_LINK.sub(link, text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, _LINK.sub(link, text[end:])])


if __name__ == "__main__":
    page, repository, commit = sys.argv[1:]
    Path(page).write_text(absolute(Path(page).read_text(), repository, commit))
