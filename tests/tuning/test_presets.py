"""What a profile run measures: the grids of presets, and the names of models, dtypes and modes."""

import pytest
import torch

from compiled_logprobs.api.functions import problem_of
from compiled_logprobs.errors import InputError
from compiled_logprobs.problem import MODES, Problem, as_it_lies, mode_name
from compiled_logprobs.tuning import presets


def test_the_standard_preset_is_what_the_readme_says():
    problems = presets.grid("cpu")
    assert {problem.vocab for problem in problems} == {151936, 128256}
    assert {problem.dtype for problem in problems} == {torch.float32, torch.bfloat16}
    assert {problem.needs_grad for problem in problems} == {False, True}


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_preset_makes_distinct_problems(preset, device_type):
    problems = presets.grid(device_type, preset)
    assert len(problems) == len(set(problems)) > 0
    assert all(mode_name(problem) in MODES for problem in problems)


def test_what_is_named_replaces_that_part_of_the_preset():
    problems = presets.grid("cpu", "quick", vocabs=[8], rows=[3], modes=["inplace"])
    assert problems == [
        Problem("cpu", 3, 8, dtype, needs_grad=True, inplace_backward=True) for dtype in (torch.float32, torch.bfloat16)
    ]


def test_rows_of_an_odd_vocabulary_are_not_aligned():
    (problem,) = presets.grid("cpu", vocabs=[50257], rows=[8], dtypes=[torch.bfloat16], modes=["entropy"])
    logits, labels = torch.zeros(8, 50257, dtype=torch.bfloat16), torch.zeros(8, 1, dtype=torch.int64)
    assert problem == problem_of(logits, labels, 1.0, entropy=True) and not problem.aligned
    assert mode_name(problem) == "entropy"
    assert as_it_lies(problem._replace(aligned=True)) == problem
    assert as_it_lies(problem._replace(aligned=True, layout="rows")).aligned


def test_models_are_known_by_name():
    assert presets.vocab_of("12345") == 12345 and presets.vocab_of("Qwen3") == 151936


@pytest.mark.parametrize(
    ("convert", "text", "said"),
    [
        (presets.vocab_of, "qwen9", "got vocabulary 'qwen9'; a number or one of qwen3, llama3"),
        (presets.vocab_of, "0", "got vocabulary '0'"),
        (presets.vocab_of, "²", "got vocabulary '²'"),
        (presets.rows_of, "-1", "got number of rows '-1'; a whole number from 1 on is valid"),
        (presets.rows_of, str(2**31), "below 2^31"),
        (presets.dtype_of, "float", "got dtype 'float'; float32, bfloat16, float16 are valid"),
        (presets.mode_of, "training", "got mode 'training'; forward, backward, inplace, entropy are valid"),
    ],
)
def test_what_is_not_known_is_said_with_what_is(convert, text, said):
    with pytest.raises(InputError) as error:
        convert(text)
    assert said in str(error.value)
