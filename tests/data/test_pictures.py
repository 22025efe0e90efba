"""Pictures: files as a trained net takes them."""

import numpy as np
import pytest
import torch
from PIL import Image

from maml_cuda.data import Pictures, images
from maml_cuda.data.glyphs import load_glyphs
from maml_cuda.data.pictures import find_queries
from tests.data import published


def save(path, pixels: np.ndarray):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def test_pictures_are_resized_coloured_drawn_on_the_background_and_scaled(tmp_path) -> None:
    grey = save(tmp_path / "grey.png", published.pixels(0, 20, 31))
    see_through = published.pixels(1, 9, 9, 4)
    see_through[..., 3] = 0
    clear = save(tmp_path / "clear one.png", see_through)
    x = Pictures(3, 12, 10, background="#ff0080").read([grey, str(clear)])
    resized = Image.open(grey).convert("RGB").resize((10, 12), Image.Resampling.LANCZOS)
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
    assert (x.dtype, x.shape) == (torch.float32, (2, 3, 12, 10))
    assert torch.equal(x[0], expected)
    assert torch.equal(x[1], torch.tensor([255.0, 0.0, 128.0]).view(3, 1, 1).expand(3, 12, 10) / 255)


def test_dark_ink_becomes_light_ink_where_the_net_takes_that(tmp_path) -> None:
    glyphs, _, _ = load_glyphs()
    light = (glyphs[:3].numpy() * 17).astype(np.uint8)
    files = [save(tmp_path / f"light{i}.png", image) for i, image in enumerate(light)]
    files += [save(tmp_path / f"dark{i}.png", 255 - image) for i, image in enumerate(light)]
    x = Pictures(1, 28, 28, light_ink=True).read(files)
    assert torch.equal(x[:3], glyphs[:3].unsqueeze(1).float() / 15)  # the glyphs themselves, to the bit
    assert torch.equal(x[3:], x[:3])
    assert torch.equal(Pictures(1, 28, 28).read(files[3:]), torch.from_numpy(255 - light).unsqueeze(1).float() / 255)


def test_a_folder_of_pictures_is_read_alike(tmp_path) -> None:
    published.birds(tmp_path / "birds", classes=3, size=(11, 14))
    x, y, classes, files = Pictures(3, 8, 8, light_ink=True).read_classes(tmp_path / "birds")
    options = {"size": 8, "channels": 3, "split": (0, 0, 3), "cache": tmp_path / "cache"}
    opened = images.folder(tmp_path / "birds", **options, light_ink=True)
    assert torch.equal(x, opened.split("test").images.float() / 255)
    assert [classes[i] for i in y] == [file.parent.name for file in files]
    assert opened.sha256 != images.folder(tmp_path / "birds", **options).sha256


def test_queries_are_of_known_and_of_unknown_class(tmp_path) -> None:
    names = ["b/2.PNG", "1.png", "a dog/x.jpg", "a dog/.hidden.png"]
    for name in names:
        published.write(tmp_path / name, b"")
    (tmp_path / "empty").mkdir()
    published.write(tmp_path / "notes.txt", b"")
    with pytest.warns(UserWarning, match=r"skipped in .*, not pictures: notes.txt$"):
        found = find_queries(tmp_path, ["a dog", "b"])
    assert found == [(tmp_path / "1.png", ""), (tmp_path / "a dog" / "x.jpg", "a dog"), (tmp_path / "b/2.PNG", "b")]
    with pytest.raises(ValueError, match=r"a dog must be named as a class of the support set \(b, c\), got a dog"):
        find_queries(tmp_path, ["b", "c"])
    published.write(tmp_path / "b" / "old" / "3.png", b"")
    with pytest.raises(ValueError, match=r"b must hold pictures directly in it, got some in folders below, such as"):
        find_queries(tmp_path, ["a dog", "b"])


def test_a_folder_without_pictures_is_refused(tmp_path) -> None:
    pictures = Pictures(1, 4, 4)
    with pytest.raises(FileNotFoundError, match="x must be a folder of pictures, got no folder"):
        pictures.read_classes(tmp_path / "x")
    with pytest.raises(ValueError, match="must hold folders, one for each class, got none"):
        pictures.read_classes(tmp_path)
    with pytest.raises(ValueError, match=r"must hold pictures \(png, jpg, webp, ...\), or folders of pictures"):
        find_queries(tmp_path, ["a"])
    save(tmp_path / "a" / "1.png", published.pixels(0, 4, 4))
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="b must hold pictures of the class b, got none"):
        pictures.read_classes(tmp_path)
    with pytest.raises(FileNotFoundError, match="must be a folder of pictures, got a file"):
        find_queries(tmp_path / "a" / "1.png", ["a"])
    with pytest.raises(ValueError, match="files must be at least one picture, got none"):
        pictures.read([])
