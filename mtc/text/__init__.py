"""From documents to windows of token ids, stored once and cut into work units. Without torch."""

from mtc.text.budget import rows_wanted, tokens_wanted
from mtc.text.documents import Piece, check_hub, read_piece, source_pieces
from mtc.text.files import Document, unusable
from mtc.text.in_memory import read_windows
from mtc.text.sources import DataError, Unread, is_hub_dataset, source_listing
from mtc.text.store_writer import TokenStoreWriter
from mtc.text.token_store import (
    StoreInfo,
    TokenStore,
    find_store,
    new_store_url,
    still_serves,
    store_fingerprint,
)
from mtc.text.tokens import TextTokens, TokenTexts, encode_text, special_ids
from mtc.text.windows import SCHEMA, Window, document_id, document_split, make_windows, windows_table
from mtc.text.work import Work, heldout_units, token_batches, work_units

__all__ = [
    "SCHEMA", "DataError", "Document", "Piece", "StoreInfo", "TextTokens", "TokenStore", "TokenStoreWriter",
    "TokenTexts", "Unread", "Window", "Work", "check_hub", "document_id", "document_split", "encode_text", "find_store",
    "heldout_units", "is_hub_dataset", "make_windows", "new_store_url", "read_piece", "read_windows", "rows_wanted",
    "source_listing",
    "source_pieces", "special_ids", "still_serves", "store_fingerprint", "token_batches", "tokens_wanted", "unusable",
    "windows_table", "work_units",
]  # fmt: skip
