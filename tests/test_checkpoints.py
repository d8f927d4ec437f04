"""Where Ray Train keeps its checkpoints on an object store."""

from __future__ import annotations

import gc
import pickle
import re
from pathlib import Path

import pyarrow.fs
from s3_server import S3Server

from pipelines.checkpoints import storage


def test_checkpoints_come_and_go_though_the_store_fails(tmp_path: Path) -> None:
    """By all that Ray Train asks of a file system, in another process as well."""
    with S3Server(share=0.2) as server, server.used_here():
        told = storage(server.url("screen", "train", "runs"))
        folder = told["storage_path"] + "/run/epoch_0001"
        files: pyarrow.fs.FileSystem = pickle.loads(pickle.dumps(told["storage_filesystem"]))
        here = tmp_path / "checkpoint"
        here.mkdir()
        for name, content in (("model", b"x" * 300_000), ("manifest.json", b"{}"), ("empty", b"")):
            (here / name).write_bytes(content)
        files.create_dir(folder)
        pyarrow.fs.copy_files(str(here), folder, destination_filesystem=files)
        found = files.get_file_info(pyarrow.fs.FileSelector(folder, recursive=False))
        assert {Path(info.path).name: info.size for info in found} == {"model": 300_000, "manifest.json": 2, "empty": 0}
        (tmp_path / "back").mkdir()
        pyarrow.fs.copy_files(folder, str(tmp_path / "back"), source_filesystem=files)
        assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == {
            path.name: path.read_bytes() for path in here.iterdir()
        }
        files.delete_dir(folder)
        assert files.get_file_info(folder).type == pyarrow.fs.FileType.NotFound
        assert any(not re.search(r" (2..|404)$", ended) for ended in server.counts()), "nothing has failed"


def test_on_a_disk_ray_train_is_left_alone(tmp_path: Path) -> None:
    assert storage(str(tmp_path)) == {"storage_path": str(tmp_path)}


def test_what_is_not_closed_is_not_put() -> None:
    with S3Server() as server, server.used_here():
        told = storage(server.url("screen"))
        files: pyarrow.fs.FileSystem = told["storage_filesystem"]
        whole = files.open_output_stream(told["storage_path"] + "/whole")
        whole.write(b"all")
        whole.close()
        part = files.open_output_stream(told["storage_path"] + "/part")
        part.write(b"a part")
        del part
        gc.collect()
        found = files.get_file_info(pyarrow.fs.FileSelector(told["storage_path"]))
        assert [Path(info.path).name for info in found] == ["whole"]
