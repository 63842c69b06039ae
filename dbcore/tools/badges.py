"""Tell the notebooks where the project lives: `python -m dbcore.tools.badges owner/name`, or `make
badges REPO=...`.

Writes the link of every "Open in Colab" badge, and DBCORE_REPO in every set-up cell: a notebook
that is opened without the project beside it then fetches it from there.
"""

import argparse
import re
from pathlib import Path

from dbcore.utils.errors import InputError

NOTEBOOKS = Path("notebooks")
BADGE = re.compile(r"\]\(https://colab\.research\.google\.com/(?!assets/)[^)]*\)")
# in the file, quotes of the source are escaped
ADDRESS = re.compile(r'DBCORE_REPO = \\"[^"\\]*\\"')


def write_address(path: Path, repository: str, branch: str = "main") -> None:
    """Rewrite one notebook for `repository` = "owner/name" on GitHub.

    Raises InputError if there is no place for it.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(f"REPO is {repository!r}: give it as owner/name")
    text = path.read_text(encoding="utf-8")
    colab = f"](https://colab.research.google.com/github/{repository}/blob/{branch}/notebooks/{path.name})"
    source = f"https://github.com/{repository}/archive/{branch}.zip"  # pip fetches it without git
    text, badges = BADGE.subn(colab, text)
    text, addresses = ADDRESS.subn(rf'DBCORE_REPO = \\"{source}\\"', text)
    if not badges or addresses != 1:
        raise InputError(f"{path}: {badges} Colab badges and {addresses} DBCORE_REPO; "
                         "it needs a badge and one address")
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="write where the project lives "
                                     "into every notebook")
    parser.add_argument("repository", help="owner/name on GitHub")
    parser.add_argument("--branch", default="main",
                        help="the branch that people open (%(default)s)")
    options = parser.parse_args()
    for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")):
        write_address(path, options.repository, options.branch)
        print(path)


if __name__ == "__main__":
    main()
