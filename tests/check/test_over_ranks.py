"""The check of a function of columns, on two real ranks; what they go through is in `tests/helpers/check_rank.py`."""

import pytest

from tests.helpers.ranks import go_through


@pytest.mark.slow
def test_ranks_check_a_function_together(tmp_path):
    go_through("check_rank", 2, 3, tmp_path)
