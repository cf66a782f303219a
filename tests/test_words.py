"""The glossary of CONTRIBUTING is kept."""

from __future__ import annotations

import pytest
import words


@pytest.mark.parametrize("kind", ["openings", "class names", "words", "import circles"])
def test_glossary_is_kept(kind: str):
    assert words.offences()[kind] == []
