import gzip
import hashlib
import math
import urllib.request

import pytest
import torch

from heavyball.errors import RaceError
from heavyball.race.tasks import TASKS, open_task
from heavyball.race.tasks.chars import CONTEXT
from heavyball.race.tasks.files import Remote, cache, fetch, idx, write_atomically
from heavyball.race.tasks.mnist import SHA256

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40


@pytest.fixture(autouse=True)
def one_thread():
    """Tests that run beside each other would wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def idx_bytes(values):
    header = bytes([0, 0, 8, values.ndim])
    sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
    return header + sizes + values.to(torch.uint8).numpy().tobytes()


def write_mnist(folder, train=20, test=10, packed=True):
    """Four small idx files of random pixels."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name in SHA256:
        count = train if name.startswith("train") else test
        shape, high = ((count, 28, 28), 256) if "images" in name else ((count,), 10)
        raw = idx_bytes(torch.randint(high, shape, generator=generator))
        path = folder / (name + ".gz" if packed else name)
        path.write_bytes(gzip.compress(raw) if packed else raw)
    return folder


@pytest.fixture
def folder(tmp_path):
    """Data for every task that needs some."""
    write_mnist(tmp_path / "mnist")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tinyshakespeare.txt").write_text(TEXT)
    return tmp_path


def opened(name, folder):
    return open_task(name, folder if TASKS[name].needs_data else None)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_gives_the_same_for_the_same_seed_and_something_else_for_another(name, folder):
    def start(seed):
        task = opened(name, folder)
        torch.manual_seed(seed)
        model = task.model(seed)
        batches = task.batches(seed, 4)
        losses = [task.loss(model.eval(), next(batches)).item() for _ in range(8)]
        return losses, [p.detach().clone() for p in model.parameters()], task.facts()

    losses, weights, facts = start(1)
    again, same_weights, same_facts = start(1)
    other, other_weights, _ = start(2)
    assert losses == again
    assert facts == same_facts
    assert all(torch.equal(a, b) for a, b in zip(weights, same_weights, strict=True))
    assert losses != other
    assert any(not torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


@pytest.mark.parametrize("name", ["digits", "mnist", "chars"])
def test_another_seed_brings_the_data_in_another_order(name, folder):
    task = opened(name, folder)

    def first(seed):
        batch = next(task.batches(seed, 6))
        return batch if name == "chars" else batch[0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize("name", TASKS)
def test_an_evaluation_is_of_the_model_and_repeats(name, folder):
    task = opened(name, folder)
    torch.manual_seed(0)
    model = task.model(0).eval()
    with torch.no_grad():
        loss, measure = task.evaluate(model)
        assert task.evaluate(model) == (loss, measure)
        assert math.isfinite(loss)
        assert measure >= 0
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert task.evaluate(model)[0] != loss


@pytest.mark.parametrize(("name", "classes"), [("digits", 10), ("mnist", 10), ("chars", 27)])
def test_a_model_that_knows_nothing_has_the_loss_of_a_guess(name, classes, folder):
    task = opened(name, folder)
    model = task.model(0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        loss, accuracy = task.evaluate(model)
    if name == "chars":
        classes = len(set(TEXT))
    # a sum of float32 losses
    assert loss == pytest.approx(math.log(classes), rel=1e-5)
    assert 0 <= accuracy < 0.5


@pytest.mark.parametrize("name", TASKS)
def test_training_and_test_loss_are_the_same_function(name, folder):
    task = opened(name, folder)
    torch.manual_seed(0)
    model = task.model(0).eval()
    tests = {"chars": lambda: task.test, "digits": lambda: (task.test_images, task.test_labels)}
    tests["mnist"] = tests["digits"]
    batch = tests.get(name, lambda: None)()
    with torch.no_grad():
        # float32 means of up to thousands of losses near 3, added in another order
        assert task.loss(model, batch).item() == pytest.approx(task.evaluate(model)[0], rel=1e-5)


def test_digits_are_split_without_overlap():
    task = open_task("digits")
    assert task.facts()["train_examples"] == 1347
    assert task.facts()["test_examples"] == 450
    assert task.steps_per_epoch(64) == 22
    images = torch.cat([task.train_images, task.test_images])
    distinct = len({image.numpy().tobytes() for image in images})
    assert distinct == 1797
    assert images.min() == 0
    assert images.max() == 1


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    task = open_task("digits")
    batches = task.batches(3, 100)
    epochs = [[next(batches) for _ in range(task.steps_per_epoch(100))] for _ in range(2)]
    assert [len(labels) for _, labels in epochs[0]] == [100] * 13 + [47]
    first, second = (torch.cat([images for images, _ in epoch]) for epoch in epochs)
    assert not torch.equal(first, second)
    as_set = [{image.numpy().tobytes() for image in images} for images in (first, second)]
    assert as_set[0] == as_set[1] == {i.numpy().tobytes() for i in task.train_images}


def test_mnist_has_the_model_and_the_scale_of_the_example(folder):
    task = open_task("mnist", folder)
    sizes = [tuple(p.shape) for p in task.model(0).parameters() if p.ndim > 1]
    assert sizes == [(32, 1, 3, 3), (64, 32, 3, 3), (128, 9216), (10, 128)]
    assert task.batch_size == 64
    assert task.epochs == 14
    pixels = (task.train_images * 0.3081 + 0.1307) * 255
    # float32 rounding of numbers up to 255, twice
    torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-3)
    assert pixels.round().max() == 255


@pytest.mark.parametrize("inside", [".", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_found_packed_or_not_and_in_the_usual_folders(tmp_path, inside, packed):
    write_mnist(tmp_path / inside, packed=packed)
    task = open_task("mnist", tmp_path)
    assert task.train_images.shape == (20, 1, 28, 28)
    assert task.facts()["test_examples"] == 10


def damage(path, kind):
    raw = gzip.decompress(path.read_bytes())
    if kind == "archive cut short":
        path.write_bytes(path.read_bytes()[:-20])
    elif kind == "archive damaged":
        packed = bytearray(path.read_bytes())
        packed[len(packed) // 2] ^= 0xFF
        path.write_bytes(packed)
    elif kind == "content cut short":
        path.write_bytes(gzip.compress(raw[:-1]))
    elif kind == "content too long":
        path.write_bytes(gzip.compress(raw + b"\0"))
    elif kind == "header":
        path.write_bytes(gzip.compress(b"\0\0\x0d" + raw[3:]))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "fewer":
        path.write_bytes(gzip.compress(idx_bytes(torch.zeros(19, 28, 28))))
    elif kind == "other size":
        path.write_bytes(gzip.compress(idx_bytes(torch.zeros(20, 8, 8))))
    elif kind == "missing":
        path.unlink()
    elif kind == "no file":
        path.unlink()
        path.mkdir()


KINDS = ["archive cut short", "archive damaged", "content cut short", "content too long", "header"]
KINDS += ["empty", "fewer", "other size", "missing", "no file"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_data_file_is_named(folder, kind):
    damage(folder / "mnist" / "train-images-idx3-ubyte.gz", kind)
    with pytest.raises(RaceError, match="train"):
        open_task("mnist", folder)


def test_labels_beyond_nine_are_refused(folder):
    path = folder / "mnist" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(torch.full((10,), 10))))
    with pytest.raises(RaceError, match="labels to 10"):
        open_task("mnist", folder)


def test_an_idx_file_without_elements_is_read(tmp_path):
    path = tmp_path / "none"
    path.write_bytes(idx_bytes(torch.zeros(0, 28, 28)))
    assert idx(path, 3).shape == (0, 28, 28)


def test_characters_are_predicted_one_ahead_and_the_test_part_is_the_last_tenth(folder):
    task = open_task("chars", folder)
    text = "".join(task.alphabet[i] for i in task.train)
    assert text == TEXT[: len(TEXT) * 9 // 10]
    windows = ["".join(task.alphabet[i] for i in window) for window in task.test]
    assert all(len(w) == CONTEXT + 1 and w in TEXT[len(text) :] for w in windows)
    batch = next(task.batches(0, 5))
    assert batch.shape == (5, CONTEXT + 1)
    assert all("".join(task.alphabet[i] for i in row) in text for row in batch)


def test_the_gpt_sees_nothing_of_what_is_to_come(folder):
    task = open_task("chars", folder)
    torch.manual_seed(0)
    model = task.model(0).eval()
    codes = task.test[:2, :-1].clone()
    before = model(codes)
    codes[:, 40:] = (codes[:, 40:] + 1) % len(task.alphabet)
    after = model(codes)
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_a_text_file_can_be_given_itself(tmp_path):
    path = tmp_path / "any name.txt"
    path.write_text("abc" * 400)
    assert open_task("chars", path).alphabet == ["a", "b", "c"]
    path.write_text("too short")
    with pytest.raises(RaceError, match="9 characters, at least 650"):
        open_task("chars", path)
    path.write_bytes(b"\xff" * 1000)
    with pytest.raises(RaceError, match="UTF-8"):
        open_task("chars", path)
    with pytest.raises(RaceError, match="tinyshakespeare"):
        open_task("chars", tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["rosenbrock", "beale"])
def test_a_surface_is_lowest_where_it_says(name):
    task = TASKS[name](None)
    lowest = torch.tensor(task.minimum, dtype=torch.float64, requires_grad=True)
    height = task.height(*lowest)
    (slope,) = torch.autograd.grad(height, lowest, create_graph=True)
    assert height.item() == 0
    assert slope.tolist() == [0, 0]
    curvature = torch.autograd.functional.hessian(lambda p: task.height(*p), lowest)
    assert torch.linalg.eigvalsh(curvature).min() > 0
    model = task.model(0)
    assert model.at.tolist() == pytest.approx(task.start)
    assert task.evaluate(model)[1] == pytest.approx(math.dist(task.start, task.minimum))


@pytest.mark.parametrize("name", ["digits", "rosenbrock"])
def test_a_task_without_data_refuses_a_folder(name, tmp_path):
    with pytest.raises(RaceError, match="--data has no use"):
        open_task(name, tmp_path)


def test_an_unknown_task_is_answered_with_the_nearest():
    with pytest.raises(RaceError, match="nearest: mnist"):
        open_task("minst")


class TestFetch:
    content = b"something to download"

    @pytest.fixture(autouse=True)
    def home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        self.source = tmp_path / "source.gz"
        self.source.write_bytes(gzip.compress(self.content))

    def remote(self, *urls):
        urls = urls or (self.source.as_uri(),)
        return Remote("file.gz", urls, hashlib.sha256(self.content).hexdigest())

    def test_a_file_is_kept_in_the_cache(self, monkeypatch):
        path = fetch(self.remote())
        assert path == cache() / "file.gz"
        assert gzip.decompress(path.read_bytes()) == self.content
        monkeypatch.setattr(urllib.request, "urlopen", None)
        assert fetch(self.remote()) == path

    def test_a_damaged_file_in_the_cache_is_downloaded_again(self):
        fetch(self.remote()).write_bytes(b"damaged")
        assert gzip.decompress(fetch(self.remote()).read_bytes()) == self.content

    def test_the_next_address_is_tried(self, tmp_path):
        wrong = tmp_path / "wrong.gz"
        wrong.write_bytes(gzip.compress(b"something else"))
        missing = (tmp_path / "missing").as_uri()
        path = fetch(self.remote(missing, wrong.as_uri(), self.source.as_uri()))
        assert gzip.decompress(path.read_bytes()) == self.content

    @pytest.mark.parametrize("raw", [b"", b"else", gzip.compress(b"else", mtime=0), b"\x1f\x8bcut"])
    def test_another_content_is_refused_and_not_kept(self, raw):
        self.source.write_bytes(raw)
        with pytest.raises(RaceError, match="checksum mismatch"):
            fetch(self.remote())
        assert not (cache() / "file.gz").exists()

    def test_without_a_network_the_way_out_is_named(self, tmp_path):
        with pytest.raises(RaceError, match=r"missing.*--data DIR"):
            fetch(self.remote((tmp_path / "missing").as_uri()))

    def test_mnist_and_chars_say_so_too(self, monkeypatch):
        def unreachable(url, timeout):
            raise urllib.error.URLError("no network")

        monkeypatch.setattr(urllib.request, "urlopen", unreachable)
        for name in ("mnist", "chars"):
            with pytest.raises(RaceError, match=r"no network.*--data DIR"):
                open_task(name)


def test_a_file_is_replaced_in_full_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"first")
    monkeypatch.setattr("os.fsync", lambda handle: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


def test_data_moves_to_another_device():
    task = open_task("digits")
    images = task.train_images.shape
    task.move(torch.device("meta"))
    assert task.device.type == "meta"
    assert task.train_images.is_meta
    assert task.train_images.shape == images
    assert task.test_labels.is_meta
