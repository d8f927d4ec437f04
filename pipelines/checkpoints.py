"""Where Ray Train keeps its checkpoints: on an object store, through the file system that asks again."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
from pyarrow import fs as arrow

from storage_schemas import store


def storage(url: str) -> dict[str, Any]:
    """What Ray Train is told of where its checkpoints go.

    Its own file system would give up a store that does not answer for some seconds, and the training with it.
    """
    if store.is_local(url):
        return {"storage_path": url}
    remote, path = store.filesystem(url)
    return {"storage_path": path, "storage_filesystem": arrow.PyFileSystem(_WholeObjects(remote))}


class _WholeObjects(arrow.FSSpecHandler):
    """Arrow's way to an fsspec file system; what is written is put at once when it is closed."""

    def open_output_stream(self, path: str, metadata: object) -> pa.PythonFile:
        return pa.PythonFile(_Put(self.fs, path), mode="w")


class _Put(io.BytesIO):
    def __init__(self, fs: Any, path: str) -> None:
        super().__init__()
        self._fs, self._path = fs, path

    def close(self) -> None:
        if self.closed:
            return
        data = self.getvalue()
        super().close()
        self._fs.pipe_file(self._path, data)

    def __del__(self) -> None:
        """Put nothing: what is dropped without being closed is a part."""
