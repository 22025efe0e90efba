"""The built-in tasks: the image file, the draws, and that the support set and the query set of a task are disjoint."""

import pytest
import torch

from maml_cuda.data import GlyphTasks, SinusoidTasks, glyphs


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(split: str, n_way: int, k_shot: int, n_query: int) -> GlyphTasks:
    """Glyph tasks in which every pixel of an image is the number of its row."""
    tasks = GlyphTasks(split, n_way, k_shot, n_query)
    number = torch.arange(len(tasks.images)).float() * 15  # sampling divides by 15 grey levels
    tasks.images = number.view(-1, 1, 1, 1).expand_as(tasks.images).contiguous()
    return tasks


def test_glyph_file_holds_what_the_credits_say() -> None:
    images, count, names = glyphs.load_glyphs()
    assert images.shape == (22518, 28, 28)
    assert images.dtype == torch.uint8
    assert int(images.max()) == 15
    assert int(count.sum()) == 22518
    assert len(names) == len(set(names)) == len(count) == 1141


def test_a_damaged_glyph_file_is_refused(tmp_path) -> None:
    content = bytearray(glyphs.FILE.read_bytes())
    damaged = tmp_path / "glyphs.npz"
    damaged.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"glyphs.npz must have 3543760 bytes, got 3543759"):
        glyphs.read_file(damaged)
    content[1000] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"glyphs.npz must have sha256 414ee565.*, got (?!414ee565)"):
        glyphs.read_file(damaged)


def test_no_script_is_in_two_splits() -> None:
    _, _, names = glyphs.load_glyphs()
    scripts = [script for split in glyphs.SCRIPTS.values() for script in split]
    assert sorted(scripts) == sorted({name.split("/")[0] for name in names})
    classes = {split: len(GlyphTasks(split, 2, 1, 1).count) for split in glyphs.SCRIPTS}
    assert classes == {"train": 792, "validation": 51, "test": 298}
    assert glyphs.SCRIPTS["test"] == ("Ethiopic", "Georgian", "Katakana", "Malayalam", "Telugu")


@pytest.mark.parametrize(("n_way", "k_shot", "n_query"), [(5, 1, 15), (3, 4, 2), (51, 16, 1)])
def test_glyph_tasks_are_drawn_without_replacement(n_way: int, k_shot: int, n_query: int) -> None:
    tasks = numbered("validation", n_way, k_shot, n_query)
    class_of = torch.arange(len(tasks.count)).repeat_interleave(tasks.count)
    x_spt, y_spt, x_qry, y_qry = tasks.sample(7, generator())
    assert x_spt.shape == (7, n_way * k_shot, 1, 28, 28)
    assert x_qry.shape == (7, n_way * n_query, 1, 28, 28)
    assert y_spt.dtype == y_qry.dtype == torch.int64
    for task in range(7):
        rows = torch.cat([x_spt[task], x_qry[task]])[:, 0, 0, 0].long()
        assert len(set(rows.tolist())) == n_way * (k_shot + n_query)  # no image twice
        labels = torch.cat([y_spt[task], y_qry[task]])
        pairs = set(zip(labels.tolist(), class_of[rows].tolist(), strict=True))
        assert len(pairs) == len({label for label, _ in pairs}) == len({c for _, c in pairs}) == n_way


def test_every_class_and_every_image_is_drawn() -> None:
    tasks = numbered("validation", 5, 1, 3)
    x_spt, _, x_qry, _ = tasks.sample(2000, generator())
    for x in (x_spt, x_qry):
        assert len(x[..., 0, 0, 0].unique()) == len(tasks.images)


def test_glyph_images_are_those_of_the_split() -> None:
    tasks = GlyphTasks("test", 2, 1, 1)
    images, count, names = glyphs.load_glyphs()
    first = next(i for i, name in enumerate(names) if name.split("/")[0] in glyphs.SCRIPTS["test"])
    assert torch.equal(tasks.images[0, 0], images[int(count[:first].sum())])
    x = tasks.sample(20, generator()).x_qry
    assert float(x.min()) == 0
    assert float(x.max()) == 1
    assert len(x.unique()) == 16  # grey levels


