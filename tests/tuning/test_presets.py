"""What a profile run measures: the grids of presets, and the names of models, dtypes and modes."""

import pytest
import torch

from compiled_logprobs.api.call import problem_of
from compiled_logprobs.errors import InputError
from compiled_logprobs.problem import MODES, Problem, as_it_lies, bucket, collapse, mode_name
from compiled_logprobs.tuning import presets
from compiled_logprobs.tuning.presets import FEWEST_ROWS, grid, is_among

BF16 = torch.bfloat16


def test_the_standard_preset_is_what_the_readme_says():
    problems = grid("cpu")
    assert {problem.vocab for problem in problems} == {151936, 128256}
    assert {problem.dtype for problem in problems} == {torch.float32, BF16}
    assert {mode_name(problem) for problem in problems} == {"forward", "backward"}


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_preset_makes_distinct_buckets(preset, device_type):
    problems = grid(device_type, preset)
    assert len(problems) == len(set(map(bucket, problems))) > 0
    assert {problem.mode for problem in problems} <= MODES.keys()


def test_rl_is_what_a_trainer_calls():
    """With the arguments of the README's own call, and of those beside it."""
    names = [mode_name(problem) for problem in grid("cpu", "rl", vocabs=[1024])]
    assert names == [
        *("forward", "forward, temperature (number)"),
        *("forward, layout slice", "forward, temperature (number), layout slice"),
        *("backward", "backward, temperature (number)"),
        *("backward, layout slice", "backward, temperature (number), layout slice"),
        *("inplace", "inplace, temperature (number)"),
        *("forward, entropy, temperature (number)", "backward, entropy, temperature (number)"),
    ]
    logits = torch.zeros(2, 129, 1024, dtype=BF16, requires_grad=True)
    labels = torch.zeros(2, 128, 1, dtype=torch.int64)
    called = problem_of(collapse(logits[:, :-1]), labels, 0.7)
    assert called in grid("cpu", "rl", vocabs=[1024]) and called.layout == "slice"
    (one,) = {problem[1:4] for problem in grid("cpu", "rl")}
    assert one == (256, 151936, BF16) and {problem.rows for problem in grid("cuda", "rl")} == {4096}


def test_what_is_named_replaces_that_part_of_the_preset():
    problems = grid("cpu", "quick", vocabs=[8], rows=[3], modes=["inplace"])
    assert problems == [
        Problem("cpu", 3, 8, dtype, needs_grad=True, inplace_backward=True) for dtype in (torch.float32, BF16)
    ]
    every = {
        "vocabs": [1024, 1025],
        "rows": [8, 64],
        "dtypes": [torch.float32, BF16],
        "modes": list(MODES),
        "layouts": list(FEWEST_ROWS),
        "temperatures": ["none", "number", "per_token"],
        "labels": [1, 5],
        "entropy": [False, True],
        "sum_p_squared": [True, False],
        "masked": [False, True],
    }
    problems = grid("cpu", "rl", **every)
    assert len(problems) == 2**7 * 3**3
    for name, values in every.items():
        for value in values:
            some = [problem for problem in problems if is_among(problem, **{name: [value]})]
            assert len(some) == len(problems) / len(values), name
    assert is_among(problems[0], rows=[7]) and not is_among(problems[0], rows=[9])  # by the bucket of N
    assert all(is_among(problem, **every) and is_among(problem) for problem in problems)


def test_problems_from_hidden_states_have_the_weights_gradient_unless_it_is_frozen():
    options = {"rows": [512], "vocabs": [32000], "dtypes": [BF16], "hidden": [64]}
    modes = list(MODES)
    posed = grid("cpu", "full", **options, modes=modes, layouts=["flat", "slice"], weight_grad=[True, False])
    plain = Problem("cpu", 512, 32000, BF16, hidden=64)
    frozen, both = plain._replace(needs_grad=True), plain._replace(needs_grad=True, weight_grad=True)
    assert set(posed) == {plain, frozen, both, *(p._replace(entropy=True) for p in (plain, frozen, both))}
    assert grid("cpu", "quick", **options) == [plain, both]
    assert mode_name(both) == "backward, hidden 64, of the weight too"
    limited = plain._replace(memory_limit=2**29)
    assert is_among(bucket(limited), memory_limits=[2**29 + 1], hidden=[64]) and not is_among(
        plain, memory_limits=[2**29]
    )
    with pytest.raises(InputError, match="got memory limit without a hidden size; it is valid with one. Leave one of"):
        grid("cpu", memory_limits=[2**29])


