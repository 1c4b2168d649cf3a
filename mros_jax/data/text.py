"""Text that users write: lists of files and tables, in whatever encoding their editor chose."""

import codecs
import csv
import dataclasses
import io
import math
import os
import pathlib
import re
from collections.abc import Sequence

from mros_jax.errors import NotFoundError, UserError

# UTF-32 before UTF-16: its mark in little-endian order begins with the other's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_WHOLE = re.compile(r"([+-]?)0*([0-9]{1,19})(\.0*)?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        line: the line of the file that it begins on, from 1.
        fields: the text under each column, without the blanks around it; None where the row does
            not have as many fields as the header.
        text: the row as it may be shown.
    """

    line: int
    fields: dict[str, str] | None
    text: str


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file in UTF-8, or in UTF-8, UTF-16 or UTF-32 with a byte order mark.

    Returns:
        The text, with line ends as a single newline.

    Raises:
        NotFoundError: there is no such file.
        UserError: it is a directory, or no such text; the message names the line.
    """
    path = pathlib.Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a directory; expected a text file") from error
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is not {encoding.upper()}; save "
            "the file as UTF-8 text"
        ) from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if (place := text.find("\0")) >= 0:
        line = text[:place].count("\n") + 1
        raise UserError(
            f"{path}, line {line}: a NUL character, so it is no text or UTF-16 without a byte "
            "order mark; save the file as UTF-8 text"
        )
    return text


def read_lines(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """Read the lines of a text file that are not blank.

    Returns:
        Their numbers, from 1, and the lines without the blanks around them.

    Raises:
        NotFoundError, UserError: as `read_text`.
    """
    lines = enumerate(read_text(path).split("\n"), 1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def read_table(path: str | os.PathLike[str], required: Sequence[str]) -> list[Row]:
    """Read a CSV file with a header; commas, semicolons or tabs divide its columns.

    Args:
        path: the file; its encoding as for `read_text`.
        required: columns that the header must have. It may have others.

    Raises:
        NotFoundError, UserError: as `read_text`; columns that are missing or there twice; a
            quotation mark that is never closed.
    """
    text = read_text(path)
    header_line = next((line for line in text.split("\n") if line.strip()), "")
    delimiter = next((mark for mark in ",;\t" if mark in header_line), ",")
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    rows: list[Row] = []
    last = 0
    try:
        for values in reader:
            line, last = last + 1, reader.line_num
            fields = [value.strip() for value in values]
            if not any(fields):
                continue
            if header is None:
                header = fields
                _check_header(path, header, required)
                continue
            complete = len(fields) == len(header)
            named = dict(zip(header, fields, strict=True)) if complete else None
            rows.append(Row(line, named, delimiter.join(values)))
    except csv.Error as error:
        raise UserError(f"{path}, line {last + 1}: {error}") from error
    if header is None:
        raise UserError(f"{path} is empty; expected a header {','.join(required)}")
    return rows


def _check_header(
    path: str | os.PathLike[str], header: Sequence[str], required: Sequence[str]
) -> None:
    lacking = [name for name in required if name not in header]
    if lacking:
        raise UserError(
            f"{path}: column {', '.join(lacking)} missing; the header is {','.join(header)}, "
            f"expected {','.join(required)}"
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UserError(f"{path}: column {', '.join(twice)} is there more than once")


def parse_whole(text: str) -> int | None:
    """Parse a whole number that fits 64 bits, "5.0" as spreadsheets write it included, or None."""
    match = _WHOLE.fullmatch(text.strip())
    number = int(match[1] + match[2]) if match else None
    return number if number is not None and fits_64_bits(number) else None


def parse_number(text: str) -> float | None:
    """Parse a finite number, or None."""
    try:
        number = float(text.replace("_", "?"))  # Python takes 1_000
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def fits_64_bits(number: int) -> bool:
    """Whether a whole number lies in -2^63..2^63 - 1."""
    return -(2**63) <= number < 2**63
