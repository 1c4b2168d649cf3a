"""Download pretrained weights named in mros_jax/assets.toml; resumes, verifies, all or nothing.

    python -m mros_jax.fetch_weights --list
    python -m mros_jax.fetch_weights resnet50_v1 --out weights

A download that stops leaves `<name>.part`, which the next call continues. The final name appears
only after the checksum has been verified.
"""

import argparse
import http.client
import os
import pathlib
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from mros_jax import console
from mros_jax.errors import UserError
from mros_jax.files import cache_directory, find_sha256

ASSETS = pathlib.Path(__file__).with_name("assets.toml")
CHUNK = 1 << 18


class FetchError(UserError):
    """The file could not be had, or is not what it should be."""


def load_assets(path: pathlib.Path = ASSETS) -> dict[str, dict[str, Any]]:
    """What can be had, by name: description, url, sha256_prefix, license, citation."""
    assets: dict[str, dict[str, Any]] = tomllib.loads(path.read_text())["weights"]
    return assets


def fetch(
    url: str,
    target: pathlib.Path,
    sha256_prefix: str,
    *,
    attempts: int = 5,
    wait: float = 2.0,
    timeout: float = 30.0,
    progress: bool = True,
) -> None:
    """Download `url` to `target`, continuing `<target>.part` if there is one.

    Args:
        url: http, https or file address.
        target: final path; it appears by a rename, after verification.
        sha256_prefix: first digits (or all) of the file's SHA-256.
        attempts: connections tried before giving up.
        wait: seconds before the second attempt; doubles with each.
        timeout: seconds without data before a connection counts as dead.
        progress: show a bar.

    Raises:
        FetchError: no connection in all attempts (what came so far is kept), the server refuses,
            or the checksum is wrong (the bad file is deleted).
    """
    if target.exists():
        if find_sha256(target).startswith(sha256_prefix):
            return
        raise FetchError(
            f"{target} exists and its SHA-256 does not start with {sha256_prefix}; move it away"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    error = "nothing was tried"
    for attempt in range(attempts):
        if attempt:
            time.sleep(wait * 2 ** (attempt - 1))
        resumed = part.exists() and part.stat().st_size > 0
        try:
            _receive(url, part, timeout, progress)
        except urllib.error.HTTPError as refusal:
            if refusal.code == 416 and resumed:  # nothing after our end: whole, or of another file
                refusal.close()
            elif refusal.code < 500 and refusal.code not in (408, 429):
                refusal.close()
                raise FetchError(
                    f"{url}: the server answers {refusal.code} {refusal.reason}"
                ) from (refusal)
            else:
                refusal.close()
                error = f"{refusal.code} {refusal.reason}"
                continue
        except (OSError, http.client.HTTPException) as problem:
            error = str(problem) or type(problem).__name__
            continue
        found = find_sha256(part)
        if found.startswith(sha256_prefix):
            os.replace(part, target)
            return
        part.unlink()
        error = f"SHA-256 is {found[:16]}..., expected {sha256_prefix}..."
        if not resumed:  # a whole fresh file with another content will not get better
            raise FetchError(f"{url}: {error}; the file was deleted")
    kept = f"; {part} is kept, call again to continue" if part.exists() else ""
    raise FetchError(f"{url}: gave up after {attempts} attempts, the last one: {error}{kept}")


def _receive(url: str, part: pathlib.Path, timeout: float, progress: bool) -> None:
    """Append what is missing to `part`; OSError if the connection ends early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        if have and not _continues(response, have):
            have = 0  # the server sent the whole file
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        with (
            part.open("ab" if have else "wb") as file,
            console.progress(
                total=total, initial=have, unit="B", unit_scale=True, disable=not progress
            ) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
    if total is not None and size != total:
        raise OSError(f"the connection ended after {size} of {total} bytes")


def _continues(response: Any, have: int) -> bool:
    """Whether the answer is the rest of the file from byte `have` on."""
    if response.status != http.client.PARTIAL_CONTENT:
        return False
    start = response.headers.get("Content-Range", "").removeprefix("bytes ").split("-")[0]
    if start != str(have):
        raise OSError(f"asked for bytes from {have}, the server sends from {start!r}")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Download weights; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m mros_jax.fetch_weights",
        description="Download pretrained weights; a download that stops is continued.",
        allow_abbrev=False,
    )
    assets = load_assets()
    parser.add_argument("name", nargs="?", default="resnet50_v1", choices=sorted(assets))
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=cache_directory("weights"),
        metavar="DIR",
        help="directory (default: %(default)s, where training looks)",
    )
    parser.add_argument("--list", action="store_true", help="show what can be had, and stop")
    args = parser.parse_args(argv)
    if args.list:
        for name, asset in assets.items():
            print(f"{name}: {asset['description']}\n  {asset['url']}\n  {asset['license']}")
        return 0
    asset = assets[args.name]
    target = args.out / asset["url"].rsplit("/", 1)[-1]
    fetch(asset["url"], target, asset["sha256_prefix"])
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
