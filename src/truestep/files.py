"""Files that are whole or not there, and folders that can hold them."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing", "unwritable", "write_whole"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a place to write what becomes the file when the block ends, and is removed if it fails.

    Args:
        path: The file. If there is one it stays as it is until then; where it is a link, what it leads
            to is replaced.

    Raises:
        OSError: The new file can't take its place.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder, "numbers")) as part:
        ...         _ = part.write_text("1 2 3")
        ...     [path.name for path in Path(folder).iterdir()]
        ['numbers']
    """
    path = path.resolve()
    # Beside its place, since a rename is atomic only within a file system.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes a file that is whole or not there.

    Raises:
        OSError: It can't be written; what there was stays as it was.
    """
    with replacing(path) as part:
        part.write_bytes(content)


def unwritable(folder: Path) -> str:
    """Why no file can be made in a folder, or in the one where it would be made; "" where one can.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     unwritable(Path(file.name, "below")) == f"{file.name} is a file"
        True
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        return f"{there} is a file"
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        return f"{there} can't be written ({error.strerror})"
    return ""
