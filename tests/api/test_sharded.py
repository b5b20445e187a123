"""A vocabulary that is split over real ranks of gloo; what they go through is in `tests/helpers/shard_rank.py`."""

import json
import os
import subprocess
import sys

import pytest
import torch

import compiled_logprobs as clp

RANKS = 4


@pytest.mark.slow
def test_four_ranks_and_pairs_of_them_have_the_numbers_of_the_whole(tmp_path):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(RANKS),
        "METHOD": f"file://{tmp_path / 'meeting'}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "tests.helpers.shard_rank"]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=-1, stderr=-1, text=True)
        for rank in range(RANKS)
    ]
    try:
        printed, errors = zip(*(process.communicate(timeout=220) for process in processes), strict=True)
    except subprocess.TimeoutExpired:
        pytest.fail("a rank hangs")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for text, error in zip(printed, errors, strict=True):
        results = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        failures = [failure for result in results for failure in result.values() if failure]
        assert not failures, failures[0]
        assert len(results) == 6, error


def test_one_rank_takes_the_columns_of_a_padded_vocabulary():
    logits, labels = torch.randn(4, 100, requires_grad=True), torch.randint(90, (4,))
    out = clp.log_probs_from_logits(logits, labels, vocab_size=90)
    torch.testing.assert_close(out, clp.log_probs_from_logits(logits[:, :90], labels), rtol=0, atol=0)
    out.sum().backward()
    assert not logits.grad[:, 90:].any() and logits.grad[:, :90].all()
    with pytest.raises(clp.InputError, match=r"labels\[0\] = 95; 0 to 89"):
        clp.log_probs_from_logits(logits, labels.fill_(95), vocab_size=90)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab_size": 101}, "got vocab_size=101 for logits of 100 columns; an integer from 1 to 100 is valid"),
        ({"vocab_start_index": 0, "vocab_size": 90}, "got vocab_start_index=0 without group"),
        ({"group": "tp"}, "got group='tp'; a process group of torch.distributed is valid"),
    ],
)
def test_what_says_nothing_of_a_split_is_refused(options, words):
    with pytest.raises(clp.InputError, match=words):
        clp.log_probs_from_logits(torch.randn(4, 100), torch.randint(90, (4,)), **options)
