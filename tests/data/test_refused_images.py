"""Image data sets that are missing, damaged or malicious are refused, and no file is left behind."""

import hashlib
import os
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from maml_cuda.data import images
from tests.data import published
from tests.data.opened import SPLITS, check_mini_imagenet, official, refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("omniglot", r"Omniglot is not in .*images_background.zip or the folder images_background; .* https://github.com/"
         "brendenlake/omniglot/raw/master/python/"),
        ("mini-imagenet", r"mini-ImageNet is not in .*: there must be mini-imagenet-cache-\{train,val,test\}.pkl, .*"
         "mini-imagenet.tar.gz, .*train.csv.* https://zenodo.org/record/7978538"),
        ("cifar-fs", r"CIFAR-FS is not in .*CIFAR_FS_\{train,val,test\}.pickle, .*cifar100.zip .*; .* https://github.com/"
         r"kjunelee/MetaOptNet .*https://zenodo.org/record/7978538"),
        ("fc100", r"FC100 is not in .*FC100_\{train,val,test\}.pickle .*; .* https://github.com/kjunelee/MetaOptNet"),
        ("tiered-imagenet", r"tiered-ImageNet is not in .*_images_png.pkl .*_images.npz, .* https://github.com/renmengye/"
         "few-shot-ssl-public, https://github.com/kjunelee/MetaOptNet"),
    ],
)  # fmt: skip
def test_missing_files_are_named_with_where_they_are_published(tmp_path, name: str, message: str) -> None:
    refused(images.OPEN[name], tmp_path, message, FileNotFoundError)
    with pytest.raises(FileNotFoundError, match=rf"nowhere must be a folder of images \({name}\), got no folder"):
        images.OPEN[name](tmp_path / "nowhere")


def test_one_missing_file_is_named(tmp_path) -> None:
    published.cifar_fs(tmp_path)
    (tmp_path / "CIFAR_FS_val.pickle").unlink()
    message = "CIFAR_FS_val.pickle or .*CIFAR_FS_validation.pickle is missing beside CIFAR_FS_train.pickle"
    refused(images.cifar_fs, tmp_path, message, FileNotFoundError)
    published.mini_imagenet_files(tmp_path / "mini")
    next((tmp_path / "mini" / "images").glob("*2.jpg")).unlink()
    refused(
        images.mini_imagenet, tmp_path / "mini", r"2.jpg is missing, which line \d+ of .*csv names", FileNotFoundError
    )


@pytest.mark.parametrize("name", ["omniglot", "mini-imagenet", "cifar-fs", "fc100", "tiered-imagenet"])
def test_the_hdf5_files_of_torchmeta_are_refused(tmp_path, name: str) -> None:
    published.write(tmp_path / "train_data.hdf5", b"\x89HDF\r\n\x1a\n")
    message = r"it is published at .*\. train_data.hdf5 is in torchmeta's own format, which is not supported"
    refused(images.OPEN[name], tmp_path, message, FileNotFoundError)


def test_the_archive_that_torchmeta_leaves_is_read(tmp_path, monkeypatch) -> None:
    data = published.mini_imagenet_archive(tmp_path)
    for split in SPLITS.values():
        published.write(tmp_path / f"{split}_data.hdf5", b"\x89HDF\r\n\x1a\n")
    official(monkeypatch, "MINI_IMAGENET_MD5", tmp_path / "mini-imagenet.tar.gz")
    check_mini_imagenet(images.mini_imagenet(tmp_path), data)


