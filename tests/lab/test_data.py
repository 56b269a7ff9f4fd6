"""Data sets are found where they should be, standardised, subsampled fairly, and missed with good advice."""

import gzip
import pickle
import random
import shutil
import struct
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from geomlib.lab import data, sources
from geomlib.lab.data import Split
from geomlib.lab.sampling import stratified
from geomlib.lab.training import fit

HAS_DEBIAN = (sources.DEBIAN / "fashion-mnist" / "train-images-idx3-ubyte.gz").is_file()


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """Give each test an empty cache and no other places."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GEOMLIB_DATA", raising=False)
    monkeypatch.setattr(sources, "DEBIAN", tmp_path / "debian")


def idx(array):
    return (
        b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    )


def write_fashion(folder, shade=0, packed=False):
    """Write a tiny data set in the format of Fashion-MNIST: 40 + 20 pictures, two thirds of class 0."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(shade)
    for part, n in (("train", 40), ("t10k", 20)):
        images = generator.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        images[0] = shade
        labels = (np.arange(n) % 3 == 2).astype(np.uint8)
        for kind, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            content = gzip.compress(idx(array)) if packed else idx(array)
            (folder / f"{part}-{kind}{'.gz' if packed else ''}").write_bytes(content)


def write_images(folder, classes=("cat", "dog"), n=10):
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (20, 12 + i), (200 * label, 10 * i, 50)).save(folder / name / f"{i}.png")


# What every data set promises


@pytest.mark.parametrize(
    ("name", "shape", "sizes"), [("digits", (1, 8, 8), (1437, 360)), ("mnist1d", (1, 40), (4000, 1000))]
)
def test_small_data_sets_need_no_network(name, shape, sizes):
    loaded = data.load(name, download=False)
    assert loaded.shape == shape == tuple(loaded.train.x.shape[1:])
    assert (len(loaded.train), len(loaded.test)) == sizes
    assert loaded.num_classes == 10
    for split in (loaded.train, loaded.test):
        assert split.x.dtype == torch.float32
        assert split.y.dtype == torch.int64
        assert split.y.unique().tolist() == list(range(10))


@pytest.mark.skipif(not HAS_DEBIAN, reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_read_from_where_debian_puts_it(monkeypatch):
    monkeypatch.undo()
    loaded = data.load("fashion_mnist", train_size=500, test_size=100, download=False)
    assert loaded.shape == (1, 28, 28)
    assert loaded.train.y.bincount().tolist() == [50] * 10
    assert loaded.classes[9] == "Ankle boot"


def test_inputs_are_standardised_with_the_training_statistics():
    loaded = data.load("digits", train_size=200)
    assert loaded.train.x.mean().item() == pytest.approx(0, abs=1e-6)
    assert loaded.train.x.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    # The test samples go through the same map, so that their own mean is near zero and not zero.
    assert 1e-6 < abs(loaded.test.x.mean().item()) < 0.1
    pixels = loaded.test.x * loaded.std + loaded.mean
    torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-4)


def test_flat_inputs_are_the_same_numbers():
    square, flat = data.load("digits", train_size=50), data.load("digits", train_size=50, flatten=True)
    assert flat.shape == (64,)
    assert torch.equal(flat.train.x, square.train.x.flatten(1))


def test_training_and_test_samples_are_disjoint():
    raw = sources.arrays("digits")
    rows = torch.cat([raw.train_x, raw.test_x]).flatten(1)
    assert len(rows) == 1797
    assert len(rows.unique(dim=0)) == 1797


def test_the_split_is_the_same_for_every_seed_and_the_subset_is_not():
    one, same, other = (data.load("digits", train_size=100, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.train.x, same.train.x)
    assert not torch.equal(one.train.y, other.train.y)
    assert torch.equal(one.test.y, other.test.y)


def test_global_randomness_is_left_alone():
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = random.Random(5).random(), np.random.RandomState(5).rand()
    data.load("mnist1d", train_size=10)
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


def test_a_data_set_describes_itself():
    text = data.load("digits", train_size=30, test_size=20).describe()
    assert text.startswith("digits: 30 training and 20 test samples of shape (1, 8, 8), 10 classes (0, 1")


# Subsets


def test_every_class_keeps_its_share():
    y = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    chosen = stratified(y, 20, seed=0)
    assert y[chosen].bincount().tolist() == [12, 6, 2]
    assert len(chosen.unique()) == 20


def test_what_rounding_leaves_over_goes_to_the_classes_it_cost_most():
    y = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    assert y[stratified(y, 4, seed=0)].bincount().tolist() == [2, 1, 1]


def test_all_samples_come_in_their_order():
    y = torch.tensor([1, 0, 2])
    assert stratified(y, None, seed=9).tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [0, 4, -1])
