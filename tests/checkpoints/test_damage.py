"""Every kind of damage to the newest step: refused with its reason, the one before is used."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxlm.checkpoints import NoCheckpointError, Saver, available_steps, restore, verify
from tests.checkpoints.states import assert_same_bytes, state_at


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    with Saver(directory) as saver:
        for step in (1, 2):
            saver.save(step, state_at(step), {"x": 1}, {"tokenizer/t.json": b'{"a": 1}'})
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    """A copy to damage."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def flip(path: Path, position: int = -1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def truncate(path: Path):
    os.truncate(path, path.stat().st_size // 2)


# Each kind of file in a step folder, and how a reason names it (an array by its leaf or its file).
KINDS = {
    "COMMIT": "COMMIT",
    "manifest.json": "manifest.json: ",
    "tokenizer/t.json": "tokenizer/t.json: ",
    "state/_METADATA": "state/_METADATA: ",
    "state/params.dense.kernel/.zarray": "state/params.dense.kernel/.zarray: ",
    "state/params.dense.kernel/0.0": "params[./]dense[./]kernel(/0.0)?: ",
    "state/rng/0": "rng(/0)?: ",
}


@pytest.mark.parametrize(
    ("damage", "verdict"),
    [
        (flip, "SHA-256 differs"),
        (truncate, "SHA-256 differs|bytes, .* when saved"),
        (Path.unlink, "missing|no COMMIT marker"),
    ],
)
@pytest.mark.parametrize("file", KINDS)
def test_damaged_file(directory, file, damage, verdict, caplog):
    damage(directory / "step_00000002" / file)
    restored = restore(directory, state_at(0))
    assert restored.step == 1
    assert_same_bytes(restored.state, state_at(1))
    (line,) = restored.refused
    assert line.startswith("step 2 refused (")
    reason = line.split("): ", 1)[1]
    assert re.search(KINDS[file], reason)
    assert re.search(verdict, reason)
    assert line in caplog.text
    assert "checkpoint of step 1 is used instead" in caplog.text
    with pytest.raises(NoCheckpointError, match="step 2"):
        restore(directory, state_at(0), step=2)


@pytest.mark.parametrize(
    ("file", "damage", "step"),
    [
        ("state/params.dense.kernel/0.0", flip, 2),
        ("state/params.dense.kernel/0.0", truncate, 1),
        ("state/params.dense.kernel/.zarray", flip, 1),
        ("manifest.json", flip, 1),
    ],
)
def test_unverified_a_flipped_bit_of_an_array_is_not_seen(directory, file, damage, step):
    """And all other damage is."""
    damage(directory / "step_00000002" / file)
    assert restore(directory, state_at(0), verify=False).step == step


def test_every_byte_of_an_array_counts(directory):
    chunk = directory / "step_00000002/state/opt.0.mu.k/0.0"
    for position in (0, 1, 100, 511):
        flip(chunk, position)
        assert restore(directory).step == 1
        flip(chunk, position)
    assert restore(directory).step == 2


@pytest.mark.parametrize("nbytes", [1, 2**25])
def test_every_leaf_is_checked_however_many_are_read_at_a_time(directory, monkeypatch, nbytes):
    monkeypatch.setattr(verify, "READ_BYTES", nbytes)
    state = directory / "step_00000002" / "state"
    chunks = [p for p in state.glob("*/*") if not p.name.startswith(".") and p.stat().st_size]
    assert len(chunks) == len([x for x in jax.tree.leaves(state_at(2)) if jnp.size(x)])
    for chunk in chunks:
        flip(chunk)
        (line,) = restore(directory).refused
        assert line.endswith(f"{chunk.parent.name.replace('.', '/')}: SHA-256 differs")
        flip(chunk)
    assert_same_bytes(restore(directory, state_at(0)).state, state_at(2))


def empty_folder(directory):
    (directory / "step_00000003").mkdir()


def half_written(directory):
    shutil.copytree(directory / "step_00000002", directory / "step_00000003.tmp")


def renamed(directory):
    (directory / "step_00000002").rename(directory / "step_00000003")


def file_in_place(directory):
    (directory / "step_00000003").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "used", "reason"),
    [
        (empty_folder, 2, "no COMMIT marker"),
        (half_written, 2, "unfinished: its save was killed"),
        (renamed, 1, "its manifest is that of step 2"),
        (file_in_place, 2, "no COMMIT marker"),
    ],
)
def test_damaged_folder(directory, damage, used, reason):
    damage(directory)
    restored = restore(directory)
    assert restored.step == used
    assert [reason in line and "step 3 refused" in line for line in restored.refused] == [True]


