"""Images: the splits are disjoint, stable and spread over the classes; wrong folders are refused by name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from prunevit.data import DIGITS_CFG, SPLITS, data_config, load_data
from prunevit.errors import DataError

DIGITS = data_config(DIGITS_CFG, (1, 8, 8))


def make_folder(root: Path, classes: dict[str, int], size: int = 12) -> Path:
    """Class folders of plain images, each of another colour."""
    for place, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (size, size), (40 * place + 10, 3 * i, 120)).save(root / name / f"{i}.png")
    return root


def paths(data: Any, split: str) -> list[str]:
    return [path for path, _ in data.splits[split].samples]


def labels(loader: Any) -> list[int]:
    return torch.cat([label for _, label in loader]).tolist()


def test_the_splits_of_the_digits_are_disjoint_and_whole() -> None:
    data = load_data("digits")
    images = [data.splits[split].images.flatten(1) for split in SPLITS]
    sizes = [len(part) for part in images]
    assert sum(sizes) == 1797
    assert min(sizes) >= 100
    # the data set has no two equal images, so that a shared one would be missing here
    assert len(torch.cat(images).unique(dim=0)) == 1797


def test_the_splits_do_not_depend_on_the_seed_of_a_run() -> None:
    torch.manual_seed(1)
    first = load_data("digits").splits["test"].labels
    torch.manual_seed(2)
    assert torch.equal(first, load_data("digits").splits["test"].labels)


def test_digits_come_normalised_and_in_order_where_not_augmented() -> None:
    data = load_data("digits")
    whole = torch.cat([images for images, _ in data.loader("train", DIGITS)])
    assert whole.shape == (data.size("train"), 1, 8, 8)
    assert abs(float(whole.mean())) < 0.05
    assert abs(float(whole.std()) - 1) < 0.05
    again = torch.cat([images for images, _ in data.loader("train", DIGITS, batch_size=7)])
    assert torch.equal(whole, again)


def test_augmented_digits_differ_by_epoch_and_repeat_with_the_seed() -> None:
    data = load_data("digits")
    loader = data.loader("train", DIGITS, augment=True, seed=3)
    first, second = next(iter(loader))[0], next(iter(loader))[0]
    assert not torch.equal(first, second)
    assert torch.equal(first, next(iter(data.loader("train", DIGITS, augment=True, seed=3)))[0])
    assert not torch.equal(first, next(iter(data.loader("train", DIGITS, augment=True, seed=4)))[0])


def test_digits_take_the_size_and_channels_of_a_model() -> None:
    images, _ = next(iter(load_data("digits").loader("test", data_config({}, (3, 24, 24)), batch_size=5)))
    assert images.shape == (5, 3, 24, 24)


def test_images_of_every_extension_that_torchvision_reads_are_read(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    for i, suffix in enumerate((".webp", ".BMP", ".tiff", ".png", ".jpg")):
        Image.new("RGB", (12, 12), (40 * i, 0, 0)).save(tmp_path / "dog" / f"{i}{suffix}")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    data = load_data(str(tmp_path))
    found = [Path(path).name for split in SPLITS if split in data.splits for path in paths(data, split)]
    assert sorted(found) == ["0.webp", "1.BMP", "2.tiff", "3.png", "4.jpg"]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"expected images \(\.jpg .*\.webp\) in the class folders of .*, got none"):
        load_data(str(tmp_path))


def test_few_calibration_images_are_spread_over_the_classes() -> None:
    ((_, found),) = load_data("digits").loader("calibration", DIGITS, images=64)
    counts = found.bincount(minlength=10)
    assert len(found) == 64
    assert int(counts.max() - counts.min()) <= 1


def test_missing_scikit_learn_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"scikit-learn.*prunevit\[demo\]"):
        load_data("digits")


def test_one_folder_is_split_by_name_and_each_class_is_in_each_split(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", {"ant": 20, "bee": 20})
    data = load_data(root, num_classes=2)
    parts = {split: set(paths(data, split)) for split in SPLITS}
    sizes = {split: len(part) for split, part in parts.items()}
    assert sizes == {"train": 24, "calibration": 4, "validation": 4, "test": 8}
    assert len(set.union(*parts.values())) == 40
    for split in SPLITS:
        assert {Path(path).parent.name for path in parts[split]} == {"ant", "bee"}
    assert data.label_names == ("ant", "bee")


def test_a_folder_elsewhere_is_split_alike(tmp_path: Path) -> None:
    classes = {"ant": 15, "bee": 15}
    one, other = (load_data(make_folder(tmp_path / name, classes)) for name in ("one", "two/deeper"))
    for split in SPLITS:
        names = [[Path(path).parts[-2:] for path in paths(data, split)] for data in (one, other)]
        assert names[0] == names[1]


@pytest.mark.parametrize(
    ("folders", "from_train"),
    [
        (("train", "val"), ("train", "calibration", "validation")),
        (("training", "validation", "test"), ("train", "calibration")),
        (("train", "test"), ("train", "calibration", "validation")),
    ],
    ids=["train_val", "train_validation_test", "train_test"],
)
def test_split_folders_are_kept_apart(tmp_path: Path, folders: Sequence[str], from_train: Sequence[str]) -> None:
    for name in folders:
        make_folder(tmp_path / name, {"ant": 12, "bee": 12})
    data = load_data(tmp_path, num_classes=2)
    for split in SPLITS:
        sources = {Path(path).relative_to(tmp_path).parts[0] for path in paths(data, split)}
        assert len(sources) == 1
        assert (sources == {folders[0]}) == (split in from_train)
    assert data.size("test") == 24
    together = [path for split in SPLITS for path in paths(data, split)]
    assert len(together) == len(set(together)) == 24 * len(folders)


def test_held_out_images_alone_can_be_evaluated_on(tmp_path: Path) -> None:
    make_folder(tmp_path / "val", {"ant": 3, "bee": 3})
    data = load_data(tmp_path)
    assert data.size("test") == 6
    with pytest.raises(DataError, match="images in the train split"):
        data.loader("train", data_config({}, (3, 8, 8)))


def test_a_folder_gives_what_the_data_config_says(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", {"ant": 10, "bee": 10}, size=30)
    config = data_config({"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}, (3, 16, 16))
    data = load_data(root)
    images, found = next(iter(data.loader("test", config)))
    assert images.shape == (4, 3, 16, 16)
    path = paths(data, "test")[0]
    red = Image.open(path).getpixel((0, 0))[0] / 255  # type: ignore[index]
    assert torch.allclose(images[0, 0], torch.tensor((red - 0.5) / 0.5), atol=1e-6)
    assert sorted(found.tolist()) == [0, 0, 1, 1]
    grey, _ = next(iter(data.loader("test", data_config({"mean": (0.5,), "std": (0.5,)}, (1, 16, 16)))))
    assert grey.shape == (4, 1, 16, 16)
    trained, _ = next(iter(data.loader("train", config, augment=True, batch_size=64)))
    assert trained.shape == (data.size("train"), 3, 16, 16)


def test_classes_go_by_the_names_that_a_model_knows(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", {"ant": 4, "bee": 4})
    known = ("zebra", "bee", "cat", "ant")
    data = load_data(root, num_classes=4, label_names=known)
    assert data.label_names == known
    assert {label for _, label in data.splits["train"].samples} == {1, 3}


def test_imagenet_folders_are_matched_by_wordnet_id(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", {"n01443537": 3, "n01440764": 3})  # goldfish, tench
    data = load_data(root, num_classes=1000)
    assert {Path(path).parent.name: label for path, label in data.splits["train"].samples} == {
        "n01440764": 0,
        "n01443537": 1,
    }


def test_wrong_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_data(tmp_path / "absent")
    with pytest.raises(DataError, match="class folders"):
        load_data(tmp_path)
    (tmp_path / "empty" / "ant").mkdir(parents=True)
    with pytest.raises(DataError, match="expected images"):
        load_data(tmp_path / "empty")
    root = make_folder(tmp_path / "images", {"ant": 4, "bee": 4})
    with pytest.raises(DataError, match=r"3 classes .* got 2 .*--new-classes.*reset_classifier\(2\)"):
        load_data(root, num_classes=3)
    with pytest.raises(DataError, match=r"named as the model's classes .bee, cat., got ant.*--new-classes"):
        load_data(root, num_classes=2, label_names=("bee", "cat"))
    (root / "ant" / "small").mkdir()
    Image.new("RGB", (4, 4)).save(root / "ant" / "small" / "deep.png")
    with pytest.raises(DataError, match=r"right in a class folder, got .*ant/small/deep\.png"):
        load_data(root, num_classes=2)
    (root / "ant" / "small" / "deep.png").unlink()
    Image.new("RGB", (4, 4)).save(root / "loose.png")
    with pytest.raises(DataError, match=r"loose\.png"):
        load_data(root)


def test_a_held_out_class_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"ant": 4, "bee": 4})
    make_folder(tmp_path / "val", {"ant": 4, "cow": 4})
    with pytest.raises(DataError, match=r"also \['cow'\]"):
        load_data(tmp_path)


def test_an_unreadable_image_is_named_and_not_skipped(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", {"ant": 10, "bee": 10})
    data = load_data(root)
    broken = Path(paths(data, "test")[0])
    broken.write_bytes(b"no image")
    with pytest.raises(DataError, match=f"cannot read the image .*{broken.name}"):
        labels(data.loader("test", data_config({}, (3, 8, 8))))


def test_a_mean_that_does_not_fit_the_channels_is_refused() -> None:
    with pytest.raises(DataError, match=r"pretrained_cfg\['mean'\]"):
        data_config({}, (1, 8, 8))
