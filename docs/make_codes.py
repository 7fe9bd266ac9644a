"""Writes the table of the proof's rejections in docs/data.md: each code with what to do about it.

python docs/make_codes.py
"""

import re
from pathlib import Path

from preceptor.data.examples import ADVICE

PAGE = Path(__file__).parent / "data.md"
TABLE = re.compile(r"(?<=<!-- codes of the proof -->\n).*?(?=<!-- end -->)", re.DOTALL)


def table() -> str:
    rows = [f"| `{code}` | {advice} |" for code, advice in ADVICE.items()]
    return "\n".join(["", "| code | |", "|---|---|", *rows, "", ""])


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
