"""What a person reads is one line of plain text, whatever it quotes."""

import os
import subprocess
import sys

import pytest

from cvx_deploy.terminal import reason, safe, safe_lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("two\nlines\r", "two\\nlines\\r"),
        ("\x9b\u202e\u2028", "\\x9b\\u202e\\u2028"),
        (os.fsdecode(b"\xff"), "\\udcff"),
        ("видео 视频 é 👨\u200d👩", "видео 视频 é 👨\u200d👩"),
    ],
)
def test_what_would_steer_a_terminal_is_escaped_and_text_is_not(text: str, shown: str) -> None:
    assert safe(text) == shown


def test_a_long_quote_is_cut_in_the_middle() -> None:
    told = safe("begin" + "\x1b" * 10**6 + "end", 100)
    assert len(told) == 100
    assert told.startswith("begin")
    assert told.endswith("end")
    assert safe("x" * 100, 100) == "x" * 100  # what just fits is not


def test_lines_stay_lines_and_are_not_cut() -> None:
    assert safe_lines("a\x1b\n" + "b" * 5000) == "a\\x1b\n" + "b" * 5000


def test_a_reason_is_one_line_and_never_empty() -> None:
    assert reason(ValueError("a\n   b")) == "a b"
    assert reason(ValueError()) == "ValueError"
    assert len(reason(ValueError("x" * 10**7))) == 300


def test_what_a_library_prints_by_itself_is_not_seen_and_what_follows_is() -> None:
    program = "import os; from cvx_deploy.terminal import no_foreign_lines\n"
    program += "with no_foreign_lines(): os.write(2, b'noise')\nos.write(2, b'after')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stderr == b"after"