def test_stray_files_do_no_harm(directory):
    """Neither do other folders: they aren't ours, so they stay."""
    strays = [
        "step_00000002/.DS_Store",
        "step_00000002/state/rng/.nfs0",
        "step_7",
        "a.orbax/x",
        "lock",
    ]
    for stray in strays:
        (directory / stray).parent.mkdir(exist_ok=True)
        (directory / stray).write_bytes(b"?")
    assert available_steps(directory) == [1, 2]
    assert_same_bytes(restore(directory, state_at(0)).state, state_at(2))
    with Saver(directory) as saver:
        saver.save(3, state_at(3))
    assert all((directory / stray).exists() for stray in strays)


def test_no_good_step_lists_all(directory):
    flip(directory / "step_00000001/manifest.json")
    (directory / "step_00000002/COMMIT").unlink()
    with pytest.raises(NoCheckpointError) as caught:
        restore(directory)
    _, newest, oldest = str(caught.value).splitlines()
    assert newest.startswith("step 2 refused") and "no COMMIT marker" in newest
    assert oldest.startswith("step 1 refused") and "SHA-256 differs" in oldest


def forge(folder: Path, change):
    """Change the manifest and make its marker fit: what somebody could send on purpose."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    text = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "COMMIT").write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n")


def put(*path_and_value):
    *path, last, value = path_and_value

    def change(manifest):
        for key in path:
            manifest = manifest[key]
        manifest[last] = value

    return change


HUGE = {"dtype": "int8", "shape": [2**50], "prng": None, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put("files", "../../x", {"bytes": 1, "sha256": "0" * 64}), "file name '../../x'"),
        (put("files", "/etc/passwd", {"bytes": 1, "sha256": "0" * 64}), "file name '/etc/passwd'"),
        (put("files", "tokenizer/t.json", {"bytes": 8, "sha256": None}), "no sha256"),
        (put("files", "tokenizer/t.json", {"bytes": -8, "sha256": None}), "bytes"),
        (put("files", "tokenizer/t.json", []), "files"),
        (put("leaves", "step", "shape", [2**50]), "bytes of files for"),
        (put("leaves", "step", "shape", [-1]), "shape"),
        (put("leaves", "step", "shape", [1.0]), "shape"),
        (put("leaves", "step", "dtype", "object"), "dtype 'object'"),
        (put("leaves", "step", "dtype", ["int32"]), "dtype"),
        (put("leaves", "step", "sha256", "0"), "sha256"),
        (put("leaves", "step", "sha256", "0" * 64), "digest is not that of the leaves"),
        (put("leaves", "rng", "prng", "no such"), "rng"),
        (put("leaves", "..", HUGE), "state leaf '..'"),
        (put("leaves", "../..", HUGE), "digest is not that of the leaves"),
        (put("format", 2), "format 2"),
        (put("step", True), "step"),
        (put("metadata", None), "metadata"),
        (put("versions", 3), "versions"),
    ],
)
def test_forged_manifest(directory, change, reason):
    forge(directory / "step_00000002", change)
    restored = restore(directory)
    assert restored.step == 1
    assert reason in restored.refused[0]


def test_forged_array_size_is_seen_before_allocation(directory):
    """A .zarray which claims 2**50 elements, with a manifest that vouches for the file."""
    folder = directory / "step_00000002"
    header = folder / "state/step/.zarray"
    text = json.dumps(json.loads(header.read_text()) | {"shape": [2**50], "chunks": [2**50]})
    header.write_text(text)
    record = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    forge(folder, put("files", "state/step/.zarray", record))
    restored = restore(directory)
    assert restored.step == 1
    assert "step: the file says int32[1125899906842624]" in restored.refused[0]


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"9" * 10_000])
def test_manifest_that_is_no_manifest(directory, text):
    folder = directory / "step_00000002"
    (folder / "manifest.json").write_bytes(text)
    (folder / "COMMIT").write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n")
    assert "manifest.json" in restore(directory).refused[0]


def test_link_out_of_the_folder(directory):
    target = directory / "step_00000001/tokenizer"
    shutil.rmtree(directory / "step_00000002/tokenizer")
    (directory / "step_00000002/tokenizer").symlink_to(target)
    assert "tokenizer/t.json: a link" in restore(directory).refused[0]
