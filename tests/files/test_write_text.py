"""Files are written whole or not at all, and devices stay devices."""

import os
from pathlib import Path

from pipeline.files import write_text


def test_a_pipe_or_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """`fourstage compare ... --output /dev/null`, as root, left a machine without its null device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(pipe, "text\n")
        assert os.read(reader, 100) == b"text\n"
    finally:
        os.close(reader)
    assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]
    write_text(Path(os.devnull), "text\n")
    assert Path(os.devnull).is_char_device()
