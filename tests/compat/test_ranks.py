"""The functions of `compat` on two real ranks; what they go through is in `tests/helpers/compat_rank.py`."""

import pytest

from tests.helpers.ranks import go_through


@pytest.mark.slow
def test_ranks_that_share_a_vocabulary_or_sequences_have_the_numbers_of_the_whole(tmp_path):
    go_through("compat_rank", 2, 5, tmp_path)
