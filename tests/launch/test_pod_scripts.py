"""Launch scripts of pods and clusters: what they would run (DRY_RUN=1), and their errors."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
POD = {"NAME": "pod", "ZONE": "us-west4-a", "TYPE": "v5litepod-256", "NFS": "10.0.0.2:/share"}
POD |= {"PYTHON": "python3"}


def run(script, *arguments, **changes):
    env = {**os.environ, **POD, "DRY_RUN": "1", **changes}
    command = [str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=ROOT)


def commands(finished):
    assert finished.returncode == 0, finished.stderr
    return [shlex.split(line) for line in finished.stdout.splitlines()]


def test_what_is_asked_of_the_cloud():
    create, describe = commands(run("tpu_pod.sh", "create", SPOT="1"))
    assert create[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create and "--spot" in create
    assert describe[-1] == "--format=value(state.state)"
    (delete,) = commands(run("tpu_pod.sh", "delete"))
    assert "--force" in delete and "--zone=us-west4-a" in delete


def test_hosts_run_the_command_as_it_was_given_until_it_ends_well(tmp_path):
    """The line that a host gets is run here, with a training that fails once."""
    encoding = "--config.model.position_encoding='rope(base=1)'"
    (train,) = commands(run("tpu_pod.sh", "train", "--workdir=/shared/a b", encoding))
    (line,) = [a.removeprefix("--command=") for a in train if a.startswith("--command=")]
    (tmp_path / "jaxlm").mkdir()
    python = tmp_path / "python3"
    python.write_text(
        '#!/bin/bash\nprintf "%s|" "$@" >> "$CALLS"; echo >> "$CALLS"\n'
        '[ "$(wc -l < "$CALLS")" -ge 2 ]\n'
    )
    python.chmod(0o755)
    sleep = tmp_path / "sleep"
    sleep.write_text("#!/bin/bash\n")
    sleep.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": f"{tmp_path}/calls"}
    subprocess.run(["bash", "-c", f"{line} wait"], env=env, cwd=tmp_path, check=True, timeout=60)
    given = ["-m", "launch.train", "--distributed", "--workdir=/shared/a b", encoding]
    assert (tmp_path / "calls").read_text() == 2 * ("|".join(given) + "|\n")


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (["create"], {"NAME": ""}, "error: NAME is not set; allowed: export NAME="),
        (["create"], {"TYPE": "v9-8"}, "error: TYPE=v9-8; allowed: v4-N, v5litepod-N"),
        (["bend"], {}, "A run on all hosts of a Cloud TPU slice"),
        (["train"], {}, "A run on all hosts of a Cloud TPU slice"),
    ],
)
def test_what_is_missing_is_said(arguments, changes, message):
    finished = run("tpu_pod.sh", *arguments, **changes)
    assert finished.returncode in (1, 2) and not finished.stdout
    assert finished.stderr.startswith(message)


def test_slurm():
    (command,) = commands(run("slurm.sh", "--workdir=a b"))
    assert command[-3:] == ["launch.train", "--distributed", "--workdir=a b"]
    assert run("slurm.sh").returncode == 2
