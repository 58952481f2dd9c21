"""The error tree: what it says, and the exit code of each branch."""

from __future__ import annotations

import inspect

import pytest

from moelite import errors
from moelite.errors import MoeliteError

ALL = [c for _, c in inspect.getmembers(errors, inspect.isclass)]

EXIT_CODES = {
    "MoeliteError": 1,
    "UsageError": 2,
    "BudgetError": 3,
    "DownloadError": 4,
    "OfflineError": 5,
    "CheckpointError": 6,
    "UnsupportedError": 6,
    "StoreError": 6,
    "QuantizationError": 6,
    "VerificationError": 7,
}


def test_every_error_has_its_documented_exit_code() -> None:
    assert {c.__name__: c.exit_code for c in ALL} == EXIT_CODES


def test_the_docstring_draws_the_whole_tree_with_its_exit_codes() -> None:
    assert errors.__doc__
    for cls in ALL:
        [line] = [x for x in errors.__doc__.splitlines() if cls.__name__ in x.split()[0:4]]
        if cls is not MoeliteError:
            assert f"exit {cls.exit_code}" in line


@pytest.mark.parametrize("cls", ALL)
def test_one_except_catches_them_all(cls) -> None:
    with pytest.raises(MoeliteError):
        raise cls("x")


def test_the_way_out_is_part_of_the_text() -> None:
    error = errors.BudgetError("2 GiB is too little", fix="--ram 3GiB")
    assert str(error) == "2 GiB is too little\n  fix: --ram 3GiB"
    assert (error.message, error.fix) == ("2 GiB is too little", "--ram 3GiB")


def test_an_error_without_a_way_out_is_its_message() -> None:
    assert str(MoeliteError("it broke")) == "it broke"


def test_an_unsupported_checkpoint_is_a_checkpoint_error() -> None:
    assert issubclass(errors.UnsupportedError, errors.CheckpointError)