def test_turned_glyphs_are_classes_of_their_own() -> None:
    tasks = GlyphTasks("validation", 5, 1, 1, rotations=3)
    known = {image.numpy().tobytes(): row for row, image in enumerate(tasks.images[:, 0].float().div(15))}
    class_of = torch.arange(len(tasks.count)).repeat_interleave(tasks.count)
    drawn = set()
    for support, query in zip(*tasks.sample(300, generator())[::2], strict=True):
        here = set()
        for a, b in zip(support[:, 0], query[:, 0], strict=True):  # a class's support and its query
            (found,) = ((int(class_of[known[a.rot90(-t).numpy().tobytes()]]), t) for t in range(3)
                        if a.rot90(-t).numpy().tobytes() in known)  # fmt: skip
            assert int(class_of[known[b.rot90(-found[1]).numpy().tobytes()]]) == found[0]
            here.add(found)
        assert len(here) == 5
        drawn |= here
    assert len(drawn) == 3 * 51


@pytest.mark.parametrize("tasks", [GlyphTasks("validation", 5, 2, 3), SinusoidTasks(4, 3)], ids=["glyphs", "sinusoid"])
def test_draws_depend_on_the_generator_alone(tasks) -> None:
    first, again, other = (tasks.sample(3, generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.x_spt, other.x_spt)
    one = generator(1)
    tasks.sample(3, one)
    later = generator()
    later.set_state(one.get_state())
    assert torch.equal(tasks.sample(3, one).x_qry, tasks.sample(3, later).x_qry)
    assert not torch.equal(tasks.sample(3, one).x_qry, first.x_qry)


def test_sinusoids_are_those_of_the_paper() -> None:
    x_spt, y_spt, x_qry, y_qry = (part.double() for part in SinusoidTasks(10, 7).sample(500, generator()))
    assert x_spt.shape == y_spt.shape == (500, 10, 1)
    assert x_qry.shape == y_qry.shape == (500, 7, 1)
    assert -5 <= float(x_qry.min()) < -4.9
    assert 4.9 < float(x_qry.max()) <= 5
    # a sin(x - p) = (a cos p) sin x - (a sin p) cos x, so the support gives a and p.
    solution = torch.linalg.lstsq(torch.cat([x_spt.sin(), x_spt.cos()], -1), y_spt).solution
    assert (torch.cat([x_qry.sin(), x_qry.cos()], -1) @ solution - y_qry).abs().max() < 1e-3
    amplitude = solution.norm(dim=(1, 2))
    phase = torch.atan2(-solution[:, 1, 0], solution[:, 0, 0])
    for values, low, high in ((amplitude, 0.1, 5.0), (phase, 0.0, torch.pi)):
        assert low - 1e-3 < float(values.min()) < low + 0.1
        assert high - 0.1 < float(values.max()) < high + 1e-3
        assert abs(float(values.mean()) - (low + high) / 2) < 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dev", 5, 1, 1), "split must be one of train, validation, test, got 'dev'"),
        (("validation", 52, 1, 1), r"n_way must be 2 to 51 \(validation glyphs\), got 52"),
        (("train", 1, 1, 1), r"n_way must be 2 to 792 \(train glyphs\), got 1"),
        (("test", 5, 10, 8), "k_shot \\+ n_query must be at most 17, .* got k_shot 10 and n_query 8"),
        (("train", 5, 1, 1, 5), "rotations must be 1 to 4 quarter turns, got 5"),
        (("test", 5, 0, 8), "each at least 1 .* got k_shot 0 and n_query 8"),
    ],
)
def test_impossible_glyph_tasks_are_refused(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlyphTasks(*arguments)
