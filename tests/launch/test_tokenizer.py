"""The command that trains a tokenizer, as a user starts it."""

import re
import subprocess
import sys

import pytest

from jaxlm.data.tokenizers import load_tokenizer
from tests.data import samples
from tests.marks import slow_but


def run(*flags):
    command = [sys.executable, "-m", "launch.tokenizer", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_writes_a_tokenizer_and_says_how_to_use_it(tmp_path):
    text = samples.training_text()
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_bytes(samples.jsonl_bytes([text], field="content"))
    output = tmp_path / "new" / "mine.json"
    result = run(
        f"--sources={tmp_path}/a.txt,{tmp_path}/*.jsonl",
        "--text_field=content",
        "--vocab_size=500",
        f"--output={output}",
    )
    assert result.returncode == 0, result.stderr
    tokenizer = load_tokenizer(str(output))
    assert tokenizer.vocab_size == 500
    said = re.fullmatch(
        r"(\S+): (\d+) ids, (\d\.\d\d) bytes per token; use it with "
        r"--config\.data\.tokenizer=(\S+)\n",
        result.stdout,
    )
    assert said[1] == said[4] == str(output)
    assert said[2] == "500"
    each = len(text.encode()) / len(tokenizer.encode(text))
    assert float(said[3]) == pytest.approx(each, abs=0.006)  # two decimals
    before = output.read_bytes()
    again = run("--sources=builtin:austen", f"--output={output}")
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == f"error: output={str(output)!r} is there already; allowed: a new file\n"
    assert output.read_bytes() == before


# What is wrong, and what the error says.
ERRORS = [
    (["--sources=no.txt"], "source 'no.txt': no such file; allowed: a path, a glob"),
    (["--vocab_size=100"], "vocab_size=100; allowed: >= 258"),
    (["--output=mine.model"], "output='mine.model'; allowed: a name that ends in .json"),
]


@pytest.mark.parametrize(("flags", "message"), slow_but(ERRORS[:1], ERRORS))
def test_errors_are_one_line(tmp_path, flags, message):
    output = tmp_path / "mine.json"
    result = run("--sources=builtin:austen_valid", f"--output={output}", *flags)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    assert not output.exists()
