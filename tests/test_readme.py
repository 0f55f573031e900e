"""The README's Python, typed in one piece after another as it stands there."""

import re
from pathlib import Path

import jaxlm
from tests.interop.folders import read_golden, write_folder

README = Path(__file__).parent.parent / "README.md"
# The checkpoints that it names; where a folder of that name is, it is not looked for on the hub.
HUB = {"sentence-transformers/all-MiniLM-L6-v2": "bert", "google/flan-t5-small": "t5_v1_1"}


def quickstart():
    """runs/quickstart, smaller: the last snippet's data, model and tokenizer serve both."""
    model = {"num_layers": 1, "d_model": 32, "attention": {"num_heads": 2}}
    data = {"sequence_length": 128, "batch_size": 32}
    config = {"model": model, "data": data, "train": {"steps": 2}}
    jaxlm.train(jaxlm.RunConfig.from_dict(config), "runs/quickstart")


def test_python_runs_as_written(tmp_path, monkeypatch, capsys):
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) == 5 and '"steps": 50' in snippets[-1]
    monkeypatch.chdir(tmp_path)
    quickstart()
    for name, golden in HUB.items():
        _, config, shapes = read_golden(golden)
        Path(name).parent.mkdir()
        write_folder(Path(name), config, shapes)
    names = {}
    for snippet in snippets:
        # Fewer steps than it says teach less and show as much.
        exec(snippet.replace('"steps": 50', '"steps": 2'), names)
    assert names["fresh"]["layers"] is not None and names["vectors"].shape[0] == 2
    assert names["logits"].shape[:2] == names["targets"].shape
    assert capsys.readouterr().out.count("['") == 2
    assert len(names["curve"].loss) > 1 and Path("runs/notebook/alibi.png").stat().st_size > 10_000
