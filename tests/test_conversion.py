"""The conversion of image data sets: once, whole or not at all, whoever else converts or is killed meanwhile."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maml_cuda.data import conversion, images

from . import published

OPEN = "import sys; from maml_cuda.data import images; print(images.folder(sys.argv[1]).sha256)"
# The last of the images waits for a line on the standard input.
SLOW = f"""
import maml_cuda.data.image_files as files
decode, left = files.decode, 40
def slow(*arguments):
    global left
    left -= 1
    if not left:
        print("reading", flush=True)
        input()
    return decode(*arguments)
files.decode = slow
{OPEN}
"""


def process(program: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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
    record = json.loads((tmp_path / "maml_cuda.folder.json").read_text())
    assert record["format"] == conversion.FORMAT
    assert record["shape"] == [40, 3, 20, 18]
    assert record["offsets"] == list(range(0, 41, 4))
    assert [len(record["names"][split]) for split in conversion.SPLITS] == [6, 2, 2]
    assert len(record["sha256"]) == 64
    assert (tmp_path / record["images"]).stat().st_size == 128 + 40 * 3 * 20 * 18


def test_changed_images_are_converted_anew_and_the_old_array_goes(tmp_path) -> None:
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
def test_a_conversion_that_is_not_whole_is_made_again(tmp_path, damage: str) -> None:
    published.birds(tmp_path)
    expected = images.folder(tmp_path).split("train").images.clone()
    record, array = tmp_path / "maml_cuda.folder.json", next(tmp_path.glob("*.npy"))
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


def test_two_processes_that_convert_at_once_do_no_harm(tmp_path) -> None:
    published.birds(tmp_path)
    with process(SLOW, tmp_path) as one, process(SLOW, tmp_path) as other:
        for each in (one, other):
            assert each.stdout is not None
            assert each.stdout.readline() == "reading\n"  # both have nearly written an array
        assert written(tmp_path) == [".new", ".new"]
        checksums = {each.communicate("go on\n", timeout=60)[0] for each in (one, other)}
    assert (one.returncode, other.returncode) == (0, 0)
    assert checksums == {images.folder(tmp_path).sha256 + "\n"}
    assert written(tmp_path) == [".json", ".npy"]


def test_a_killed_conversion_leaves_nothing_that_the_next_one_does_not_remove(tmp_path) -> None:
    published.birds(tmp_path)
    with process(SLOW, tmp_path) as living, process(SLOW, tmp_path) as killed:
        for each in (living, killed):
            assert each.stdout is not None
            assert each.stdout.readline() == "reading\n"
        killed.send_signal(signal.SIGKILL)
        killed.wait(timeout=60)
        assert written(tmp_path) == [".new", ".new"]
        images.folder(tmp_path)  # takes away what the killed process left, and leaves alone what the other one writes
        assert written(tmp_path) == [".json", ".new", ".npy"]
        assert living.communicate("go on\n", timeout=60)[0] == images.folder(tmp_path).sha256 + "\n"
    assert written(tmp_path) == [".json", ".npy"]


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
    with pytest.raises(OSError, match="No space left on device"):
        images.folder(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