def test_more_samples_than_there_are_is_refused(size):
    with pytest.raises(ValueError, match=rf"train_size must lie in 1\.\.3, got {size}"):
        stratified(torch.tensor([0, 1, 1]), size, seed=0, argument="train_size")


# Where files are found


@pytest.mark.parametrize("inside", ["FashionMNIST/raw", "fashion-mnist", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_files_are_read_in_every_layout(tmp_path, inside, packed):
    write_fashion(tmp_path / "here" / inside, packed=packed)
    loaded = data.load("fashion_mnist", root=tmp_path / "here", download=False)
    assert loaded.train.x.shape == (40, 1, 28, 28)
    assert loaded.test.y.bincount().tolist() == [14, 6]


def test_places_are_searched_in_order(tmp_path, monkeypatch):
    places = [tmp_path / "root", tmp_path / "named", sources.cache_folder(), sources.DEBIAN]
    for shade, place in enumerate(places):
        write_fashion(place / "FashionMNIST" / "raw", shade=shade)
    monkeypatch.setenv("GEOMLIB_DATA", str(tmp_path / "named"))

    def found():
        raw = sources.arrays("fashion_mnist", root=tmp_path / "root", download=False)
        return int(raw.train_x[0, 0, 0, 0])

    for shade, place in enumerate(places):
        assert found() == shade
        shutil.rmtree(place)
    with pytest.raises(FileNotFoundError):
        found()


def test_the_cache_follows_the_platform(tmp_path, monkeypatch):
    assert sources.cache_folder() == tmp_path / "cache" / "geomlib"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sources.cache_folder().name == "geomlib"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("cut", [0, 3, 9, 500])
def test_damaged_files_are_named(tmp_path, cut, packed):
    write_fashion(tmp_path / "here", packed=packed)
    (broken,) = (tmp_path / "here").glob("train-images*")
    broken.write_bytes(broken.read_bytes()[:cut])
    with pytest.raises(OSError, match=f"{broken.name} is damaged"):
        data.load("fashion_mnist", root=tmp_path / "here")


CIFAR = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", "data_batch_1", "labels"),
    "cifar100": ("CIFAR100", "cifar-100-python", "train", "fine_labels"),
}


@pytest.mark.parametrize("name", CIFAR)
def test_damaged_pickles_are_never_opened(tmp_path, name):
    _, folder, first, _ = CIFAR[name]
    folder = tmp_path / "here" / folder
    folder.mkdir(parents=True)
    (folder / first).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(OSError, match="is damaged"):
        data.load(name, root=tmp_path / "here")


@pytest.mark.parametrize("name", CIFAR)
def test_small_colour_pictures_are_read(tmp_path, monkeypatch, name):
    from torchvision import datasets

    kind, folder, _, label = CIFAR[name]
    source = getattr(datasets, kind)
    place = tmp_path / "here" / folder
    place.mkdir(parents=True)
    names = [f"class {i}" for i in range(3)]
    pictures = np.arange(6 * 3072, dtype=np.uint8).reshape(6, 3072)
    for file, _ in source.train_list + source.test_list:
        content = {"data": pictures, label: [0, 1, 2, 0, 1, 2]}
        (place / file).write_bytes(pickle.dumps(content))
    (place / source.meta["filename"]).write_bytes(pickle.dumps({source.meta["key"]: names}))
    # The files are ours, so their checksums are not the published ones.
    monkeypatch.setattr(source, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, checksum: True)
    loaded = data.load(name, root=tmp_path / "here", download=False)
    assert loaded.shape == (3, 32, 32)
    assert loaded.classes == tuple(names)
    assert len(loaded.train) == 6 * len(source.train_list)
    raw = sources.arrays(name, root=tmp_path / "here", download=False)
    assert torch.equal(raw.test_x[1], torch.from_numpy(pictures[1]).view(3, 32, 32))


# The network


def offline(monkeypatch):
    def refuse(folder):
        raise OSError("no route to host")

    files = sources._FILES["fashion_mnist"]
    replaced = sources._Files(files.folder, files.read, refuse, files.by_hand)
    monkeypatch.setitem(sources._FILES, "fashion_mnist", replaced)


def fetcher(monkeypatch, fetch):
    files = sources._FILES["fashion_mnist"]
    replaced = sources._Files(files.folder, files.read, fetch, files.by_hand)
    monkeypatch.setitem(sources._FILES, "fashion_mnist", replaced)


@pytest.mark.parametrize("download", [True, False])
def test_without_data_three_ways_to_get_it_are_listed(monkeypatch, download):
    offline(monkeypatch)
    with pytest.raises(FileNotFoundError) as caught:
        data.load("fashion_mnist", download=download)
    text = str(caught.value)
    assert ("no route to host" if download else "download=False") in text
    for way in ("with a network", "GEOMLIB_DATA", "apt install dataset-fashion-mnist"):
        assert way in text
    assert [line[:4] for line in text.splitlines()[1:]] == ["  1.", "  2.", "  3."]


def test_a_download_is_kept_and_used_again(monkeypatch):
    fetched = []

    def fetch(folder):
        fetched.append(folder)
        write_fashion(folder / "FashionMNIST" / "raw")

    fetcher(monkeypatch, fetch)
    for _ in range(2):
        assert len(data.load("fashion_mnist").train) == 40
    assert len(fetched) == 1
    assert not fetched[0].exists(), "the workshop is cleared away"


def test_an_interrupted_download_leaves_nothing(monkeypatch):
    def fetch(folder):
        (folder / "FashionMNIST" / "raw").mkdir(parents=True)
        (folder / "FashionMNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"half")
        raise OSError("the line went dead")

    fetcher(monkeypatch, fetch)
    with pytest.raises(FileNotFoundError, match="the line went dead"):
        data.load("fashion_mnist")
    assert [path.name for path in sources.cache_folder().iterdir() if path.is_dir()] == []


def test_two_at_once_download_once(monkeypatch):
    fetched, loaded = [], []

    def fetch(folder):
        fetched.append(folder)
        time.sleep(0.3)  # long enough for the other to arrive
        write_fashion(folder / "FashionMNIST" / "raw")

    fetcher(monkeypatch, fetch)
    threads = [threading.Thread(target=lambda: loaded.append(data.load("fashion_mnist"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(fetched) == 1
    assert [len(each.train) for each in loaded] == [40, 40]


# Image folders


def test_an_image_folder_is_read_when_asked(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "val", n=4)
    loaded = data.load("image_folder", root=tmp_path, image_size=16)
    assert loaded.classes == ("cat", "dog")
    assert (len(loaded.train), len(loaded.test)) == (20, 8)
    x, y = loaded.train[torch.arange(20)]
    assert x.shape == (20, 3, 16, 16)
    assert y.tolist() == [0] * 10 + [1] * 10
    torch.testing.assert_close(x.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    # The third channel is the same in every picture: standardised to zero, not to infinity.
    assert x.isfinite().all()


def test_an_image_folder_without_a_split_sets_a_fifth_apart(tmp_path):
    write_images(tmp_path)
    loaded = data.load("image_folder", root=tmp_path)
    again = data.load("image_folder", root=tmp_path, seed=3)
    assert loaded.test.y.bincount().tolist() == [2, 2]
    assert len(loaded.train) == 16
    assert loaded.test.images.paths == again.test.images.paths
    assert not set(loaded.test.images.paths) & set(loaded.train.images.paths)


def test_a_model_trains_on_an_image_folder(tmp_path):
    write_images(tmp_path)
    loaded = data.load("image_folder", root=tmp_path, train_size=12, image_size=8)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    history = fit(model, loaded.train, loaded.test, epochs=6, lr=0.05, batch_size=6)
    assert history.test_accuracy[-1] == 1.0


def test_an_image_folder_with_other_classes_in_the_test_part_is_refused(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "val", classes=("cat", "cow"))
    with pytest.raises(ValueError, match="must have the classes"):
        data.load("image_folder", root=tmp_path)


# Bad inputs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "minst"}, "name must be one of digits, mnist1d"),
        ({"name": "digits", "train_size": 1438}, "train_size must lie in 1..1437"),
        ({"name": "digits", "test_size": 0}, "test_size must lie in 1..360"),
        ({"name": "image_folder"}, "root must name the folder"),
        ({"name": "image_folder", "root": ".", "flatten": True}, "flatten must be False"),
    ],
)
def test_bad_requests_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        data.load(**arguments)


def test_labels_must_fit_the_samples():
    with pytest.raises(ValueError, match="y must have one label per sample, got 2 labels for 3"):
        Split(torch.zeros(3, 1), torch.zeros(2))
