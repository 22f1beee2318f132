import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from capo import checkpoint
from capo.config import ModelConfig, TaskConfig
from capo.data import ArithmeticTask
from capo.models import build_model

TASK = ArithmeticTask(TaskConfig(steps=2), seed=0)
SMALL = ModelConfig(layers=1, hidden=16, heads=2, mlp=16)


def pair(seed, steps=0, config=SMALL):
    """A model and its optimiser, after some steps on random gradients."""
    model = build_model(config, TASK, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return model, optimizer


def contents(model, optimizer):
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moments = {
        f"{name}.{key}": value.clone()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return weights | moments


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def saved(tmp_path):
    folder = checkpoint.checkpoint_path(tmp_path, 7)
    model, optimizer = pair(1, steps=3)
    checkpoint.save(folder, model, optimizer, {"update": 7})
    return folder


def test_round_trip_is_bitwise_and_goes_on_bitwise(saved):
    (one, first), (other, second) = pair(1, steps=3), pair(2, steps=1)
    assert checkpoint.load(saved, other, second) == {"update": 7}
    assert same(contents(one, first), contents(other, second))
    for model, optimizer in ((one, first), (other, second)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        optimizer.step()
    assert same(contents(one, first), contents(other, second))


def test_before_the_first_step_there_are_no_moments(tmp_path):
    checkpoint.save(tmp_path / "new", *pair(1), {})
    model, optimizer = pair(2, steps=2)
    checkpoint.load(tmp_path / "new", model, optimizer)
    assert same(contents(model, optimizer), contents(*pair(1)))


def test_the_folder_is_one_of_transformers(saved):
    model = AutoModelForCausalLM.from_pretrained(saved)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, pair(1, steps=3)[0](ids).logits)


def test_no_pickle_anywhere(saved):
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors"}


class Killed(BaseException):
    """The process dies here."""


def test_a_save_that_dies_anywhere_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """Die in turn at every call that touches the disk, with and without a chance to clean up."""
    first = checkpoint.checkpoint_path(tmp_path, 1)
    checkpoint.save(first, *pair(1, steps=1), {"update": 1})
    good = contents(*pair(1, steps=1))
    points = [(os, "replace"), (os, "fsync"), (checkpoint, "save_file"), (checkpoint, "_sha256"), (os, "open")]
    points += [(type(first), "write_text"), (type(first), "mkdir"), (type(first), "iterdir")]
    survived = died = 0
    for owner, name in points:
        for cleanup in (True, False):
            for at in range(30):
                calls = 0
                original = getattr(owner, name)

                def dies(*args, original=original, at=at, **kwargs):
                    nonlocal calls
                    calls += 1
                    if calls > at:
                        raise Killed
                    return original(*args, **kwargs)

                model, optimizer = pair(3, steps=2)
                with monkeypatch.context() as patch:
                    patch.setattr(owner, name, dies)
                    if not cleanup:
                        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
                    try:
                        checkpoint.save(checkpoint.checkpoint_path(tmp_path, 2), model, optimizer, {"update": 2})
                        checkpoint.prune(tmp_path, 1)
                        done = True
                    except Killed:
                        done = False
                # What is there under a valid name is whole, and the latest is either the old or the new one.
                latest = checkpoint.saved_updates(tmp_path)[-1]
                loaded = pair(9)
                state = checkpoint.load(checkpoint.checkpoint_path(tmp_path, latest), *loaded)
                assert state == {"update": latest}
                assert same(contents(*loaded), good if latest == 1 else contents(*pair(3, steps=2)))
                survived, died = survived + done, died + (not done)
                for left in [checkpoint.checkpoint_path(tmp_path, 2), *tmp_path.glob(".update-00000002.*")]:
                    shutil.rmtree(left, ignore_errors=True)
                if not checkpoint.saved_updates(tmp_path):
                    checkpoint.save(first, *pair(1, steps=1), {"update": 1})
                if done:
                    break
            else:
                pytest.fail(f"{name} is called more often than thought")
    assert survived == 2 * len(points) and died > 40
    checkpoint.save(checkpoint.checkpoint_path(tmp_path, 3), *pair(3), {"update": 3})
    checkpoint.prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["update-00000003"]  # and nothing is left lying about


def test_a_full_disk_is_an_error_and_old_checkpoints_stay(tmp_path, saved, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(checkpoint.checkpoint_path(tmp_path, 8), *pair(1), {})
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system"),
                                   OSError(5, "Input/output error"), OSError(122, "Disk quota exceeded")], ids=str)  # fmt: skip
@pytest.mark.parametrize("call", ["mkdir", "save_file", "write_text", "fsync", "replace"])
def test_every_write_that_fails_is_an_error_and_leaves_nothing(tmp_path, saved, monkeypatch, call, error):
    def fails(*args, **kwargs):
        raise error

    owner = {"save_file": checkpoint, "fsync": os, "replace": os}.get(call, type(saved))
    before = contents(*pair(1, steps=3))
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, fails)
        with pytest.raises(OSError, match=error.strerror):
            checkpoint.save(checkpoint.checkpoint_path(tmp_path, 8), *pair(1), {})
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]
    loaded = pair(2)
    checkpoint.load(saved, *loaded)
    assert same(before, contents(*loaded))


