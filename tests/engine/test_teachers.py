"""Teachers: where they come from, that they do not learn, and what they say of a split."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from toy import Config, Kill, Killed, Task, Toy

from counterpoint.data.cached import digest
from counterpoint.data.images import ArrayImages
from counterpoint.engine import teachers
from counterpoint.engine.fit import fit
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen, cached, frozen, snapshot, teachers_of
from counterpoint.errors import CounterpointError, RunError
from counterpoint.experiment import Experiment, load_learner

DIGITS = "digits?size=16&train=30&held_out=0.02"
SMALL = {"encoder": "conv-s", "batch_size": 10, "hidden": 8, "projection": 8, "epochs": 1, "bank": 30}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "cache"
    torch.set_num_threads(before)


def test_a_snapshot_is_a_copy_that_does_not_learn():
    toy = Toy()
    toy.old = frozen(toy.encoder)
    x = torch.randn(5, 6)
    first = toy.old(x)
    assert torch.equal(first, toy.old(x))  # without dropout, whatever the learner does
    toy.train()
    assert not toy.old.module.training
    assert not toy.old(x.requires_grad_()).requires_grad
    assert toy.encoder(x).requires_grad  # the network itself still learns
    with torch.no_grad():
        toy.encoder[0].weight.zero_()
    assert torch.equal(first, toy.old(x))
    names = [name for name, _ in toy.named_parameters()] + list(toy.state_dict()) + list(toy.exported())
    assert not [name for name in names if "old" in name]
    assert toy.old.to(torch.device("meta")).device.type == "meta"


def test_teachers_are_found_wherever_they_are_held():
    toy, one = Toy(), snapshot(torch.nn.Linear(2, 2))
    toy.one, toy.many, toy.named = one, [snapshot(one.module), 3], {"x": one}
    toy.encoder[0].inner = one
    assert set(teachers_of(toy)) == {"one", "many.0", "named.x", "encoder.0.inner"}


def test_in_a_fit_nothing_of_it_moves(tmp_path):
    class Taught(Toy):
        def __init__(self):
            super().__init__()
            self.old = snapshot(self.encoder)

        def loss(self, batch):
            return {"loss": (self.encoder(batch["x"]) - self.old(batch["x"]) - 1).square().mean()}

    learner = Taught()
    before = learner.old.digest()
    run = Run.create(tmp_path, {"slug": "simclr"}, "run")
    fit(learner, Task(), run=run, bar=False)
    assert learner.old.digest() == before
    assert snapshot(learner.encoder).digest() != before
    assert not [name for name in run.load_weights() if "old" in name]


def experiment(**more):
    return Experiment.resolve("simclr", DIGITS, overrides=SMALL | more)


def test_a_run_is_a_frozen_teacher(tmp_path):
    made = experiment()
    run = Run.create(tmp_path, made.record(0), "run")
    with pytest.raises(RunError, match=r"has no model\.safetensors; train it first"):
        frozen(f"run:{run.path}")
    made.run(0, run=run)
    teacher = frozen(f"run:{run.path}")
    images = torch.randn(4, 3, 16, 16)
    own = load_learner(run)
    with torch.no_grad():
        expected = own.predict({"image": images})["feature"]
    assert torch.equal(teacher({"image": images})["feature"], expected)
    called = frozen(f"run:{run.path}", call=lambda learner: learner.embed)
    assert torch.equal(called(images), expected)
    assert teacher.digest() == snapshot(own).digest()


def test_a_small_teacher_is_trained_once(monkeypatch):
    import counterpoint.experiment as room

    trained = []
    run = room.Experiment.run
    monkeypatch.setattr(room.Experiment, "run", lambda self, *a, **k: (trained.append(self), run(self, *a, **k))[1])
    spec = "fit:simclr?data=digits%3Fsize%3D16%26train%3D30%26held_out%3D0.02&" + "&".join(
        f"{name}={value}" for name, value in SMALL.items()
    )
    first, again = frozen(spec), frozen(spec)
    assert len(trained) == 1
    assert trained[0].data == DIGITS
    assert first.digest() == again.digest()
    other = frozen(f"{spec}&seed=1")
    assert len(trained) == 2
    assert other.digest() != first.digest()


def test_published_networks_are_loaded_by_name(monkeypatch):
    """Which network is asked for; the weights themselves are fetched from elsewhere."""
    from counterpoint.encoders import images

    asked = []
    build = images.build_image_encoder

    def plain(name, size, pretrained=False, **options):
        asked.append((name, pretrained))
        return build(name, size, pretrained=False, **options)

    monkeypatch.setattr(images, "build_image_encoder", plain)
    teacher = frozen("timm:resnet10t")
    assert asked == [("timm:resnet10t", True)]
    assert teacher(torch.zeros(2, 3, 64, 64)).shape == (2, teacher.module.dim)
    assert not any(p.requires_grad for p in teacher.module.parameters())


@pytest.mark.parametrize("name", ["resnet18", "file:x", "", "run"])
def test_names_of_no_teacher_raise_an_error(name, tmp_path):
    match = (
        "no such run directory|is not a run" if name == "run" else f"unknown teacher '{name}': give run:RUN, fit:SLUG"
    )
    with pytest.raises(CounterpointError, match=match):
        frozen(name)
    with pytest.raises(RunError, match="no such run directory"):
        frozen(f"run:{tmp_path / 'none'}")
    with pytest.raises(CounterpointError, match="unknown system"):
        frozen("fit:none?data=digits")


def test_a_teacher_that_changed_since_is_refused(tmp_path):
    class Taught(Toy):
        def __init__(self, teacher):
            super().__init__()
            self.teacher = Frozen(copy.deepcopy(teacher), "run:elsewhere")

    teacher = torch.nn.Linear(6, 1)
    run = Run.create(tmp_path, {"slug": "simclr"}, "run")
    loop = Loop(checkpoint_minutes=0)
    with pytest.raises(Killed):
        fit(Taught(teacher), Task(), run=run, bar=False, loop=loop, callbacks=[Kill(step=4)])
    with torch.no_grad():
        teacher.bias += 1
    with pytest.raises(RunError, match="the teacher run:elsewhere has other weights than when this run began"):
        fit(Taught(teacher), Task(), run=run, bar=False)
    with torch.no_grad():
        teacher.bias -= 1


def test_what_a_teacher_says_is_kept(cache, monkeypatch):
    task, toy = Task(Config()), Toy()
    survey = Survey(task, toy)
    teacher = Frozen(
        toy.encoder, "x", lambda batch: {"feature": toy.encoder(batch["x"]), "twice": 2 * toy.encoder(batch["x"])}
    )
    over, passes = Survey.over, []
    monkeypatch.setattr(Survey, "over", lambda self, *a, **k: (passes.append(a[0]), over(self, *a, **k))[1])
    index = torch.tensor([7, 0, 7])
    kept = cached(teacher, survey, "train")
    expected = toy.encoder.eval()(task.split("train").x).detach()
    assert torch.equal(kept[index], expected[index])
    assert len(kept) == 10
    assert passes == ["train"]
    assert torch.equal(cached(teacher, survey, "train")[index], expected[index])
    assert passes == ["train"]  # read
    assert torch.equal(cached(teacher, survey, "train", "twice")[index], 2 * expected[index])
    assert len(cached(teacher, survey, "test")) == 5
    assert len(passes) == 3
    # Another function of the same weights, other weights, other items: other files.
    embed = Frozen(toy.encoder, "x", lambda batch: toy.encoder(batch["x"]).abs())
    embed._call.__qualname__ = "embed"
    assert torch.equal(cached(embed, survey, "train")[index], expected[index].abs())
    task.splits["train"].x[3] += 1
    changed = cached(teacher, survey, "train")[torch.tensor([3])]
    assert not torch.equal(changed, expected[3:4])
    with torch.no_grad():
        toy.encoder[0].bias += 1
    assert not torch.equal(cached(teacher, survey, "train")[index], expected[index])
    assert len(passes) == 6
    assert len(list((cache / "teachers").glob("*.npy"))) == 6
    assert isinstance(kept.values, np.memmap)


def test_kept_rows_are_not_used_for_items_of_another_order_name_or_file(tmp_path):
    """Sixty-four items are compared whole; the other ones by what tells them apart."""

    def key():
        return digest(*teachers._origins(split, ["image"]))

    split = ArrayImages(np.zeros((200, 4, 4, 3), np.uint8), labels=np.arange(200))
    first = key()
    split.pixels[101, 0, 0] = 1
    assert (second := key()) != first
    split.labels[[3, 5]] = split.labels[[5, 3]]
    assert key() != second

    files = [tmp_path / f"{n}.png" for n in range(3)]
    for path in files:
        path.write_bytes(b"a")

    class Files(list):
        labels = None

        def row_names(self, at):
            return [str(self[n]) for n in at]

        def files(self, at, name):
            return self.row_names(at)

    split = files = Files(files)
    first = key()
    assert key() == first
    files[1].write_bytes(b"ab")
    assert (second := key()) != first
    files.reverse()
    assert key() != second


def test_frozen_records_the_name_of_its_function():
    linear = torch.nn.Linear(2, 2)
    assert Frozen(linear).function == "Linear"
    assert Frozen(linear, "", linear.extra_repr).function == "Linear.extra_repr"
    assert frozen(linear, call=lambda module: module.extra_repr).function == "Linear.extra_repr"
    assert teachers.partial(Frozen, linear)().function == "Linear"


def test_a_teacher_of_another_width_is_refused():
    with pytest.raises(CounterpointError, match="rows 3 wide, and this student compares rows 4 wide: choose a teacher"):
        frozen(torch.nn.Linear(6, 3), width=4)(torch.zeros(2, 6))
    assert frozen(torch.nn.Linear(6, 3), width=3)(torch.zeros(2, 6)).shape == (2, 3)


def test_cached_rows_of_another_width_are_refused():
    survey, network = Survey(Task(), Toy()), torch.nn.Linear(6, 3)

    def taught(width=None):
        teacher = frozen(network, lambda net: lambda batch: {"feature": net(batch["x"])}, width=width)
        return cached(teacher, survey, "train")

    with pytest.raises(CounterpointError, match="set the student's width to 3"):
        taught(4)  # computed
    assert taught().values.shape[1] == 3
    with pytest.raises(CounterpointError, match="set the student's width to 3"):
        taught(4)  # from the cache


def test_a_model_of_transformers_from_a_folder_teaches(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    model = transformers.ViTModel(config).eval()
    model.save_pretrained(tmp_path / "vit")
    teacher = frozen(f"hf:{tmp_path / 'vit'}", width=12, size=16)
    x = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(teacher(x), model(pixel_values=x).pooler_output)
    assert not any(p.requires_grad for p in teacher.module.parameters())
    assert teacher.state()["weights"] == {}  # had again by its name


@pytest.mark.parametrize("damage", [b"", b"damaged", None])
def test_a_damaged_file_of_a_teachers_rows_is_made_again(cache, damage):
    task, toy = Task(Config()), Toy()
    survey, teacher = Survey(task, toy), Frozen(toy.encoder, "x", lambda batch: toy.encoder(batch["x"]))
    expected = cached(teacher, survey, "train").values.copy()
    (file,) = (cache / "teachers").glob("*.npy")
    whole = file.read_bytes()
    file.unlink()  # a mapped file must not be cut while it is mapped
    file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert np.array_equal(cached(teacher, survey, "train").values, expected)
    assert file.read_bytes() == whole