@pytest.mark.parametrize(
    ("text", "bytes_"), [("512MiB", 2**29), ("2 gib", 2**31), ("3kb", 3000), ("1000000000000", 10**12), ("7", 7)]
)
def test_memory_is_said_in_bytes_or_larger_units(text, bytes_):
    assert presets.memory_of(text) == bytes_


def test_rows_that_are_too_few_for_a_layout_are_left_out():
    assert {(problem.rows, problem.layout) for problem in grid("cpu", rows=[1, 2, 4], layouts=list(FEWEST_ROWS))} == {
        *((1, "flat"), (2, "flat"), (2, "rows"), (4, "flat"), (4, "rows"), (4, "slice"))
    }
    with pytest.raises(InputError, match=r"got rows 1, 2 for a layout .* at least flat 1, rows 2, slice 4 are valid"):
        grid("cpu", rows=[1, 2], layouts=["slice"])


@pytest.mark.parametrize("layout", ["flat", "slice"])
def test_rows_of_an_odd_vocabulary_are_not_aligned(layout):
    (problem,) = grid("cpu", vocabs=[50257], rows=[8], dtypes=[BF16], modes=["forward"], layouts=[layout])
    logits = torch.zeros(2, 4 + (layout == "slice"), 50257, dtype=BF16)[:, :4]
    assert problem == problem_of(collapse(logits), torch.zeros(2, 4, 1, dtype=torch.int64), 1.0)
    assert not problem.aligned and "aligned" not in mode_name(problem)
    assert mode_name(problem._replace(vocab=50256)).endswith("not 16-byte aligned")
    assert as_it_lies(problem._replace(aligned=True)) == problem
    assert as_it_lies(problem._replace(aligned=True, layout="rows")).aligned


@pytest.mark.parametrize(
    ("text", "vocab"),
    [
        ("12345", 12345),
        ("Qwen3", 151936),
        ("Qwen/Qwen3-8B", 151936),
        ("qwen/qwen3-30b-a3b-instruct-2507", 151936),
        ("Qwen/Qwen2.5-1.5B-Instruct", 151936),
        ("Qwen/Qwen2.5-Math-7B", 152064),
        ("meta-llama/Llama-3.1-8B-Instruct", 128256),
        ("meta-llama/Llama-2-7b-hf", 32000),
        ("google/gemma-3-1b-it", 262144),
        ("google/gemma-3-4b-it", 262208),
        ("deepseek-ai/DeepSeek-V3", 129280),
        ("openai/gpt-oss-20b", 201088),
    ],
)
def test_models_are_known_by_family_and_by_their_id_on_hugging_face(text, vocab):
    assert presets.vocab_of(text) == vocab


@pytest.mark.parametrize(
    ("names", "dtype"),
    [("float32 fp32 float", torch.float32), ("bfloat16 bf16", BF16), ("float16 fp16 half", torch.float16)],
)
def test_dtypes_have_the_names_that_people_write(names, dtype):
    assert {presets.dtype_of(name) for name in names.split()} == {dtype}


@pytest.mark.parametrize(
    ("convert", "text", "said"),
    [
        (presets.vocab_of, "qwen9", "got vocabulary 'qwen9'; a number, one of qwen3, llama3"),
        (presets.vocab_of, "Qwen/Qwen9-8B", "got model 'Qwen/Qwen9-8B', whose vocabulary is not known here"),
        (presets.vocab_of, "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "as in --vocab 151936"),
        (presets.vocab_of, "0", "got vocabulary '0'"),
        (presets.vocab_of, "²", "got vocabulary '²'"),
        (presets.rows_of, "-1", "got number of rows '-1'; a whole number from 1 on is valid"),
        (presets.rows_of, str(2**31), "below 2^31"),
        (presets.labels_of, "0", "got number of labels '0'"),
        (presets.dtype_of, "float64", "got dtype 'float64'; float32, bfloat16, float16 are valid"),
        (presets.hidden_of, "-1", "got hidden size '-1'; a whole number from 1 on is valid"),
        (presets.memory_of, "1.5GiB", "got memory limit '1.5GiB'; bytes, or a number of KiB, MiB or GiB, as 512MiB"),
        (presets.memory_of, "0", "got memory limit '0'"),
        (presets.mode_of, "entropy", "got mode 'entropy'; forward, backward, inplace are valid"),
        (presets.layout_of, "other", "got layout 'other'; flat, rows, slice are valid"),
        (presets.temperature_of, "hot", "got temperature 'hot'; none, number, per-token are valid"),
    ],
)
def test_what_is_not_known_is_said_with_what_is(convert, text, said):
    with pytest.raises(InputError) as error:
        convert(text)
    assert said in str(error.value)
