"""No network, and no profile of this machine: the default rule chooses the backend, so that runs can be compared."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="huggingface-")
os.environ["COMPILED_LOGPROBS_MODE"] = "off"
os.environ["COMPILED_LOGPROBS_PROFILES"] = tempfile.mkdtemp(prefix="profiles-")
