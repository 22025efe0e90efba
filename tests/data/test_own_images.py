"""Folders of the user's own images: other files, transparency, colours, orientation, sizes, splits, read-only data."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maml_cuda.data import Episodes, GlyphTasks, ImageTasks, images
from tests.data import published
from tests.data.opened import SPLITS, assert_same, by_class, refused


def test_a_folder_is_split_by_its_classes(tmp_path) -> None:
    birds = published.birds(tmp_path, classes=12)
    (tmp_path / "bird 00" / ".hidden").write_bytes(b"no image")
    opened = images.folder(tmp_path)
    assert opened.shape == (3, 20, 18)
    splits = {split: opened.split(split).names for split in SPLITS}
    assert len(splits["train"]) == 8
    assert (splits["validation"], splits["test"]) == (
        ["bird 01", "bird 04"],
        ["bird 02", "bird 09"],
    )  # must never change
    assert sorted(name for names in splits.values() for name in names) == sorted(birds)
    for split, names in splits.items():
        assert_same(opened, split, {name: birds[name] for name in names})


def test_a_folder_may_have_folders_for_its_splits(tmp_path) -> None:
    for validation in ("val", "validation"):
        folder = tmp_path / validation
        names = {"train": "finch", validation: "gull", "test": "owl"}
        parts = {split: published.birds(folder / split, 2, name=name) for split, name in names.items()}
        opened = images.folder(folder)
        for split in SPLITS:
            assert_same(opened, split, parts[validation if split == "validation" else split])


def test_grey_images_have_one_channel(tmp_path) -> None:
    birds = published.birds(tmp_path, classes=3, size=(9, 9))
    opened = images.folder(tmp_path)
    assert opened.shape == (1, 9, 9)
    for split in SPLITS:
        assert_same(opened, split, {name: birds[name][..., None] for name in opened.split(split).names})


# -- stray files ---------------------------------------------------------------------------------------------


def test_files_that_are_not_images_are_skipped_with_one_line(tmp_path) -> None:
    birds = published.birds(tmp_path, classes=12)
    for path in (
        "bird 00/Thumbs.db",
        "bird 01/desktop.ini",
        "bird 11/labels.txt",
        "labels.txt",
        "bird 02/thumbs/1.png",
    ):
        published.write(tmp_path / path, b"no image")
    published.write(tmp_path / "__MACOSX" / "bird 00" / "._0.png", b"no image")
    (tmp_path / "empty").mkdir()
    line = (
        f"skipped in {tmp_path}, not images of a class: __MACOSX, bird 00/Thumbs.db, bird 01/desktop.ini and 3 others"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(line)}$") as said:
        opened = images.folder(tmp_path)
    assert [warning.filename for warning in said] == [__file__]
    assert sorted(name for split in SPLITS for name in opened.split(split).names) == sorted(birds)
    for split in SPLITS:
        assert_same(opened, split, {name: birds[name] for name in opened.split(split).names})
    published.write(tmp_path / "bird 05" / "Thumbs.db", b"no image")
    assert images.folder(tmp_path).sha256 == opened.sha256  # no conversion, no warning


def test_a_sorted_data_set_may_have_stray_files(tmp_path) -> None:
    drawn = published.cifar100(tmp_path, "processed")
    name = next(iter(drawn["val"]))
    published.write(tmp_path / "val" / name / "Thumbs.db", b"no image")
    with pytest.warns(UserWarning, match=f"skipped in .*: val/{name}/Thumbs.db$"):
        opened = images.cifar_fs(tmp_path)
    assert_same(opened, "val", drawn["val"])


def test_an_unpacked_data_set_may_have_stray_files(tmp_path) -> None:
    drawn = published.cifar100(tmp_path, "cifar100")
    before = images.cifar_fs(tmp_path).sha256
    name = next(iter(drawn["val"]))
    published.write(tmp_path / "cifar100" / "data" / name / "Thumbs.db", b"no image")
    assert images.cifar_fs(tmp_path).sha256 == before
    assert_same(images.cifar_fs(tmp_path, cache=tmp_path / "cache"), "val", drawn["val"])


def test_images_in_subfolders_of_a_class_are_refused(tmp_path) -> None:
    published.birds(tmp_path / "photographs" / "birds", classes=3)
    refused(images.folder, tmp_path, "the class folder .*photographs must hold images directly in it, got .*0.png")


# -- what an image shows -------------------------------------------------------------------------------------

ORIENTED = {  # EXIF orientation -> what a viewer does with the stored pixels
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: np.rot90,
}


def saved(path: Path, image: Image.Image, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def three_classes(folder: Path, image: Image.Image, kind: str = "png", **options) -> None:
    for name in ("finch", "gull", "owl"):
        saved(folder / name / f"1.{kind}", image, **options)


@pytest.mark.parametrize("orientation", ORIENTED)
def test_the_orientation_of_exif_is_obeyed(tmp_path, orientation: int) -> None:
    stored = published.pixels(orientation, 6, 9, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    three_classes(tmp_path, Image.fromarray(stored), exif=exif)
    (shown,) = by_class(images.folder(tmp_path), "train").values()
    np.testing.assert_array_equal(shown[0], ORIENTED[orientation](stored))


def transparent_images() -> dict[str, tuple[Image.Image, dict, np.ndarray, np.ndarray]]:
    """An image of a Pillow mode, options to save it, its colours ``[4, 4, 3]`` and its opacity ``[4, 4, 1]``."""
    opacity = np.array([0, 255, 0, 255] * 4, np.uint8).reshape(4, 4, 1)
    colours, grey = published.pixels(1, 4, 4, 3), published.pixels(2, 4, 4, 1)
    grey_colours = np.broadcast_to(grey, (4, 4, 3))
    index = np.arange(16, dtype=np.uint8).reshape(4, 4)
    palette = Image.fromarray(index)
    palette.putpalette(colours.tobytes())
    key = np.where(index == 3, 0, 255).astype(np.uint8)[..., None]
    return {
        "RGBA": (Image.fromarray(np.concatenate([colours, opacity], -1)), {}, colours, opacity),
        "LA": (Image.fromarray(np.concatenate([grey, opacity], -1)), {}, grey_colours, opacity),
        "P, bytes": (palette, {"transparency": opacity.tobytes()}, colours, opacity),
        "P, index": (palette, {"transparency": 3}, colours, key),
        "RGB, key": (Image.fromarray(colours), {"transparency": tuple(map(int, colours[0, 3]))}, colours, key),
        "L, key": (Image.fromarray(index), {"transparency": 3}, np.broadcast_to(index[..., None], (4, 4, 3)), key),
    }


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P, bytes", "P, index", "RGB, key", "L, key"])
@pytest.mark.parametrize(
    ("background", "colour"), [(None, 255), ("black", 0), ("#102030", [16, 32, 48]), ("#FFFFFF", 255)]
)
def test_transparent_images_are_drawn_on_the_background(tmp_path, kind: str, background, colour) -> None:
    image, options, colours, opacity = transparent_images()[kind]
    three_classes(tmp_path, image, **options)
    opened = images.folder(tmp_path) if background is None else images.folder(tmp_path, background=background)
    (shown,) = by_class(opened, "train").values()
    expected = np.where(opacity == 255, colours, np.array(colour, np.uint8))
    grey = kind[0] == "L" and background != "#102030"  # on a background of colour a grey image is one of colour
    np.testing.assert_array_equal(shown[0], expected[..., :1] if grey else expected)


def test_half_transparent_pixels_are_blended(tmp_path) -> None:
    colours, opacity = published.pixels(1, 40, 40, 3), published.pixels(2, 40, 40, 1)
    three_classes(tmp_path, Image.fromarray(np.concatenate([colours, opacity], -1)))
    (shown,) = by_class(images.folder(tmp_path, background="#336699"), "train").values()
    share = opacity / 255
    exact = share * colours + (1 - share) * np.array([0x33, 0x66, 0x99])
    assert np.abs(shown[0] - exact).max() <= 1  # Pillow's rounding of its fixed point


@pytest.mark.parametrize("first", ["grey", "colour"])
def test_grey_among_colour_is_read_as_colour_whatever_the_order(tmp_path, first: str) -> None:
    grey, colour = published.pixels(0, 9, 9), published.pixels(1, 9, 9, 3)
    for name in ("finch", "gull", "owl"):
        for number, image in enumerate((grey, colour) if first == "grey" else (colour, grey)):
            published.write(tmp_path / name / f"{number}.png", published.encoded(image))
    as_colour = np.broadcast_to(grey[..., None], (9, 9, 3))
    expected = [as_colour, colour] if first == "grey" else [colour, as_colour]
    opened = images.folder(tmp_path)
    for split in SPLITS:
        (shown,) = by_class(opened, split).values()
        np.testing.assert_array_equal(shown, expected)


def test_the_number_of_channels_can_be_chosen(tmp_path) -> None:
    birds = published.birds(tmp_path / "grey", classes=3, size=(9, 9))
    opened = images.folder(tmp_path / "grey", channels=3)
    for split in SPLITS:
        names = opened.split(split).names
        assert_same(opened, split, {name: np.repeat(birds[name][..., None], 3, -1) for name in names})
    birds = published.birds(tmp_path / "colour", classes=3, size=(9, 9, 3))
    opened = images.folder(tmp_path / "colour", channels=1)
    assert opened.shape == (1, 9, 9)
    for split in SPLITS:
        for name, shown in by_class(opened, split).items():
            luma = birds[name] @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
            assert np.abs(shown[..., 0] - luma).max() <= 1  # Pillow's rounding


def test_images_of_any_size_are_resized(tmp_path) -> None:
    published.birds(tmp_path, classes=2)
    saved(tmp_path / "owl" / "1.jpg", Image.fromarray(published.pixels(0, 31, 45, 3)))
    saved(tmp_path / "owl" / "2.png", Image.fromarray(published.pixels(1, 12, 24)))
    message = "must have 20 x 18 pixels of 3 channels like .*, got 31 x 45 .*; set size .--image-size. to resize"
    refused(images.folder, tmp_path, message)
    for size, width_and_height in ((24, (24, 24)), ((12, 24), (24, 12))):
        opened = images.folder(tmp_path, size=size)
        assert opened.shape == (3, *width_and_height[::-1])
        shown = by_class(opened, next(split for split in SPLITS if "owl" in opened.split(split).names))["owl"]
        for number, file in enumerate(("1.jpg", "2.png")):
            image = Image.open(tmp_path / "owl" / file).convert("RGB")
            resized = image.resize(width_and_height, Image.Resampling.LANCZOS)
            np.testing.assert_array_equal(shown[number], np.asarray(resized))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, r"size must be a number of pixels, at least 1, or \(height, width\), got 0"),
        ({"size": (3, 4, 5)}, r"size must be .*, got \(3, 4, 5\)"),
        ({"size": "84"}, "size must be .*, got '84'"),
        ({"background": "grey"}, "background must be white, black or #rrggbb, got 'grey'"),
        ({"background": "#12345"}, "background must be white, black or #rrggbb, got '#12345'"),
        ({"channels": 4}, "channels must be 1 or 3, got 4"),
        ({"split": (6, 3, 4)}, "split must be three numbers that add up to the 12 classes of .*, got 6/3/4"),
        ({"split": (6, 6)}, "split must be three numbers that add up to the 12 classes of .*, got 6/6"),
        ({"split": (13, -2, 1)}, "split must be three numbers that add up to the 12 classes of .*, got 13/-2/1"),
    ],
)
def test_impossible_options_are_refused(tmp_path, options, message: str) -> None:
    published.birds(tmp_path, classes=12, images=1)
    refused(lambda path: images.folder(path, **options), tmp_path, message)


# -- splits --------------------------------------------------------------------------------------------------


def test_the_split_of_a_folder_can_be_chosen(tmp_path) -> None:
    birds = published.birds(tmp_path, classes=12)
    opened = images.folder(tmp_path, split=(6, 3, 3))
    names = {split: opened.split(split).names for split in SPLITS}
    assert [len(of_split) for of_split in names.values()] == [6, 3, 3]
    assert sorted(name for of_split in names.values() for name in of_split) == sorted(birds)
    assert set(images.folder(tmp_path).split("test").names) <= set(names["test"])  # the same order is cut elsewhere
    for split, of_split in names.items():
        assert_same(opened, split, {name: birds[name] for name in of_split})


def test_too_few_classes_say_how_many_are_needed_and_what_chooses_them(tmp_path) -> None:
    published.birds(tmp_path, classes=20, images=2)
    validation = images.folder(tmp_path).split("validation")
    message = (
        "n_way must be 2 to 3 (validation classes of folder), got 5; 5-way tasks need at least 5 classes in each split"
        ", 15 for all three, and there are 20: set --split TRAIN/VALIDATION/TEST (split= in Python), such as 10/5/5, "
        "or make folders train, val and test"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ImageTasks(validation, n_way=5, k_shot=1, n_query=1)
    ImageTasks(images.folder(tmp_path, split=(10, 5, 5)).split("validation"), n_way=5, k_shot=1, n_query=1)
    with pytest.raises(ValueError, match=r"21 for all three, and there are 20: .* such as 8/6/6 for 6 ways, or make"):
        ImageTasks(validation, n_way=7, k_shot=1, n_query=1)
    with pytest.raises(ValueError, match=r"n_way must be 2 to 3 \(validation classes of folder\), got 1$"):
        ImageTasks(validation, n_way=1, k_shot=1, n_query=1)
    with pytest.raises(ValueError, match=r"n_way must be 2 to 20 \(test classes of folder\), got 21$"):
        ImageTasks(images.folder(tmp_path, split=(0, 0, 20)).split("test"), n_way=21, k_shot=1, n_query=1)


@pytest.mark.parametrize("names", ["Train Val Test", "train valid test", "Training VALID Testing"])
def test_the_folders_of_the_splits_are_known_by_any_usual_name(tmp_path, names: str) -> None:
    birds = {name: published.birds(tmp_path / name, 2, name=f"{name} bird") for name in names.split()}
    opened = images.folder(tmp_path)
    for split, shown in zip(SPLITS, birds.values(), strict=True):
        assert_same(opened, split, shown)
    message = f"split must be left out for .*, whose folders {', '.join(birds)} define the split, got 2/2/2"
    with pytest.raises(ValueError, match=message):
        images.folder(tmp_path, split=(2, 2, 2))
    published.birds(tmp_path / "validation", 2, name="another")
    refused(images.folder, tmp_path, "must have one folder for validation, got ")


def test_a_class_may_be_called_train(tmp_path) -> None:
    for name in ("bus", "car", "train"):
        published.write(tmp_path / name / "1.png", published.encoded(published.pixels(0, 3, 3)))
    opened = images.folder(tmp_path)
    assert sorted(name for split in SPLITS for name in opened.split(split).names) == ["bus", "car", "train"]


def test_folders_beside_those_of_the_splits_are_skipped_with_one_line(tmp_path) -> None:
    for split in SPLITS.values():
        published.birds(tmp_path / split, 2, name=split)
    published.birds(tmp_path / "unlabelled", 1)
    with pytest.warns(UserWarning, match="skipped in .*, not images of a class: unlabelled$"):
        images.folder(tmp_path)


@pytest.mark.parametrize("word", ["val", "valid", "Val", "validation"])
def test_a_split_may_be_called_as_its_folder(tmp_path, word: str) -> None:
    published.birds(tmp_path)
    opened = images.folder(tmp_path)
    assert opened.split(word).names == opened.split("validation").names
    assert opened.split(word).what == "validation classes of folder"
    assert torch.equal(opened.tensor(word), opened.tensor("validation"))
    assert GlyphTasks(word, 5, 1, 1).names == GlyphTasks("validation", 5, 1, 1).names


# -- what the samplers get -----------------------------------------------------------------------------------


def test_episodes_draw_from_the_mapped_images(tmp_path) -> None:
    birds = published.birds(tmp_path)
    opened = images.folder(tmp_path)
    tensor = opened.tensor("train")
    assert tensor.shape == (6, 4, 3, 20, 18)
    assert tensor.data_ptr() == opened.split("train").images.data_ptr()  # no copy
    x = Episodes(tensor, n_way=2, k_shot=1, n_query=3).draw(5, seed=0).x_qry
    known = {image.tobytes() for stack in birds.values() for image in stack}
    assert all(image.permute(1, 2, 0).numpy().tobytes() in known for image in (x * 255).round().byte().flatten(0, 1))


def test_classes_of_different_size_are_used_fully_by_tasks_and_cut_for_episodes(tmp_path) -> None:
    for number, count in enumerate((3, 5, 4, 9, 9)):
        for image in range(count):
            path = tmp_path / ("train" if number < 3 else ("val", "test")[number - 3]) / f"{number}" / f"{image}.png"
            published.write(path, published.encoded(np.full((2, 2), 10 * number + image, np.uint8)))
    opened = images.folder(tmp_path)
    assert opened.split("train").count.tolist() == [3, 5, 4]
    assert opened.tensor("train")[..., 0, 0, 0].tolist() == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]
    tasks = ImageTasks(opened.split("train"), n_way=3, k_shot=1, n_query=1)
    x = tasks.sample(300, torch.Generator().manual_seed(0)).x_spt
    assert sorted((x * 255).round().unique().tolist()) == [0, 1, 2, 10, 11, 12, 13, 14, 20, 21, 22, 23]


def test_classes_must_have_enough_images_and_splits_enough_classes(tmp_path) -> None:
    published.birds(tmp_path)
    opened = images.folder(tmp_path)
    smallest = opened.split("test").names[0]
    message = rf"k_shot \+ n_query must be at most 4, .*of the test classes of folder, {smallest} has the fewest images"
    with pytest.raises(ValueError, match=message):
        ImageTasks(opened.split("test"), n_way=2, k_shot=1, n_query=4)
    with pytest.raises(ValueError, match=r"n_way must be 2 to 2 \(test classes of folder\), got 3"):
        ImageTasks(opened.split("test"), n_way=3, k_shot=1, n_query=1)
    with pytest.raises(ValueError, match="rotations must be 1 where images are not square, got 2 of 20 x 18"):
        ImageTasks(opened.split("test"), n_way=2, k_shot=1, n_query=1, rotations=2)
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'dev'"):
        opened.split("dev")


def test_images_of_a_folder_must_fit_each_other(tmp_path) -> None:
    published.birds(tmp_path)
    odd = tmp_path / "bird 09" / "2.png"
    odd.write_bytes(published.encoded(published.pixels(0, 18, 20, 3)))
    message = r"bird 09/2.png must have 20 x 18 pixels of 3 channels like .*/0.png, got 18 x 20 pixels of 3 channels"
    refused(images.folder, tmp_path, message)
    odd.write_bytes(published.encoded(published.pixels(0, 20, 18, 3))[:-60])
    refused(images.folder, tmp_path, "bird 09/2.png must be a complete image with 8 bits per channel, got: ")
    odd.write_bytes(b"<html>not found</html>")
    refused(images.folder, tmp_path, "bird 09/2.png must be a complete image .* got: cannot identify image file")
    odd.rename(tmp_path / "bird 09" / "2.HEIC")  # a format that Pillow does not read is an error, not skipped
    refused(images.folder, tmp_path, "bird 09/2.HEIC must be a complete image .* got: cannot identify image file")
    (tmp_path / "bird 09" / "2.HEIC").unlink()
    odd.write_bytes(published.encoded(np.zeros((20, 18), np.uint16)))
    refused(
        images.folder,
        tmp_path,
        "bird 09/2.png must be a complete image with 8 bits per channel, got: pixels of mode I;16",
    )


def test_a_folder_without_classes_is_refused(tmp_path) -> None:
    message = "must hold folders, one for each class, got none with images directly in it"
    refused(images.folder, tmp_path, message)
    (tmp_path / "empty").mkdir()
    refused(images.folder, tmp_path, message)
    published.birds(tmp_path / "two", classes=2)
    refused(images.folder, tmp_path / "two", "two must hold at least 3 classes, one for each split, got 2")
    for split in ("train", "val", "test"):
        published.birds(tmp_path / "same" / split, classes=2, name=split if split == "val" else "bird")
    message = "the splits must have different classes, got bird 00 in .*same/train and in .*same/test"
    refused(images.folder, tmp_path / "same", message)
    published.birds(tmp_path / "half" / "train", classes=2)
    published.birds(tmp_path / "half" / "test", classes=2)
    refused(images.folder, tmp_path / "half", "half/val or .*half/validation is missing beside", FileNotFoundError)