def test_a_damaged_cifar100_is_refused(tmp_path) -> None:
    zipped, folder = tmp_path / "zipped", tmp_path / "folder"
    published.cifar100(zipped, "cifar100.zip")
    published.cifar100(folder, "cifar100")
    archive = zipped / "cifar100.zip"
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-1000])
    refused(images.cifar_fs, zipped, "cifar100.zip must be a complete zip archive, got: ")
    table = b"splits/bertinetto/train.txt"
    at = whole.index(table) + len(table) + 8  # in the content of the first table, which invalidates its checksum
    archive.write_bytes(whole[:at] + b"?" + whole[at + 1 :])
    refused(
        images.cifar_fs, zipped, "splits/bertinetto/train.txt in .*cifar100.zip must be a complete text file, got: "
    )
    at = whole.index(b"IDAT") + 60  # in an image
    archive.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    refused(images.cifar_fs, zipped, r"cifar100/data/.*png must be a complete image with 8 bits per channel, got: ")
    tables = folder / "cifar100" / "splits" / "bertinetto"
    train, test = (tables / f"{split}.txt" for split in ("train", "test"))
    name = train.read_text().split()[0]
    words = test.read_text()
    test.write_text(f"{words}\n{name}")
    message = f"different classes, got {name} in splits/bertinetto/train.txt and splits/bertinetto/test.txt"
    refused(images.cifar_fs, folder, message)
    test.write_text(words + "\nunicorn")
    message = "cifar100 must hold images in data/unicorn, which splits/bertinetto/test.txt names, got none"
    refused(images.cifar_fs, folder, message)
    test.write_text(words.split("\n", 1)[1])
    refused(images.cifar_fs, folder, r"train, validation, test must have \(64, 16, 20\) classes, got \(64, 16, 19\)")
    test.write_bytes(b"\xff")
    refused(images.cifar_fs, folder, "splits/bertinetto/test.txt in .*cifar100 must be a complete text file, got: ")
    test.rename(tables / "testing.txt")
    refused(images.cifar_fs, folder, "cifar100 must hold splits/bertinetto/test.txt, a class a line")


def test_damaged_arrays_of_tiered_imagenet_are_refused(tmp_path) -> None:
    published.tiered_imagenet_metaoptnet(tmp_path)
    path = tmp_path / "test_images.npz"  # after two splits were written
    whole = path.read_bytes()
    wanted = "test_images.npz must be a complete .npz file with the array images, got: "
    path.write_bytes(whole[:-1000])
    refused(images.tiered_imagenet, tmp_path, wanted)
    path.write_bytes(whole[:4000] + bytes([whole[4000] ^ 255]) + whole[4001:])
    refused(images.tiered_imagenet, tmp_path, wanted + "Bad CRC-32")
    victim = tmp_path / "victim"
    for content in ({"pictures": np.zeros(1)}, {"images": np.array([Hostile(os.mkdir, str(victim))], object)}):
        np.savez(path, **content)
        refused(images.tiered_imagenet, tmp_path, wanted)
        assert not victim.exists()
    np.savez(path, images=np.zeros((2, 4, 4), np.uint8))
    refused(images.tiered_imagenet, tmp_path, r"test_images.npz must be uint8 .*, got uint8 \[2, 4, 4\]")
    np.savez(path, images=np.zeros((2, 4, 4, 3), np.uint8))
    refused(images.tiered_imagenet, tmp_path, "test_labels.pkl must have 2 integer labels")
    path.unlink()
    message = "test_images.npz is missing beside train_images.npz and val_images.npz"
    refused(images.tiered_imagenet, tmp_path, message, FileNotFoundError)


def test_a_damaged_zip_of_pickles_is_refused(tmp_path) -> None:
    published.zipped(tmp_path, "FC100.zip", published.fc100)
    path = tmp_path / "FC100.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    refused(images.fc100, tmp_path, "FC100.zip must be a complete zip archive, got: ")
    path.write_bytes(whole[:4000] + bytes([whole[4000] ^ 255]) + whole[4001:])
    refused(images.fc100, tmp_path, "FC100_test.pickle in .*FC100.zip must be a complete pickle of arrays, got: ")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("FC100_train.pickle", pickle.dumps(Hostile(os.mkdir, str(tmp_path / "victim"))))
    refused(images.fc100, tmp_path, "FC100_train.pickle in .*got: it refers to posix.mkdir, which is not allowed")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("README", b"")
    refused(images.fc100, tmp_path, "FC100.zip must hold FC100_train.pickle")


def test_an_archive_must_have_the_published_md5(tmp_path) -> None:
    published.write(tmp_path / "images_background.zip", b"PK a download that was cut")
    published.write(tmp_path / "images_evaluation.zip", b"PK")
    got = hashlib.md5(b"PK a download that was cut").hexdigest()
    message = (
        rf"images_background.zip must have md5 68d2efa1b9178cc56df9314c21c6e718, got {got}: the download is incomplete"
    )
    refused(images.omniglot, tmp_path, message)
    published.write(tmp_path / "mini-imagenet.tar.gz", b"")
    refused(
        images.mini_imagenet, tmp_path, "mini-imagenet.tar.gz must have md5 b38f1eb4251fb9459ecc8e7febf9b2eb, got d41d8"
    )
    published.write(tmp_path / "tiered-imagenet.tar", b"")
    refused(images.tiered_imagenet, tmp_path, "must have md5 e07e811b9f29362d159a9edd0d838c62, got d41d8")


