"""Files: reading with limits and checksums, atomic writing, and locks on folders."""

from lightpeft.files.locks import check_free, lock_folder
from lightpeft.files.reading import (
    CHECKSUMS,
    SCHEMA_VERSION,
    check_file,
    check_sealed,
    content_checksum,
    explain_content_errors,
    file_checksum,
    parse_json,
    read_json,
    read_tensors,
    read_text,
)
from lightpeft.files.writing import (
    append_line,
    check_vacant,
    clean,
    is_own_file,
    replacing,
    replacing_folder,
    seal,
    write_json,
    write_tensors,
    write_text,
)

__all__ = [
    "CHECKSUMS",
    "SCHEMA_VERSION",
    "append_line",
    "check_file",
    "check_free",
    "check_sealed",
    "check_vacant",
    "clean",
    "content_checksum",
    "explain_content_errors",
    "file_checksum",
    "is_own_file",
    "lock_folder",
    "parse_json",
    "read_json",
    "read_tensors",
    "read_text",
    "replacing",
    "replacing_folder",
    "seal",
    "write_json",
    "write_tensors",
    "write_text",
]
