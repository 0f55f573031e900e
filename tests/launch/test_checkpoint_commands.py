"""A trained run as a hub folder (launch.convert), told about (launch.inspect), evaluated."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.model.layouts import unroll_layers
from tests.interop.folders import read_golden, write_folder


def run(launcher, module, *flags, **options):
    command = [sys.executable, "-m", f"launch.{module}", *map(str, flags)]
    with launcher.popen(command, **options) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="module")
def converted(launcher, reference, tmp_path_factory):
    """The reference run's folder, and what it was converted to."""
    workdir, _ = reference
    folder = tmp_path_factory.mktemp("converted") / "hub"
    result = run(launcher, "convert", f"--checkpoint={workdir}", f"--output={folder}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{folder}: MixtralForCausalLM, ")
    return workdir, folder


def test_convert_keeps_every_bit(converted):
    assert len({path.stat().st_mode for path in converted[1].iterdir()}) == 1
    (model, params, tokenizer), (again, same, as_hub) = map(jaxlm.load, converted)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert again.config.encoding == model.config.encoding
    assert as_hub.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    "flags",
    [
        ["--max_shard_bytes=5", "--adapter"],
        pytest.param(["--base=owner/name"], marks=pytest.mark.slow),
        pytest.param(["--position_encoding=alibi", "--adapter"], marks=pytest.mark.slow),
    ],
)
def test_convert_refuses_flags_that_would_do_nothing(launcher, converted, tmp_path, flags):
    result = run(
        launcher, "convert", f"--checkpoint={converted[0]}", f"--output={tmp_path}/out", *flags
    )
    name, value = flags[0].removeprefix("--").split("=")
    assert result.returncode == 1 and name in result.stderr and value in result.stderr
    assert "; allowed: " in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_layers_apart_say_the_same(converted):
    workdir, folder = converted
    model, params, tokenizer = jaxlm.load(workdir)
    want = jaxlm.generate(model, params, tokenizer, ["it was the"], 8)
    want_params = unroll_layers(model.config, params)
    for path in (workdir, folder):
        model, params, tokenizer = jaxlm.load(path, unroll=True)
        jax.tree.map(np.testing.assert_array_equal, params, want_params)
        assert jaxlm.generate(model, params, tokenizer, ["it was the"], 8) == want


def test_inspect_tells_what_it_takes(launcher, converted):
    for path in converted:
        result = run(launcher, "inspect", path, "--batch_size=2", "--length=100")
        assert result.returncode == 0, result.stderr
        model, params, _ = jaxlm.load(path)
        assert f" {jaxlm.count_params(params):,} " in result.stdout
        cache = jaxlm.DenseCache.init(model.config, 2, 100)
        assert f" {cache.nbytes / 2**20:,.1f} MiB " in result.stdout


def test_evaluate_writes_nothing_into_a_hub_folder(launcher, converted, tmp_path):
    _, folder = converted
    before = sorted(folder.iterdir())
    text = tmp_path / "text.txt"
    text.write_text("it was the best of times, it was the worst of times. " * 40)
    flags = [f"--checkpoint={folder}", f"--text={text}", "--length=64", "--windows=2", "--bucket=8"]
    result = run(launcher, "evaluate", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "hub" / "evaluation.json").is_file()
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("case", "module", "flags", "message"),
    [
        ("bert", "evaluate", ["--noheld_out"], "error: checkpoint='{folder}'; allowed: a decoder"),
        (
            "t5",
            "convert",
            ["--output=out", "--position_encoding=alibi"],
            "error: position_encoding='alibi'; allowed: none with an encoder–decoder",
        ),
    ],
)
def test_one_line_for_another_kind_of_model(launcher, tmp_path, case, module, flags, message):
    _, config, shapes = read_golden(case)
    folder = write_folder(tmp_path / "hub", config, shapes)
    result = run(launcher, module, f"--checkpoint={folder}", *flags, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (1, message.format(folder=folder) + "\n")


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("inspect", ["/absent"], "error: /absent is absent"),
        (
            "convert",
            ["--checkpoint=/absent", "--output=out"],
            "error: /absent is absent",
        ),
    ],
)
def test_one_line_for_what_is_not_there(launcher, module, flags, message):
    result = run(launcher, module, *flags)
    assert result.returncode == 1
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("generate", ["--prompt=x", "--system=y"], "error: system='y' without chat; allowed: "),
        ("convert", ["--output={full}", "--step=7"], "error: {full} holds files; allowed: a fold"),
        (
            "evaluate",
            ["--output={full}/config.json/out", "--noheld_out", "--length=8"],
            "error: [Errno 20] Not a directory: '{full}/config.json/out'",
        ),
        (
            "convert",
            ["--output=out", "--position_encoding=lm_infinite"],
            "error: no architecture of the hub's has a model like this: ",
        ),
        pytest.param(
            "convert",
            ["--output=out", "--step=7"],
            "error: step=7; allowed: None with {folder}, ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_line_for_what_does_not_fit(launcher, converted, tmp_path, module, flags, message):
    _, folder = converted
    names = {"full": folder, "folder": folder}
    flags = [f"--checkpoint={folder}", *(flag.format(**names) for flag in flags)]
    result = run(launcher, module, *flags, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith(message.format(**names)), result.stderr
    assert result.stderr.count("\n") == 1 and len(result.stderr) < 1000
    assert not (tmp_path / "out").exists()
