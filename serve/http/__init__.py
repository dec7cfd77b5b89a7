"""The service over HTTP: routes, formats, pages, and who may ask what. Needs no Ray."""

from serve.http.access import ROUTES, check_binding, check_routes
from serve.http.application import create_app
from serve.http.keys import KeyFileError, add_key, read_keys, remove_keys
from serve.http.openapi import document
from serve.http.protocol import http_protocol, use_http_protocol

__all__ = [
    "ROUTES", "KeyFileError", "add_key", "check_binding", "check_routes", "create_app", "document", "http_protocol",
    "read_keys", "remove_keys", "use_http_protocol",
]  # fmt: skip
