"""Where profiles lie: the user's, the project's and the bundled store, in the order in which they are asked."""

import os
from pathlib import Path

from compiled_logprobs.store.files import ROOT_VARIABLE, VERSION, Store


def user_store() -> Store:
    """Where this user's decisions are kept."""
    if root := os.environ.get(ROOT_VARIABLE):
        return Store(Path(os.path.expanduser(root)))
    from platformdirs import user_data_path

    try:
        return Store(user_data_path("compiled-logprobs"))
    except RuntimeError:  # a user without a home: nothing is there, and whoever stores something is told what to set
        return Store(Path("~", "compiled-logprobs"))


def project_store() -> Store | None:
    """`profiles` in the current folder, if profiles are there."""
    return Store(Path(os.path.abspath("profiles"))) if os.path.isdir(f"profiles/{VERSION}") else None


def bundled_store() -> Store:
    """What came with the package: inside it where it is installed, beside it in a checkout."""
    inside = Path(__file__).parents[1] / "profiles"
    return Store(inside if inside.is_dir() else inside.parents[1] / "profiles")


def stores() -> dict[str, Store]:
    """The user's, the project's and the bundled store, in the order in which they are asked, each folder once."""
    in_order = {"user store": user_store(), "project profiles": project_store(), "bundled profiles": bundled_store()}
    by_folder: dict[str, tuple[str, Store]] = {}
    for label, store in in_order.items():
        if store is not None:
            by_folder.setdefault(os.path.realpath(store.root), (label, store))
    return dict(by_folder.values())
