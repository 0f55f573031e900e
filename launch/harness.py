"""Tasks of EleutherAI's lm-evaluation-harness (lm-eval), answered by a model of ours.

python -m launch.harness --checkpoint=runs/quickstart --tasks=lambada_openai --limit=100
python -m launch.harness --checkpoint=MODEL.gguf --tasks=mine --include_path=FOLDER_OF_YAML

lm-eval's table is printed, and its results are written as JSON. It comes with the extra `harness`;
most of its tasks fetch their texts from the hub, those of a folder of yours need not.
"""

from __future__ import annotations

import json

from absl import app, flags

import jaxlm
from jaxlm.data.optional import optional
from jaxlm.evaluation.harness import harness_model
from jaxlm.model.transformer import Transformer
from launch import console
from launch.results import results_folder

CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Workdir of a training run, a Hugging Face folder or the hub's owner/name, or a GGUF file.",
    required=True,
)
TASKS = flags.DEFINE_list("tasks", None, "Names of tasks, with commas between.", required=True)
INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Folder of more tasks, as YAML files.")
ENCODING = flags.DEFINE_string(
    "position_encoding", None, "Put on the trained model, e.g. 'lm_infinite(window=128)'."
)
LIMIT = flags.DEFINE_integer("limit", None, "Most documents of a task.", lower_bound=1)
NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Examples shown before.", lower_bound=0)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Requests at a time.", lower_bound=1)
MAX_LENGTH = flags.DEFINE_integer(
    "max_length",
    None,
    "Most tokens the model reads at once. Default: its context length.",
    lower_bound=2,
)
CHAT = flags.DEFINE_bool("chat", False, "Contexts are what a user says to a chat model.")
OUTPUT = flags.DEFINE_string(
    "output", None, "Folder of harness.json. Default: the workdir, or runs/NAME."
)


def main(argv: list[str]) -> None:
    """Prints lm-eval's table and writes harness.json."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    with console.clear_errors():
        folder = results_folder(CHECKPOINT.value, OUTPUT.value)
        lm_eval = optional("lm_eval", "launch.harness", "harness")
        tasks = optional("lm_eval.tasks", "launch.harness", "harness")
        utils = optional("lm_eval.utils", "launch.harness", "harness")
        manager = tasks.TaskManager(include_path=INCLUDE_PATH.value)
        unknown = [t for t in TASKS.value if not manager.match_tasks([t])]
        if unknown:
            raise ValueError(f"tasks={unknown[0]!r}; allowed: one of lm-eval's or of include_path")
        model, params, tokenizer = jaxlm.load(CHECKPOINT.value)
        if not isinstance(model, Transformer):
            raise ValueError(f"checkpoint={CHECKPOINT.value!r}; allowed: no encoder–decoder")
        if ENCODING.value is not None:
            model = model.with_position_encoding(ENCODING.value)
        asked = harness_model(model, params, tokenizer, BATCH_SIZE.value, MAX_LENGTH.value)
        results = lm_eval.simple_evaluate(
            asked,
            tasks=TASKS.value,
            num_fewshot=NUM_FEWSHOT.value,
            limit=LIMIT.value,
            apply_chat_template=CHAT.value,
            log_samples=False,
            task_manager=manager,
        )
        results["config"] |= {
            "checkpoint": CHECKPOINT.value,
            "position_encoding": str(model.config.encoding),
            "max_length": asked.max_length,
        }
        print(utils.make_table(results))
        text = json.dumps(results, indent=1, default=utils.handle_non_serializable)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "harness.json").write_text(text + "\n")
        print(f"{folder}/harness.json")


if __name__ == "__main__":
    app.run(main)
