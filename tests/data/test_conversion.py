"""The conversion of image data sets: done once, complete or not at all, also with several processes."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from maml_cuda.data import conversion, images
from tests.data import published

# Converts a folder, and waits for a line on standard input before the last image.
SLOW = """
import sys
from maml_cuda.data import image_files as files, images
decode, left = files.decode, 40
def slow(*arguments):
    global left
    left -= 1
    if not left:
        print("reading", flush=True)
        input()
    return decode(*arguments)
files.decode = slow
print(images.folder(sys.argv[1]).sha256)
"""


def process(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def written(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.glob("maml_cuda.*"))


def test_the_second_opening_reads_no_image(tmp_path, monkeypatch) -> None:
    published.birds(tmp_path)
    first = images.folder(tmp_path)
    assert written(tmp_path) == [".json", ".npy"]
    monkeypatch.setattr(conversion, "_write", None)
    again = images.folder(str(tmp_path))
    assert again.sha256 == first.sha256
    for split in conversion.SPLITS:
        assert torch.equal(again.split(split).images, first.split(split).images)
        assert again.split(split).names == first.split(split).names


def test_the_record_says_what_was_converted(tmp_path) -> None:
    published.birds(tmp_path)
    images.folder(tmp_path)
    record = json.loads(next(tmp_path.glob("maml_cuda.folder.*.json")).read_text())
    assert record["format"] == conversion.FORMAT
    assert record["shape"] == [40, 3, 20, 18]
    assert record["offsets"] == list(range(0, 41, 4))
    assert [len(record["names"][split]) for split in conversion.SPLITS] == [6, 2, 2]
    assert len(record["sha256"]) == 64
    assert (tmp_path / record["images"]).stat().st_size == 128 + 40 * 3 * 20 * 18


def test_every_choice_of_options_is_a_conversion_of_its_own(tmp_path, monkeypatch) -> None:
    birds = published.birds(tmp_path, classes=6)
    choices = [{}, {"size": 9}, {"background": "black"}, {"channels": 1}, {"split": (2, 2, 2)}]
    opened = [images.folder(tmp_path, **choice) for choice in choices]
    assert len({each.sha256 for each in opened}) == len(choices)
    assert written(tmp_path) == [".json"] * len(choices) + [".npy"] * len(choices)
    monkeypatch.setattr(conversion, "_write", None)  # all conversions exist already
    for choice, each in zip(choices, opened, strict=True):
        again = images.folder(tmp_path, **choice)
        assert again.sha256 == each.sha256
        assert again.shape == each.shape
        assert torch.equal(again.split("test").images, each.split("test").images)
    monkeypatch.undo()
    changed = tmp_path / "bird 00" / "0.png"
    changed.write_bytes(published.encoded(255 - birds["bird 00"][0]))
    for choice, each in zip(choices, opened, strict=True):
        assert images.folder(tmp_path, **choice).sha256 != each.sha256
    assert written(tmp_path) == [".json"] * len(choices) + [".npy"] * len(choices)


def test_a_published_data_set_keeps_its_conversion_and_checksum(tmp_path) -> None:
    """Conversions of earlier versions are still used, because these data sets have no options."""
    published.fc100(tmp_path)
    facts, total = [], hashlib.sha256()
    for path in (tmp_path / f"FC100_{split}.pickle" for split in ("train", "val", "test")):
        os.utime(path, ns=(1, 10**18))
        facts.append([path.name, path.stat().st_size, 10**18])
        total.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    assert images.fc100(tmp_path).sha256 == total.hexdigest()
    signature = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    assert {path.name for path in tmp_path.glob("maml_cuda.*")} == {
        "maml_cuda.fc100.json", f"maml_cuda.fc100.{signature}.npy"
    }  # fmt: skip


def test_read_only_data_is_converted_in_a_cache_folder(tmp_path, monkeypatch) -> None:
    data, cache = [tmp_path / "here", tmp_path / "there"], tmp_path / "somewhere" / "cache"
    birds = {folder: published.birds(folder, images=2 + number) for number, folder in enumerate(data)}
    before = {folder: sorted(folder.rglob("*")) for folder in data}
    opened = {folder: images.folder(folder, cache=cache) for folder in data}
    for folder in data:
        assert sorted(folder.rglob("*")) == before[folder]
        assert images.folder(folder, cache=str(cache)).sha256 == images.folder(folder).sha256
        for name, part in zip(opened[folder].split("test").names, opened[folder].tensor("test"), strict=True):
            np.testing.assert_array_equal(part.permute(0, 2, 3, 1).numpy(), birds[folder][name])
    assert written(cache) == [".json", ".json", ".npy", ".npy"]  # of two folders, side by side
    monkeypatch.setattr(conversion, "_write", None)
    monkeypatch.chdir(tmp_path)
    images.folder("here", cache=cache)  # the same folder by another name


def test_a_cache_that_is_not_a_folder_is_refused(tmp_path) -> None:
    published.birds(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        OSError, match=r"file must be writable, because the converted images are stored there: .*File exists"
    ):
        images.folder(tmp_path, cache=tmp_path / "file")


def test_changed_images_are_converted_again_and_the_old_array_is_removed(tmp_path) -> None:
    published.birds(tmp_path)
    before = images.folder(tmp_path)
    (tmp_path / "bird 03" / "1.png").write_bytes(published.encoded(published.pixels(77, 20, 18, 3)))
    after = images.folder(tmp_path)
    assert after.sha256 != before.sha256
    assert written(tmp_path) == [".json", ".npy"]
    assert sum(not torch.equal(before.split(s).images, after.split(s).images) for s in conversion.SPLITS) == 1
    (tmp_path / "bird 03" / "9.png").write_bytes(published.encoded(published.pixels(78, 20, 18, 3)))
    assert sum(int(images.folder(tmp_path).split(split).count.sum()) for split in conversion.SPLITS) == 41


@pytest.mark.parametrize("damage", ["truncated", "gone", "no JSON", "another format"])
def test_an_incomplete_conversion_is_made_again(tmp_path, damage: str) -> None:
    published.birds(tmp_path)
    expected = images.folder(tmp_path).split("train").images.clone()
    record, array = (next(tmp_path.glob(f"maml_cuda.folder.*.{kind}")) for kind in ("json", "npy"))
    if damage == "truncated":
        os.truncate(array, 1000)
    elif damage == "gone":
        array.unlink()
    elif damage == "no JSON":
        record.write_text('{"format": 1')
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"format": 0, "names": {}}))
    assert torch.equal(images.folder(tmp_path).split("train").images, expected)
    assert written(tmp_path) == [".json", ".npy"]


def test_the_checksum_is_of_the_images_not_of_their_place_or_time(tmp_path) -> None:
    checksums = set()
    for name in ("here", "there"):
        published.birds(tmp_path / name)
        checksums.add(images.folder(tmp_path / name).sha256)
    os.utime(tmp_path / "there" / "bird 03" / "1.png", (1, 1))
    checksums.add(images.folder(tmp_path / "there").sha256)
    assert len(checksums) == 1


def test_processes_may_convert_at_once_and_the_file_of_a_killed_one_is_removed(tmp_path) -> None:
    published.birds(tmp_path)
    with process(tmp_path) as living, process(tmp_path) as killed:
        for each in (living, killed):
            assert each.stdout is not None
            assert each.stdout.readline() == "reading\n"  # nearly all of the array is written
        killed.send_signal(signal.SIGKILL)
        killed.wait(timeout=60)
        assert written(tmp_path) == [".new", ".new"]
        converted = images.folder(tmp_path)  # removes the file of the killed process, and not that of the other
        assert written(tmp_path) == [".json", ".new", ".npy"]
        before = converted.split("train").images.clone()
        assert living.communicate("go on\n", timeout=60)[0] == f"{converted.sha256}\n"
    assert living.returncode == 0
    assert written(tmp_path) == [".json", ".npy"]
    for each in (converted, images.folder(tmp_path)):  # the mapped array is still valid
        assert torch.equal(each.split("train").images, before)


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch) -> None:
    published.birds(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def interrupt(*arguments) -> None:
        assert written(tmp_path) == [".new"]
        raise KeyboardInterrupt

    monkeypatch.setattr("maml_cuda.data.image_files._decoded", interrupt)
    with pytest.raises(KeyboardInterrupt):
        images.folder(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch) -> None:
    published.birds(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/maml_cuda\.folder\..*npy'"):
        images.folder(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_fills_while_images_are_written_is_named(tmp_path) -> None:
    published.birds(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    size, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/maml_cuda\.folder\..*npy'"):
            images.folder(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch) -> None:
    published.birds(tmp_path)
    open_file = Path.open

    def read_only(path: Path, mode: str = "r", **options):
        if "x" in mode:
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, mode, **options)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(OSError, match=r"stored there: .*Permission denied.*; set cache \(--cache\) to another"):
        images.folder(tmp_path)
