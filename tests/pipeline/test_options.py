"""The table of options checks types and ranges, whoever gives a value."""

from __future__ import annotations

import pytest

from sdjax.core.errors import UserError
from sdjax.pipeline.options import check_value


@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan"), float("inf"), True, "7", [7.0]])
def test_numbers_that_no_float_holds_are_refused(value: object):
    with pytest.raises(UserError, match=r"guidance_scale .*: choose a number of at least 0"):
        check_value("guidance_scale", value)


def test_images_of_a_prompt_are_bounded():
    """Each is a job, made before the first image."""
    assert check_value("num_images", 1000) == 1000
    for value in (10**9, 0, -3, 1.0):
        with pytest.raises(UserError, match=r"num_images .*: choose an integer of 1 to 1048576"):
            check_value("num_images", value)
