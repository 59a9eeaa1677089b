"""What a checkpoint keeps and which one is read, with a model of two matrices. Ranks, kills and full disks:
test_survival."""

import json
import os
from pathlib import Path

import pytest
import torch

import checkpoints
from lib import distributed
from lib.options import UserError


def trained(updates: int):
    """A model after so many steps of AdamW, and its optimiser."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.Linear(4, 2, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.95), fused=True)
    for i in range(updates):
        model(torch.ones(3) + i).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.fixture(scope="module")
def world():
    return distributed.setup("cpu")


def test_a_loaded_optimiser_goes_on_as_the_saved_one_would(tmp_path, world):
    """Also where updates and steps of the run differ: AdamW's bias correction counts updates."""
    saved, optimizer = trained(6)
    checkpoints.save(tmp_path, saved, optimizer, {"step": 3}, world, 2)
    loaded, other = trained(0)
    path, state = checkpoints.newest(tmp_path)
    assert state == checkpoints.load(path, loaded, other) and (state["step"], state["updates"]) == (3, 6)
    for model, its in ((saved, optimizer), (loaded, other)):
        assert [s["step"].item() for s in its.state.values()] == [6, 6]
        model(torch.ones(3)).sum().backward()
        its.step()
    for a, b in zip(saved.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_a_save_left_behind_is_never_read_and_goes_with_the_next(tmp_path, world):
    """A crash before the rename leaves a whole one, newer than the others."""
    model, optimizer = trained(1)
    for step in (2, 4):
        checkpoints.save(tmp_path, model, optimizer, {"step": step}, world, 9)
    (tmp_path / "step_000004").rename(tmp_path / "writing_000004")
    assert [p.name for p in checkpoints.complete(tmp_path)] == ["step_000002"]
    assert checkpoints.newest(tmp_path)[1]["step"] == 2
    checkpoints.save(tmp_path, model, optimizer, {"step": 6}, world, 9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000002", "step_000006"]


def test_state_and_manifest_are_on_the_disk_before_the_checkpoint_has_its_name(tmp_path, world, monkeypatch):
    """Only the order of calls can be seen, not what a disk does when its power fails."""
    events, fsync, rename = [], os.fsync, os.rename

    def noted_fsync(descriptor: int):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.removesuffix(".writing"))
        fsync(descriptor)

    def noted_rename(source, target):
        events.append(Path(target).name)
        rename(source, target)

    model, optimizer = trained(1)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    checkpoints.save(tmp_path, model, optimizer, {"step": 2}, world, 9)
    assert events[-3:] == ["state.json", "manifest.json", "step_000002"]
    named = json.loads((tmp_path / "step_000002" / "manifest.json").read_text())
    assert {Path(name).name for name in named} <= set(events), "the weights too"


def test_a_file_that_its_manifest_does_not_list_makes_a_checkpoint_unusable(tmp_path, world):
    """The reader of shards takes every file of a folder."""
    checkpoints.save(tmp_path, *trained(1), {"step": 2}, world, 9)
    (tmp_path / "step_000002" / "optimizer" / "odd.safetensors").touch()
    with pytest.raises(checkpoints.BadCheckpoint, match="does not list optimizer/odd"):
        checkpoints.verify(tmp_path / "step_000002")


def test_rotation_counts_checkpoints_alone_and_removes_nothing_else(tmp_path, world):
    model, optimizer = trained(1)
    others = ["step_best", "step_000001_copy", "step_000003"]  # the last has no manifest
    for name in others:
        (tmp_path / name).mkdir()
    for step in (2, 999_999, 1_000_000):
        checkpoints.save(tmp_path, model, optimizer, {"step": step}, world, 2)
    assert {p.name for p in tmp_path.iterdir()} == {*others, "step_999999", "step_1000000"}
    assert checkpoints.newest(tmp_path)[1]["step"] == 1_000_000


def test_where_what_a_failed_save_left_cannot_be_removed_the_failure_is_said_all_the_same(tmp_path, world,
                                                                                         monkeypatch):
    def rename(*_):
        raise OSError(28, "No space left on device")

    def rmtree(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(16, "Device or resource busy")

    model, optimizer = trained(1)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", rmtree)
    with pytest.raises(UserError, match="step_000002 cannot be written .No space left on device"):
        checkpoints.save(tmp_path, model, optimizer, {"step": 2}, world, 9)


@pytest.mark.parametrize("name, content, said", [
    ("manifest.json", "{", "cannot be read"), ("manifest.json", "[]", "must be a JSON object"),
    ("manifest.json", "{}", "state.json must be a string"),
    ("manifest.json", '{"state.json": 3}', "must be a string"),
    ("manifest.json", '{"state.json": "0", "a\\u0000": "0"}', "null byte"),
    ("manifest.json", None, "does not exist"),
    ("manifest.json", '{"state.json": "0", "weights": "0"}', "Is a directory"),
    ("state.json", '{"step": "3", "updates": 1}', "step must be a whole number"),
    ("state.json", "{}", "step must be"),
    ("state.json", '{"step": -1, "updates": 1}', "not -1"),
    ("state.json", '{"step": 3, "updates": NaN}', "NaN"),
    ("state.json", '{"step": 3, "updates": true}', "updates must be")])
def test_a_checkpoint_with_an_odd_record_is_incomplete(name, content, said, tmp_path, world):
    checkpoints.save(tmp_path, *trained(1), {"step": 3}, world, 2)
    path = tmp_path / "step_000003"
    (path / name).unlink()
    if content is not None:
        (path / name).write_text(content)
    with pytest.raises(checkpoints.BadCheckpoint, match="step_000003 is incomplete") as e:
        checkpoints.verify(path)
    assert said in str(e.value)
