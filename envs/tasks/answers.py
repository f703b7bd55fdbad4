"""The answer in a completion: the part of its text that counts, and the last number in it."""

import re
from collections import deque
from decimal import Decimal

_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)%$])[-\N{MINUS SIGN}])?\$?(?P<inner>(?<=\$)[-\N{MINUS SIGN}])?"  # -5, -$5, $-5; not the 7 of 10-7
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))"  # 1,234 or 1234 or none, as in .5
    r"(?P<fraction>\.[0-9]+)?"
)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def final_answer(completion: str) -> str:
    """Return the answer of a completion.

    The last <answer>...</answer>; without one, what follows the last </think>; without that, everything, or nothing
    if a <think> was never closed.
    """
    if tagged := _ANSWER.findall(completion):
        return tagged[-1].strip()
    thought, closed, answer = completion.rpartition("</think>")
    if not closed and "<think>" in completion:
        return ""
    return answer.strip()


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text, None without one.

    Commas group thousands; a sign counts where no word or number stands before it; "$" before and "%" after are ignored,
    and so is a period that ends a sentence.
    """
    number = next(iter(deque(_NUMBER.finditer(text), maxlen=1)), None)
    if number is None:
        return None
    digits = number["whole"].replace(",", "") + (number["fraction"] or "")
    return -Decimal(digits) if number["sign"] or number["inner"] else Decimal(digits)
