"""What no command can do is said on standard error, with exit code 2, before anything is measured or written."""

import pytest
import torch

FUNCTIONS = "tests.helpers.functions_to_check"
CASES = [
    ("check no_such_backend", "InputError: got target 'no_such_backend'; a backend's name (cpp, "),
    ("check no_such_module:function", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
    (f"check {FUNCTIONS}:no_such_function", "cannot be imported: AttributeError"),
    (f"check {FUNCTIONS}:not_a_function", "which is of type int; a function is valid"),
    (f"check {FUNCTIONS}:goood", f"Did you mean {FUNCTIONS}:good?"),
    (f"check {FUNCTIONS}.good", f"Did you mean {FUNCTIONS}:good?"),
    (f"check {FUNCTIONS.replace('.', '/')}.py:good", f"Did you mean {FUNCTIONS}:good?"),
    ("check eagr", "Did you mean eager?"),
    (f"check {FUNCTIONS}:Wrong", "got the class Wrong; a function is valid"),
    ("check eager --vocab qwen99", "got vocabulary 'qwen99'"),
    ("check exits_when_imported:function", "cannot be imported: SystemExit"),
    ("check flash_attn --device cpu", "BackendUnavailable: backend 'flash_attn' cannot run"),
    ("profile --preset huge", "got preset 'huge'; quick, standard, full, rl are valid"),
    ("profile --vocab qwen9", "got vocabulary 'qwen9'"),
    ("profile --vocab ,", "got ',', in which a value is empty"),
    ("profile --rows 64,x", "got number of rows 'x'"),
    ("profile --device cuda:7", "got device='cuda:7', which this torch cannot use here"),
    ("profile --device tpu", "got device='tpu'; e.g. 'cpu' or 'cuda:0' is valid"),
    ("profile --device meta", "profiles are measured on cpu and cuda"),
    (f"profile --backend {FUNCTIONS}:good", "which is a function; a Backend is valid"),
    ("profile --progress jsonl --json", "which both write to standard output"),
    ("profile --out exits_when_imported.py", "ProfileError: the profile exits_when_imported.py/v1/"),
    ("explain --temperature hot", "got temperature 'hot'; none, number, per-token are valid"),
    ("explain --layout other", "got layout 'other'; flat, rows, slice are valid"),
    ("profile --labels 0", "got number of labels '0'"),
    ("show --store nowhere", "'nowhere' does not exist"),
    ("verify --store nowhere", "'nowhere' does not exist"),
    ("prune --store nowhere", "'nowhere' does not exist"),
    ("show --csv --json", "got --csv and --json; one of them is valid"),
    ("export /dev/null --from nowhere", "got --from nowhere, which is no folder; user, bundled or a folder"),
    ("export /dev/null --from .", ". holds no decision for "),
    ("export --all --environment 0", "got --environment and --all; one of them is valid"),
    ("import nowhere", "file 'nowhere' does not exist"),
    ("import exits_when_imported.py", "the archive cannot be used: "),
]


@pytest.mark.parametrize(("arguments", "said"), CASES, ids=[arguments for arguments, _ in CASES])
def test_it_is_said_and_nothing_is_done(run, tuner, tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exits_when_imported.py").write_text("raise SystemExit(0)\n")
    result = run(*arguments.split())
    assert result.exit_code == 2 and result.stdout == "" and not tuner.asked
    assert said in result.stderr and "Traceback" not in result.stderr