def test_a_damaged_archive_of_the_right_md5_is_refused_too(tmp_path, monkeypatch) -> None:
    for name in ("images_background.zip", "images_evaluation.zip"):
        published.write(tmp_path / name, b"no zip")
    official(monkeypatch, "OMNIGLOT_MD5", *tmp_path.glob("*.zip"))
    refused(
        images.omniglot, tmp_path, "images_background.zip must be a complete zip archive, got: File is not a zip file"
    )
    published.write(tmp_path / "mini-imagenet.tar.gz", b"no tar")
    official(monkeypatch, "MINI_IMAGENET_MD5", tmp_path / "mini-imagenet.tar.gz")
    refused(images.mini_imagenet, tmp_path, "mini-imagenet.tar.gz must be a complete tar archive, got: ")
    with tarfile.open(tmp_path / "mini-imagenet.tar.gz", "w:gz"):
        pass
    official(monkeypatch, "MINI_IMAGENET_MD5", tmp_path / "mini-imagenet.tar.gz")
    refused(images.mini_imagenet, tmp_path, "mini-imagenet.tar.gz must hold mini-imagenet-cache-train.pkl")


class Hostile:
    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_executes_nothing(tmp_path, hidden: bool, protocol: int) -> None:
    data = published.cifar_fs(tmp_path)
    victim = tmp_path / "victim"
    for bomb, asked in (
        (Hostile(os.mkdir, str(victim)), "posix.mkdir"),
        (Hostile(exec, f"import os; os.mkdir({str(victim)!r})"), "(__builtin__|builtins).exec"),
        (Hostile(getattr, "text", "upper"), "(__builtin__|builtins).getattr"),
        (Hostile(np.load, str(victim)), "numpy.load"),
    ):
        content = {"labels": bomb, "data": data["train"]["data"]} if hidden else bomb
        (tmp_path / "CIFAR_FS_train.pickle").write_bytes(pickle.dumps(content, protocol))
        message = f"CIFAR_FS_train.pickle must be a complete pickle of arrays, got: it refers to {asked}, which is not"
        refused(images.cifar_fs, tmp_path, message)
        assert not victim.exists()


def test_a_pickle_cannot_turn_numbers_into_pointers(tmp_path) -> None:
    published.cifar_fs(tmp_path)
    path = tmp_path / "CIFAR_FS_train.pickle"
    plain = published.python2({"data": np.arange(8, dtype=np.uint64), "labels": []})
    state = b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"J" + bytes(4)  # of a dtype; its last number holds flags
    assert state in plain
    # NumPy's own dtype would read these flags as an array of objects.
    path.write_bytes(plain.replace(state, state[:-4] + b"\x3f\0\0\0"))
    refused(images.cifar_fs, tmp_path, r"must be uint8 \[images, height, width, 3\], got uint64 \[8\]")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a complete pickle of arrays, got: Ran out of input"),
        (b"no pickle", "must be a complete pickle of arrays, got: "),
        (published.python2([1]), "must hold a dict of data and labels, got list"),
        (published.python2({"data": 1}), "must hold a dict of data and labels, got a dict of data"),
        (published.python2({"data": 1, "labels": []}), "uint8 .images, height, width, 3., got int"),
        (published.python2({"data": np.zeros((2, 4, 4, 3)), "labels": []}), r"got float64 \[2, 4, 4, 3\]"),
        (published.python2({"data": np.zeros(2, "S3"), "labels": []}), "got: its arrays must hold numbers, got 'S3'"),
        (published.python2({"data": published.pixels(0, 2, 4, 4, 3), "labels": [0]}), "must have 2 integer labels"),
        (published.python2({"data": published.pixels(0, 2, 4, 4, 3), "labels": ["a", "b"]}), "2 integer labels"),
        (published.python2({"data": published.pixels(0, 2, 4, 4, 3), "labels": [0, 1]}),
         r"train, validation, test must have \(64, 16, 20\) classes, got \(2, 16, 20\)"),
    ],
)  # fmt: skip
def test_a_pickle_of_something_else_is_refused(tmp_path, content: bytes, message: str) -> None:
    for split in ("val", "test"):
        data = {
            "data": published.pixels(0, published.MINI[split], 4, 4, 3),
            "labels": list(range(published.MINI[split])),
        }
        published.write(tmp_path / f"CIFAR_FS_{split}.pickle", published.python2(data))
    published.write(tmp_path / "CIFAR_FS_train.pickle", content)
    refused(images.cifar_fs, tmp_path, message)


