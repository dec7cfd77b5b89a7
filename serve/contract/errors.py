"""What goes wrong in a way that a client is to be told of."""

from __future__ import annotations

from typing import Any


class ServiceError(Exception):
    """An answer of `status` with the error shape, `serve.contract.ErrorResponse`."""

    def __init__(
        self, status: int, error_type: str, message: str, detail: Any = None, headers: dict[str, str] | None = None
    ):
        super().__init__(status, error_type, message, detail, headers)  # all arguments: it must survive pickling
        self.status, self.error_type, self.message = status, error_type, message
        self.detail, self.headers = detail, headers

    def __str__(self) -> str:
        return self.message
