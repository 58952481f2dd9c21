"""The errors a user can cause. Each says the thing, its value, what is allowed, and the way out.

MoeliteError
├── UsageError            exit 2   an argument that makes no sense
├── BudgetError           exit 3   the model does not fit the memory named
├── DownloadError         exit 4   the hub or a package index did not deliver
├── OfflineError          exit 5   offline, and not in the local cache
├── CheckpointError       exit 6   a checkpoint that cannot be read
│   └── UnsupportedError  exit 6   a model or setting that moelite does not implement
├── QuantizationError     exit 6   weights that cannot be packed (NaN, inf)
├── StoreError            exit 6   a store that is damaged, foreign or of another version
└── VerificationError     exit 7   a comparison that did not hold
"""

from __future__ import annotations


class MoeliteError(Exception):
    """Base of every error a user can cause.

    message: one or two sentences naming the thing and its value.
    fix: the way out, as something the user can type or do; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


class UsageError(MoeliteError):
    exit_code = 2


class BudgetError(MoeliteError):
    exit_code = 3


class DownloadError(MoeliteError):
    exit_code = 4


class OfflineError(MoeliteError):
    exit_code = 5


class CheckpointError(MoeliteError):
    exit_code = 6


class UnsupportedError(CheckpointError):
    pass


class StoreError(MoeliteError):
    exit_code = 6


class QuantizationError(MoeliteError):
    exit_code = 6


class VerificationError(MoeliteError):
    exit_code = 7
