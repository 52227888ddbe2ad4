"""Debian's checks of both packages find no error; last, since they run beside the other tests."""

from __future__ import annotations

from e2e.trees import Trees


def test_lintian_finds_no_error(trees: Trees) -> None:
    assert not [line for line in trees.lintian.report().splitlines() if line.startswith("E:")]
