"""Pipes and servers that give nothing: an error that tells the source and the seconds."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest

from jaxlm.data.config import DataConfig
from jaxlm.data.files import open_binary
from jaxlm.data.loader import open_loader
from jaxlm.data.stall import patience

SECONDS = 0.5
WRITER = """
import sys, time
with open(sys.argv[1], "wb", buffering=0) as pipe:
    pipe.write(b"It was the best of times.")
    time.sleep(60)
"""


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "pipe.txt"
    os.mkfifo(path)
    return path


@pytest.fixture
def stalled(pipe):
    """One with a few bytes in it, and a writer that gives no more."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(pipe)]) as writer:
        yield pipe
        writer.kill()


def told(path):
    return rf"source '.*{path.name}' gave no bytes for {SECONDS:g} s; allowed: .*stall_seconds"


def check_ends(path, source, cache):
    config = DataConfig(sources=source, held_out=(), stall_seconds=SECONDS)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=told(path)):
        open_loader(config, cache)
    assert SECONDS <= time.monotonic() - began < 30


def test_a_writer_that_stalls(stalled, tmp_path):
    check_ends(stalled, str(stalled), tmp_path / "cache")


def test_a_writer_that_never_comes(pipe, tmp_path):
    check_ends(pipe, str(pipe), tmp_path / "cache")


def test_a_server_that_accepts_and_says_nothing(tmp_path):
    pytest.importorskip("aiohttp")  # of fsspec's http
    with socket.create_server(("localhost", 0)) as server:
        address = f"http://localhost:{server.getsockname()[1]}/texts.txt"
        check_ends(Path(address), address, tmp_path / "cache")


def test_a_tokenizer_is_trained_within_the_same_patience(stalled, tmp_path):
    config = DataConfig(f"{stalled}", (), tokenizer="bpe:300", stall_seconds=SECONDS)
    with pytest.raises(TimeoutError, match=told(stalled)):
        open_loader(config, tmp_path)


def test_a_slow_writer_is_read_to_the_end(pipe):
    """It gives something in time, again and again."""

    def write():
        with pipe.open("wb", buffering=0) as file:
            for _ in range(5):
                file.write(b"slowly ")
                time.sleep(SECONDS / 2)

    writer = threading.Thread(target=write)
    writer.start()
    with patience(SECONDS), open_binary(str(pipe)) as file:
        assert file.read() == b"slowly " * 5
    writer.join()


@pytest.mark.parametrize("address", [False, True])
def test_any_part_of_a_file_is_what_it_was(tmp_path, address):
    content = os.urandom(3_000_000)
    path = str(tmp_path / "file")
    if address:
        path = "memory://stall/file"
        fsspec.filesystem("memory").pipe_file("/stall/file", content)
    else:
        (tmp_path / "file").write_bytes(content)
    with open_binary(path) as file:
        assert file.read(10) == content[:10]
        assert file.seek(-5, os.SEEK_END) == len(content) - 5 and file.read() == content[-5:]
        assert file.seek(1_500_000) == 1_500_000 and file.read() == content[1_500_000:]
        assert file.seek(0) == 0 and file.read() == content
    with pytest.raises(FileNotFoundError):
        open_binary(path + "_absent")
