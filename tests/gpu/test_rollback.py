"""The rollback suite on a device, bit for bit: needs `pytest --cuda`."""

from __future__ import annotations

import pytest

from tests.kernels.test_rollback import (
    layout,
    plain,
    store,
    test_200_random_operations,
    test_a_checkpoint_goes_on_in_any_memory_used_or_not,
    test_a_position_that_is_gone_is_refused,
    test_every_length_and_every_number_accepted,
    test_rows_have_the_same_bits_in_any_company,
    test_the_whole_batch_twice_and_after_a_short_one,
)

__all__ = [
    "layout",
    "plain",
    "store",
    "test_200_random_operations",
    "test_a_checkpoint_goes_on_in_any_memory_used_or_not",
    "test_a_position_that_is_gone_is_refused",
    "test_every_length_and_every_number_accepted",
    "test_rows_have_the_same_bits_in_any_company",
    "test_the_whole_batch_twice_and_after_a_short_one",
]

pytestmark = pytest.mark.parametrize("backend", ["cuda"], indirect=True)