def test_a_truncated_pickle_is_refused(tmp_path) -> None:
    published.cifar_fs(tmp_path)
    path = tmp_path / "CIFAR_FS_test.pickle"  # after two splits were written
    path.write_bytes(path.read_bytes()[:-1000])
    refused(images.cifar_fs, tmp_path, "CIFAR_FS_test.pickle must be a complete pickle of arrays, got: ")


def test_pickles_that_contradict_themselves_are_refused(tmp_path) -> None:
    published.mini_imagenet_pickles(tmp_path / "mini")
    path = tmp_path / "mini" / "mini-imagenet-cache-train.pkl"
    data = published.mini_imagenet_pickle("train")
    path.write_bytes(published.python2(data | {"class_dict": {"n01": [0, 192]}}))
    refused(images.mini_imagenet, tmp_path / "mini", "cache-train.pkl must name images 0 to 191, got 192")
    path.write_bytes(published.python2(data | {"class_dict": [0]}))
    refused(images.mini_imagenet, tmp_path / "mini", "class_dict of .*cache-train.pkl must be a dict, got list")
    path.write_bytes(published.python2(data | {"class_dict": {"n01": []}}))
    refused(images.mini_imagenet, tmp_path / "mini", "class n01 of train must have images, got none")
    published.tiered_imagenet(tmp_path / "tiered")
    labels, pictures = (tmp_path / "tiered" / name for name in ("train_labels.pkl", "train_images_png.pkl"))
    pictures.write_bytes(published.python2([published.pixels(0, 50)]))
    labels.write_bytes(published.python2({"label_specific": [0], "label_specific_str": ["cat"]}))
    refused(images.tiered_imagenet, tmp_path / "tiered", "image 0 of .*train_images_png.pkl must be a complete image")
    labels.write_bytes(published.python2({"label_specific": [1], "label_specific_str": ["cat"]}))
    refused(images.tiered_imagenet, tmp_path / "tiered", "label_specific of .*labels.pkl must be 0 to 0, got 1")
    pictures.write_bytes(published.python2(["text"]))
    refused(images.tiered_imagenet, tmp_path / "tiered", "must hold a list of uint8 arrays, each a PNG file")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("label,filename\n", "train.csv must begin with the line filename,label, got 'label,filename'"),
        ("", "train.csv must begin with the line filename,label, got ''"),
        ("filename,label\na.jpg\n", "line 2 of .*train.csv must be filename,label, got 'a.jpg'"),
    ],
)
def test_a_csv_file_of_another_form_is_refused(tmp_path, table: str, message: str) -> None:
    for split in ("train", "val", "test"):
        published.write(tmp_path / f"{split}.csv", table.encode())
    refused(images.mini_imagenet, tmp_path, message)


def test_a_set_of_other_characters_is_not_omniglot(tmp_path) -> None:
    drawing = published.encoded(published.pixels(0, 105, 105) < 20)
    for half in ("images_background", "images_evaluation"):
        published.write(tmp_path / half / f"Letters of {half}" / "character01" / "0001_01.png", drawing)
    refused(images.omniglot, tmp_path, "must have 1623 characters together, got 2")


def test_pillow_is_named_if_it_is_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    images.cifar_fs(_written(published.cifar_fs, tmp_path / "pickles"))  # needs none
    published.write(tmp_path / "files" / "a" / "1.png", b"")
    published.write(tmp_path / "files" / "b" / "1.png", b"")
    published.write(tmp_path / "files" / "c" / "1.png", b"")
    message = re.escape('Pillow must be installed to read image files: pip install "maml-cuda[images]"')
    refused(images.folder, tmp_path / "files", message, ModuleNotFoundError)


def _written(write, folder: Path) -> Path:
    write(folder)
    return folder