def test_a_save_is_on_the_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    """Files, then their folder, then the rename, then the folder above: a crash of the machine loses none of them."""
    synced, opened = [], {}
    original_open, original_sync, original_replace = os.open, os.fsync, os.replace

    def watch_open(path, *args, **kwargs):
        descriptor = original_open(path, *args, **kwargs)
        opened[descriptor] = Path(path)
        return descriptor

    monkeypatch.setattr(os, "open", watch_open)
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (synced.append(opened[descriptor].name), original_sync(descriptor))
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (synced.append("renamed"), original_replace(*paths)))
    checkpoint.save(tmp_path / "new", *pair(1, steps=1), {})
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    *written, folder, renamed, above = synced
    assert sorted(written) == files and folder.startswith(".new.") and (renamed, above) == ("renamed", tmp_path.name)
    synced.clear()
    checkpoint.write_text(tmp_path / "text", "x")
    assert synced[0].startswith(".text.") and synced[1:] == ["renamed", tmp_path.name]


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "text"
    checkpoint.write_text(path, "before")
    for owner, call in ((type(path), "write_text"), (os, "fsync"), (os, "replace")):

        def dies(*args, **kwargs):
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(owner, call, dies)
            with pytest.raises(Killed):
                checkpoint.write_text(path, "after")
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("text", "before")]


