"""python -m launch.generate in real processes: streamed, several prompts, and bad ones."""

import subprocess
import sys

import pytest

import jaxlm

LAMBDA = "lm_infinite(window=16, num_sinks=2)"


def run(launcher, *flags, xla=""):
    command = [sys.executable, "-m", "launch.generate", *flags]
    env = {**launcher.env, "XLA_FLAGS": launcher.env["XLA_FLAGS"] + xla}
    with launcher.popen(command, env=env) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def test_one_prompt_is_streamed(launcher, reference):
    """Past the 32 positions it was trained on, under an encoding it was not trained with."""
    workdir, _ = reference
    result = run(
        launcher,
        *(f"--checkpoint={workdir}", f"--position_encoding={LAMBDA}", "--prompt=it was the"),
        *("--max_new_tokens=60", "--temperature=0.8", "--top_p=0.95", "--seed=3"),
        "--min_new_tokens=60",  # what it was trained on is short
    )
    assert result.returncode == 0, result.stderr
    model, params, tokenizer = jaxlm.load(workdir)
    settings = {"max_new_tokens": 60, "temperature": 0.8, "top_p": 0.95, "seed": 3}
    settings |= {"min_new_tokens": 60}
    model = model.with_position_encoding(LAMBDA)
    (text,) = jaxlm.generate(model, params, tokenizer, ["it was the"], **settings)
    assert result.stdout == f"it was the{text}\n" and len(text) > 40


FOUR = " --xla_force_host_platform_device_count=4"


@pytest.mark.parametrize(
    ("xla", "mesh"), [("", []), pytest.param(FOUR, ["--tensor=2"], marks=pytest.mark.slow)]
)
def test_several_prompts(launcher, reference, xla, mesh):
    workdir, _ = reference
    prompts = ["it was", "she had not been", "é"]
    flags = [f"--prompt={p}" for p in prompts]
    flags += [f"--checkpoint={workdir}", "--max_new_tokens=12", *mesh]
    result = run(launcher, *flags, xla=xla)
    assert result.returncode == 0, result.stderr
    texts = jaxlm.generate(*jaxlm.load(workdir), prompts, max_new_tokens=12)
    blocks = [f"{p}{t}\n\n" for p, t in zip(prompts, texts, strict=True)]
    assert result.stdout == "".join(blocks)


@pytest.mark.slow
def test_several_texts_of_each_prompt(launcher, reference):
    workdir, _ = reference
    settings = {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2, "seed": 3, "n": 2}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    flags += ["--prompt=it was", "--prompt=she", "--max_new_tokens=12", "--stop=e", "--stop=a"]
    result = run(launcher, f"--checkpoint={workdir}", *flags)
    assert result.returncode == 0, result.stderr
    settings |= {"max_new_tokens": 12, "stop": ["e", "a"]}
    texts = jaxlm.generate(*jaxlm.load(workdir), ["it was", "she"], **settings)
    prompts = ["it was"] * 2 + ["she"] * 2
    assert result.stdout == "".join(f"{p}{t}\n\n" for p, t in zip(prompts, texts, strict=True))


@pytest.mark.slow
def test_a_model_that_hands_over_to_itself_says_what_it_says_alone(launcher, reference):
    workdir, _ = reference
    flags = [f"--checkpoint={workdir}", f"--small={workdir}", "--prompt=it was", "--prompt=she"]
    flags += ["--method=entropy_adaptive(threshold=2.0, min_dwell=2)", "--max_new_tokens=24"]
    result = run(launcher, *flags)
    assert result.returncode == 0, result.stderr
    texts = jaxlm.generate(*jaxlm.load(workdir), ["it was", "she"], max_new_tokens=24)
    want = zip(["it was", "she"], texts, strict=True)
    assert result.stdout == "".join(f"{p}{t}\n\n" for p, t in want)
    assert "% of the tokens; 1.00 of its cost" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt=it was", "--small=absent", "--n=2"], r"error: n=2, best_of=None; allowed: one"),
        pytest.param(
            *(["--prompt=it was", "--top_p=2"], r"error: top_p=2; allowed: "),
            marks=pytest.mark.slow,
        ),
        (["--prompt=\udcff\udcfe"], r"error: text …'\udcff\udcfe'… is not UTF-8 at character 0"),
    ],
)
def test_nothing_is_printed_before_an_error(launcher, reference, flags, message):
    result = run(launcher, f"--checkpoint={reference[0]}", *flags)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1


def test_a_prompt_is_required(launcher):
    result = run(launcher, "--checkpoint=absent")
    assert (result.returncode, result.stdout) == (1, "")
    assert "Flag --prompt must have a value" in result.stderr.splitlines()[0]
