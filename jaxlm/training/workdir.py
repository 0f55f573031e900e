"""Names in the folder of a run."""

CHECKPOINTS = "checkpoints"
# In the folder of a comparison: names the run that stands for it.
DEFAULT_RUN = "default.json"
TOKENIZER = "tokenizer"
PROFILE = "profile"
