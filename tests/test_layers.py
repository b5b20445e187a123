"""Imports point down the layers, lazy ones included."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "compiled_logprobs"
NAME = PACKAGE.name

# From the bottom up; a module may import those of lower layers only.
LAYERS = [
    {"problem", "errors", "formula"},
    {
        "policy",
        "arguments",
        "environment",
        "clock",
        "data_sheets",
        "telemetry",
        "autograd",
        "backends.base",
        "backends.flash_attn_rows",
        "reference",
        "meeting",
        "evidence",
    },
    {"store", "roofline", "shared_library", "generated_code"},
    {"backends.eager", "backends.cpp", "backends.compiled", "backends.flash_attn"},
    {"backends", "records", "view"},
    {"decisions", "inspection"},
    {"neighbours", "archive", "pruning"},
    {"tuning"},
    {"tuning.select"},
    {"tuning.inputs", "tuning.spot_check"},
    {"tuning.findings", "tuning.foreign", "tuning.readings"},
    {"tuning.judge", "tuning.measure", "tuning.causes"},
    {"tuning.gate"},
    {"tuning.worker", "tuning.isolation"},
    {"tuning.tuner"},
    {"tuning.renewal", "tuning.slowest"},
    {"tuning.serving"},
    {"explanation", "profiling", "distributed"},
    {"verification"},
    {"api"},
    {"__init__"},
    {"compat.conventions", "compat.ranks", "compat.originals"},
    {
        "compat.easyr1",
        "compat.verl",
        "compat.skyrl",
        "compat.trl",
        "compat.openrlhf",
        "compat.areal",
        "compat.slime",
        "compat.prime_rl",
        "compat.torchtune",
        "compat.torchforge",
        "compat.torchtitan",
        "compat.roll",
        "compat.rlinf",
        "compat.nemo_rl",
        "compat.patching",
    },
    {"compat"},
    {"printing"},
    {"progress"},
    {"command"},
    {"dashboard"},
    {"dashboard.launch", "dashboard.guard"},
    {"dashboard.server"},
    {"dashboard.palette", "dashboard.facts", "dashboard.rows"},
    {"dashboard.index"},
    {"dashboard.data"},
    {"dashboard.session", "dashboard.verdict", "dashboard.winners", "dashboard.comparison", "dashboard.uploads"},
    {"dashboard.figures"},
    {"dashboard.figures.decide", "dashboard.figures.compare"},
    {"dashboard.report"},
    {"dashboard.app_pages.decide", "dashboard.app_pages.compare", "dashboard.app_pages.profiles"},
    {"dashboard.roof", "dashboard.evidence"},
    {"dashboard.data_memory", "dashboard.figures.throughput", "dashboard.figures.sign_check"},
    {"dashboard.figures.memory"},
    {"dashboard.app_pages.throughput", "dashboard.app_pages.memory", "dashboard.app_pages.sign_check"},
    {"dashboard.jobs"},
    {"dashboard.following"},
    {"dashboard.leaderboard", "dashboard.preflight", "dashboard.machine", "dashboard.figures.live"},
    {"dashboard.app_pages.run", "dashboard.app_pages.live_gpu"},
    {"dashboard.app"},
    {"cli_profiles", "cli_dashboard"},
    {"cli"},
    {"__main__"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    if parts[-1] == "__init__" and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(parts)


def imports(file: Path) -> set[str]:
    """Modules of this package that `file` imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:  # a module of that name, or a name in the module
                submodule = f"{node.module}.{alias.name}"
                found.append(submodule if submodule.removeprefix(f"{NAME}.") in LEVEL else str(node.module))
    return {name.removeprefix(f"{NAME}.") for name in found if name.startswith(f"{NAME}.")} | (
        {"__init__"} if NAME in found else set()
    )


def test_every_module_has_a_layer():
    assert {module_name(file) for file in PACKAGE.rglob("*.py")} == set(LEVEL)


def test_imports_point_down():
    wrong = [
        f"{module} imports {imported}"
        for file in PACKAGE.rglob("*.py")
        if (module := module_name(file))
        for imported in imports(file)
        if LEVEL[imported] >= LEVEL[module]
    ]
    assert not wrong


def test_backends_do_not_import_each_other():
    for file in (PACKAGE / "backends").glob("*.py"):
        if file.stem in ("__init__", "base"):
            continue
        others = {name for name in imports(file) if name.startswith("backends.")} - {"backends.base"}
        assert others <= {f"backends.{file.stem}_rows"}, file


def test_the_reference_shares_no_code_with_what_it_judges():
    assert imports(PACKAGE / "reference.py") == set()