def test_a_checkpoint_never_changes(saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    checkpoint.save(saved, *pair(5), {"update": 99})
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_another_process_may_be_quicker(tmp_path, monkeypatch):
    folder = tmp_path / "cached"
    replace = os.replace

    def overtaken(source, target):
        monkeypatch.setattr(os, "replace", replace)
        checkpoint.save(folder, *pair(1), {"who": "the other"})
        replace(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    checkpoint.save(folder, *pair(1), {"who": "this one"})
    assert checkpoint.load(folder, pair(2)[0], None) == {"who": "the other"}
    assert [path.name for path in tmp_path.iterdir()] == ["cached"]


def edit(folder, change):
    manifest = json.loads((folder / "checkpoint.json").read_text())
    change(manifest)
    (folder / "checkpoint.json").write_text(json.dumps(manifest))


def rehash(folder, name):
    path = folder / name
    edit(
        folder,
        lambda m: m["files"].__setitem__(name, {"bytes": path.stat().st_size, "sha256": checkpoint._sha256(path)}),
    )


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def disguised_pickle(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    rehash(folder, "model.safetensors")


def lying_header(folder):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    rehash(folder, "model.safetensors")


def endless_header(folder):
    (folder / "model.safetensors").write_bytes((10**11).to_bytes(8, "little") + b"{}")
    rehash(folder, "model.safetensors")


def linked(folder):
    elsewhere = folder.parent / "elsewhere"
    (folder / "model.safetensors").rename(elsewhere)
    (folder / "model.safetensors").symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
        (lambda f: (f / "checkpoint.json").unlink(), "is no checkpoint"),
        (lambda f: (f / "checkpoint.json").write_text("{"), "is no checkpoint"),
        (lambda f: (f / "checkpoint.json").write_text("[]"), "checkpoint format None"),
        (lambda f: (f / "checkpoint.json").write_bytes(b"\xff"), "is no checkpoint"),
        (lambda f: (f / "checkpoint.json").write_text(" " * 2_000_000), "too large"),
        (lambda f: flip(f / "model.safetensors"), "model.safetensors is damaged"),
        (lambda f: flip(f / "optimizer.safetensors"), "optimizer.safetensors is damaged"),
        (lambda f: os.truncate(f / "model.safetensors", 1000), "model.safetensors is damaged"),
        (lambda f: edit(f, lambda m: m.update(format=2)), "checkpoint format 2, this version reads 1"),
        (lambda f: edit(f, lambda m: m.pop("state")), "files or state are missing"),
        (lambda f: edit(f, lambda m: m["files"].pop("model.safetensors")), "files or state are missing"),
        (lambda f: edit(f, lambda m: m["files"].pop("optimizer.safetensors")), "optimizer.safetensors is missing"),
        (lambda f: edit(f, lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}})), "is no file of"),
        (lambda f: edit(f, lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}})), "is no file of"),
        (lambda f: edit(f, lambda m: m["files"].update({"config.json": None})), "is no file of"),
        (linked, "model.safetensors is missing"),
        (disguised_pickle, "not readable as safetensors"),
        (lying_header, "not readable as safetensors"),
        (endless_header, "not readable as safetensors"),
    ],
)
def test_damage_is_refused_and_nothing_is_touched(saved, damage, says):
    damage(saved)
    model, optimizer = pair(2, steps=1)
    before = contents(model, optimizer)
    with pytest.raises(checkpoint.CheckpointError, match=says):
        checkpoint.load(saved, model, optimizer)
    assert same(before, contents(model, optimizer))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (ModelConfig(layers=2, hidden=16, heads=2, mlp=16), "is missing"),
        (ModelConfig(layers=1, hidden=16, heads=2, mlp=32), r"is \[16, 16\], the model has \[32, 16\]"),
        (ModelConfig(layers=1, hidden=16, heads=2, mlp=16, arch="llama"), "is not part of this model"),
    ],
)
def test_another_model_is_refused(saved, config, says):
    with pytest.raises(checkpoint.CheckpointError, match=says):
        checkpoint.load(saved, *pair(2, config=config))


def test_a_checkpoint_that_is_deleted_loses_its_name_first(tmp_path, monkeypatch):
    for update in (1, 2):
        checkpoint.save(checkpoint.checkpoint_path(tmp_path, update), *pair(1), {})

    def dies(path, **kwargs):
        if Path(path).is_dir():
            (Path(path) / "checkpoint.json").unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dies)
        with pytest.raises(Killed):
            checkpoint.prune(tmp_path, 1)
    assert checkpoint.saved_updates(tmp_path) == [2]
    checkpoint.prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["update-00000002"]


def test_an_error_is_not_hidden_by_a_checkpoint_that_another_process_has_made(tmp_path, monkeypatch):
    """Only a failed rename says that the other was quicker."""
    folder = tmp_path / "cached"

    def breaks(*args, **kwargs):
        folder.mkdir()
        raise ValueError("broken")

    monkeypatch.setattr(checkpoint, "save_file", breaks)
    with pytest.raises(ValueError, match="broken"):
        checkpoint.save(folder, *pair(1), {})


def test_prune_keeps_the_latest(tmp_path):
    for update in (1, 2, 10):
        checkpoint.save(checkpoint.checkpoint_path(tmp_path, update), *pair(1), {})
    (tmp_path / "update-x").mkdir()
    checkpoint.prune(tmp_path, 2)
    assert checkpoint.saved_updates(tmp_path) == [2, 10]
    assert (tmp_path / "update-x").is_dir()  # not ours
    assert checkpoint.saved_updates(tmp_path / "nowhere") == []
