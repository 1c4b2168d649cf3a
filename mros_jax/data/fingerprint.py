"""What a split holds, as one short text: results are known by it, never by a name or a place."""

import hashlib

from mros_jax.data.splits import Split


def fingerprint_split(
    split: Split, *, num_threads: int | None = None, progress: bool = False
) -> str:
    """Compute a digest of everything that a split holds, in its order.

    It covers names, pids, camids, sequences, training labels, and the encoded bytes of each image
    (for rendered images what they are rendered from). It does not depend on where the files lie, or
    on whether they were read from a directory or from prepared records. Take it of a split as
    listed, before unreadable images are left out: repairing one changes it.

    Args:
        split: the split.
        num_threads: reading threads; by default one per CPU.
        progress: show a progress bar.

    Returns:
        32 hexadecimal digits.

    Raises:
        UserError: prepared records do not hold the bytes that were stored in them.
    """
    return combine(split, split.images.digest(num_threads=num_threads, progress=progress))


def combine(split: Split, images: str) -> str:
    """Compute the fingerprint of a split from the digest of its images."""
    total = hashlib.blake2b(digest_size=16)
    for text in (split.name, images, *split.names.tolist()):
        data = text.encode("utf-8", "surrogateescape")
        total.update(len(data).to_bytes(8, "little") + data)
    for column in (split.pids, split.camids, split.sequences, split.labels):
        total.update(b"none" if column is None else column.astype("<i8").tobytes())
    return total.hexdigest()
