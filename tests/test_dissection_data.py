"""Readers of photos with labels, the colour rule, and the tail sketch."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nad_attr.concepts import (
    CAMVID,
    COLOURS,
    ADE20KData,
    BrodenData,
    Concept,
    ConceptDataError,
    MaskData,
    VOCData,
    WithColours,
    colour_map,
)
from nad_attr.concepts.datasets.label_maps import label_maps, show
from nad_attr.concepts.dissection.thresholds import ExactTail, TailSketch, n_above

Image = pytest.importorskip("PIL.Image")


def save(path: Path, array: Any, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8))
    if mode == "P":
        image = image.convert("L")
        image.putpalette([255 - i // 3 for i in range(768)])
    image.save(path)


def photo(path: Path, size: tuple[int, int] = (6, 8), colour: Any = (255, 0, 0)) -> None:
    save(path, np.full((*size, 3), colour))


# -- thresholds ------------------------------------------------------------------------------------


@pytest.mark.slow
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.005, 0.05, 0.3, 0.9]),
    st.integers(8, 300),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_the_sketch_keeps_its_bound(seed: int, q: float, n_bins: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, 11, 6, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-3, 3, 6, dtype=torch.float64)
    x[:, :, 1] = 0  # dead
    x[:, :, 2].clamp_(min=0, max=0.02)  # saturated at both ends
    x[:15, :, 3] = 0  # wakes up late
    x[:, :, 4] = -x[:, :, 4].abs() - 1e4
    x = x.to(dtype)
    n = 30 * 11
    sketch, exact = TailSketch(6, n, q, n_bins=n_bins), ExactTail(6, n, q)
    for part in x.split(7):
        sketch.add(part)
    for part in x.split(4):
        exact.add(part)
    flat = x.flatten(0, 1).double()
    true = flat.sort(0, descending=True).values[n_above(q, n)]
    assert torch.equal(exact.thresholds(), true)
    found, width = sketch.thresholds(), sketch.errors()
    assert bool((found >= true).all())
    assert bool((found <= true + width).all())
    assert bool(((flat > found).double().mean(0) <= q).all())
    spread, largest = flat.amax(0) - flat.amin(0), flat.abs().amax(0)
    bound = torch.maximum(2 * spread / (n_bins - 2), 2.0**-29 * largest)
    assert bool((width <= bound.clamp(min=1e-300)).all())


@pytest.mark.parametrize("kind", [TailSketch, ExactTail])
def test_a_tail_goes_on_from_its_state_and_ignores_batches(kind: Any) -> None:
    x = torch.randn(40, 50, 3, generator=torch.Generator().manual_seed(1))
    one = kind(3, 2000, 0.01)
    one.add(x)
    for cut in (1, 13, 30):
        two = kind(3, 2000, 0.01)
        for part in x[:cut].split(3):
            two.add(part)
        state = two.state()
        three = kind(3, 2000, 0.01)
        three.restore(state)
        three.add(x[cut:])
        assert torch.equal(three.thresholds(), one.thresholds())
    with pytest.raises(ValueError, match="shape"):
        kind(4, 2000, 0.01).restore(state)


def test_the_sketch_looks_at_the_tail_only(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = 0
    original = TailSketch._take

    def take(self: TailSketch, unit: Any, values: Any, highest: Any) -> None:
        nonlocal counted
        counted += len(values)
        original(self, unit, values, highest)

    monkeypatch.setattr(TailSketch, "_take", take)
    x = torch.randn(400, 100, 2, generator=torch.Generator().manual_seed(1))
    sketch = TailSketch(2, 40_000, 0.005)
    before = sketch.n_bytes
    for part in x.split(10):
        sketch.add(part)
    assert counted < 0.08 * x.numel()
    assert sketch.n_bytes == before


# -- labels and colours ----------------------------------------------------------------------------


def test_overlapping_maps_become_combinations() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(-1, 4, (3, 5, 6), generator=generator)
    found = label_maps([maps, 4, -1], 5, shape=(1, 1))
    for concept in range(4):
        assert torch.equal(show(found, concept), (maps == concept).any(0))
    assert bool(show(found, 4).all())
    assert int(found.n_pixels.sum()) == 30


def plain_colour(red: int, green: int, blue: int) -> str:
    """The documented rule, one pixel at a time."""
    h, s, v = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    h *= 360
    if v < 0.2:
        return "black"
    if s < 0.15:
        return "white" if v > 0.8 else "grey"
    if 10 <= h < 45 and v < 0.65:
        return "brown"
    if (h < 20 or h >= 310) and v > 0.7 and s < 0.55:
        return "pink"
    ends = ((20, "red"), (45, "orange"), (70, "yellow"), (170, "green"), (260, "blue"),
            (310, "purple"), (345, "pink"))  # fmt: skip
    return next((name for end, name in ends if h < end), "red")


def test_colours_follow_the_documented_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 40, 50), generator=generator, dtype=torch.uint8)
    found = colour_map(image)
    expected = [plain_colour(*rgb) for rgb in image.flatten(1).T.tolist()]
    assert [COLOURS[i].name for i in found.flatten().tolist()] == expected
    assert len(set(expected)) == 11
    with pytest.raises(ValueError, match="normalisation"):
        colour_map(torch.full((3, 2, 2), -1.0))
    with pytest.raises(ValueError, match="shape"):
        colour_map(torch.zeros(2, 2))


# -- readers ---------------------------------------------------------------------------------------


def camvid(root: Path, n: int = 2) -> None:
    for i in range(n):
        photo(root / "images" / f"{i}.jpg")
        save(root / "labels" / f"{i}.png", np.full((3, 4), [0, 3, 8, 11]))


def test_index_masks(tmp_path: Path) -> None:
    camvid(tmp_path)
    data = MaskData(tmp_path, CAMVID, ignore_index=11, size=(4, 6), label_size=(6, 8), colours=True)
    image, labels = data[1]
    assert len(data) == 2
    assert image.shape == (3, 4, 6)
    assert image[:, 0, 0].round().tolist() == [1, 0, 0]
    assert labels[0][0].tolist() == [0, 0, 3, 3, 8, 8, -1, -1]
    assert labels[1].shape == (6, 8)
    assert data.concepts[int(labels[1][0, 0])] == Concept("red", "colour")
    wrapped = WithColours(MaskData(tmp_path, CAMVID, ignore_index=11))
    assert wrapped.concepts == data.concepts
    assert torch.equal(wrapped[0][1][1], torch.full((3, 4), 11 + 8))


def test_index_masks_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConceptDataError, match="no folder"):
        MaskData(tmp_path, CAMVID)
    camvid(tmp_path)
    with pytest.raises(ConceptDataError, match="ignore_index"):
        MaskData(tmp_path, CAMVID)[0]
    (tmp_path / "labels" / "1.png").unlink()
    with pytest.raises(ConceptDataError, match=r"1 of 2 photos.*1\.png"):
        MaskData(tmp_path, CAMVID)
    photo(tmp_path / "labels" / "1.png")
    with pytest.raises(ConceptDataError, match="one number for each pixel"):
        MaskData(tmp_path, CAMVID)[1]
    (tmp_path / "images" / "0.jpg").write_bytes(b"nothing")
    with pytest.raises(ConceptDataError, match="not a readable image"):
        MaskData(tmp_path, CAMVID, ignore_index=11)[0]


def test_pascal_voc(tmp_path: Path) -> None:
    photo(tmp_path / "JPEGImages" / "a.jpg")
    save(tmp_path / "SegmentationClass" / "a.png", [[0, 7, 15, 255]], "P")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("a\n")
    (lists / "train.txt").write_text("b\n")
    for split in ("val", None):
        _, labels = VOCData(tmp_path, split)[0]
        assert labels[0].tolist() == [[0, 7, 15, -1]]
    assert VOCData(tmp_path).concepts[7].name == "car"
    for split, message in (("train", "not there"), ("test", "cannot be read")):
        with pytest.raises(ConceptDataError, match=message):
            VOCData(tmp_path, split)


def test_ade20k(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "validation" / "ADE_val_1.jpg")
    save(tmp_path / "annotations" / "validation" / "ADE_val_1.png", [[0, 1, 2]])
    with pytest.raises(ConceptDataError, match="objectInfo150"):
        ADE20KData(tmp_path)
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t1\t1\twall\n2\t0.1\t1\t1\tbuilding, edifice\n"
    )
    (tmp_path / "sceneCategories.txt").write_text("ADE_val_1 street\nADE_train_9 attic\n")
    data = ADE20KData(tmp_path)
    assert [c.name for c in data.concepts] == ["wall", "building", "street"]
    assert data[0][1][0].tolist() == [[-1, 0, 1]]
    assert data[0][1][1] == 2


def broden(root: Path) -> None:
    photo(root / "images" / "opensurfaces" / "1.jpg")
    # Label 300 = 44 + 256: both channels count.
    save(root / "images" / "opensurfaces" / "1_object.png", [[[44, 1, 0], [2, 0, 0], [0, 0, 0]]])
    save(root / "images" / "opensurfaces" / "1_part.png", [[[3, 0, 0], [0, 0, 0], [0, 0, 0]]])
    save(root / "images" / "opensurfaces" / "1_part2.png", [[[0, 0, 0], [3, 0, 0], [0, 0, 0]]])
    (root / "category.csv").write_text("name,first,last,count,frequency\n" + "".join(
        f"{name},1,2,3,4\n" for name in ("object", "part", "scene", "color")
    ))  # fmt: skip
    (root / "label.csv").write_text(
        "number,name,category,frequency,coverage,syns\n0,-,,0,0,\n2,car,object(1),1,1,\n"
        "3,wheel,part(1),1,1,\n4,street-s,scene(1),1,1,\n5,red-c,color(1),1,1,\n"
        "300,tree,object(2),1,1,\n"
    )
    (root / "c_object.csv").write_text(
        "code,number,name,frequency,coverage\n0,0,-,0,0\n1,2,car,1,1\n2,300,tree,1,1\n"
    )
    (root / "index.csv").write_text(
        "image,split,ih,iw,sh,sw,object,part,scene,color\n"
        "opensurfaces/1.jpg,train,6,8,1,3,opensurfaces/1_object.png,"
        "opensurfaces/1_part.png;opensurfaces/1_part2.png,4,\n"
    )


def test_broden(tmp_path: Path) -> None:
    broden(tmp_path)
    data = BrodenData(tmp_path, "train")
    assert [(c.name, c.category) for c in data.concepts] == [
        ("car", "object"), ("tree", "object"), ("wheel", "part"), ("street-s", "scene"),
        ("red-c", "colour"),
    ]  # fmt: skip
    _, labels = data[0]
    assert [each.tolist() for each in labels] == [
        [[1, 0, -1]], [[2, -1, -1]], [[-1, 2, -1]], [[3, 3, 3]],
    ]  # fmt: skip
    assert len(BrodenData(tmp_path, categories=["scene"])[0][1]) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("index.csv", "image,split\n", "no column 'sh'"),
        ("label.csv", "number,name,category\nx,car,object\n", "whole number"),
        ("label.csv", "number,name,category\n2,car,object\n", "label.csv does not"),
        ("category.csv", None, "cannot be read"),
    ],
)
def test_broden_says_what_is_wrong(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    broden(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConceptDataError, match=message):
        BrodenData(tmp_path)
    broden(tmp_path)
    with pytest.raises(ConceptDataError, match="no images of split"):
        BrodenData(tmp_path, "val")
    with pytest.raises(ConceptDataError, match="no category"):
        BrodenData(tmp_path, categories=["sound"])
