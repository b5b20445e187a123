"""`patch("trl")` on the versions around the one that is trained with: what it replaces, and whether trainers take it.

`make test-integrations` lays each into a folder of its own under .venv-integrations, beside the same dependencies.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / ".venv-integrations"

PROGRAM = """
import ast, json
from importlib.util import find_spec
from pathlib import Path
import torch
from compiled_logprobs import compat
patched = compat.patch("trl")
from trl.trainer import utils
x, y = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
torch.testing.assert_close(utils.selective_log_softmax(x, y), x.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1))
if hasattr(utils, "selective_log_softmax_and_entropy"):
    both = utils.selective_log_softmax_and_entropy(x, y, False, 0.5, torch.ones_like(y))
    torch.testing.assert_close(both, utils.selective_log_softmax_and_entropy(x / 0.5, y))
nodes = ast.walk(ast.parse(Path(find_spec("trl.trainer.grpo_trainer").origin).read_text()))
calls = [node.func for node in nodes if isinstance(node, ast.Call)]
print(json.dumps({
    "version": patched.version, "places": patched.places, "restored": compat.unpatch("trl"),
    "called": sorted({called.id for called in calls if isinstance(called, ast.Name)}),
}))
"""
NAMES = {"selective_log_softmax", "selective_log_softmax_and_entropy", "entropy_from_logits"}


def patched(version: str) -> dict:
    path = FOLDER / f"trl-{version}"
    assert path.is_dir(), f"{path} is not there: run `make test-integrations`"
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, "PYTHONPATH": str(path)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["version"] == version and set(result["places"]) <= set(result["restored"])
    result["names"] = {place.rpartition(".")[2] for place in result["places"]}
    return result


def test_the_older_arguments():
    result = patched("1.13.0")
    assert result["names"] == NAMES - {"selective_log_softmax_and_entropy"}
    assert NAMES & set(result["called"])


@pytest.mark.parametrize("version", ["1.15.0", "1.16.0"])
def test_newer_trainers_add_a_head_whose_function_is_replaced(version):
    """As the docstring of `compat.trl` says."""
    result = patched(version)
    has_function = version != "1.15.0" or find_spec("triton") is not None
    head = {"_ChunkedLogProbFunction", "ChunkedLogProbFunction"} if has_function else set()
    assert result["names"] == NAMES | head
    assert not NAMES & set(result["called"]) and "add_fused_lm_head" in result["called"]
