"""A process to be killed: when told to, builds one store of many small shards, slowly."""

import sys
import time
from pathlib import Path
from unittest import mock

from jaxlm.data import store
from jaxlm.data.config import SourceConfig
from jaxlm.data.tokenizers import Bytes

ROW_LENGTH = 64
NUM_SHARDS = 40


class Slow(Bytes):
    """The bytes tokenizer, slowly: the test must have time to kill it."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def encode(self, text: str) -> list[int]:
        time.sleep(self.seconds)
        return super().encode(text)


def write_texts(path: Path) -> None:
    texts = [f"document {i}: {'word ' * (i * 7 % 50)}" for i in range(NUM_SHARDS * 2)]
    path.write_text("\n\n\n".join(texts))


def build(path: str, cache: str, seconds: float):
    """Two documents or so a shard."""
    with mock.patch.object(store, "SHARD_CHARACTERS", 200):
        return store.build_store(SourceConfig(path), Slow(seconds), ROW_LENGTH, cache)


if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    build(sys.argv[1], sys.argv[2], float(sys.argv[3]))
    print("built", flush=True)
