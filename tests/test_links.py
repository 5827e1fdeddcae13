"""Links in a folder of somebody else: nothing is read or written through them."""

import json
import os
from pathlib import Path

import pytest
import yaml
from small_runs import save_network

from kd_trainer.commands.report import build_report
from kd_trainer.commands.train import train
from kd_trainer.compare.runs import written_note, written_results
from kd_trainer.config import parse
from kd_trainer.disk import FolderLock, check_own_files
from kd_trainer.run_folder import (
    log_history,
    run_settings,
    write_bad_samples,
    write_json,
    written_settings,
)
from kd_trainer.safe_files import read_json, read_regular, write_text

SECRET = '{"secret": "content", "dataset": "private"}'
LINK = r"^Expected a regular file as .*, got a link\. "


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.json"
    path.write_text(SECRET)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a stranger hands over as the output folder of a training."""
    folder = tmp_path / "run"
    save_network(folder / "student")
    settings = {"dataset": "none", "image_size": 64, "teacher": "none"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_a_lock_that_is_a_link_empties_nothing(run, secret):
    """The number of the process would be written into whatever it points to."""
    (run / FolderLock.FILE).symlink_to(secret)
    with pytest.raises(ValueError, match=LINK):
        FolderLock(run).take()
    assert secret.read_text() == SECRET


@pytest.mark.parametrize(
    "name", ["config.yaml", "results.json", "student", "student/config.json", "panels/a.png", "hub"]
)
def test_a_training_writes_into_no_folder_with_links_of_its_names(name, run, secret):
    place = run / name
    place.parent.mkdir(exist_ok=True)
    if place.is_dir():
        place.rename(run / "other")
    place.unlink(missing_ok=True)
    place.symlink_to(run / "other" if name == "student" else secret)
    settings = parse(["--dataset", "synthetic", "--teacher", "none", "--output_dir", str(run)])
    with pytest.raises(ValueError, match=LINK):
        train(settings)
    assert secret.read_text() == SECRET


def test_links_that_are_not_of_a_training_are_left_alone(run, secret):
    """People name their best checkpoint by a link."""
    (run / "best").symlink_to(run / "student")
    (run / "notes.json").symlink_to(secret)
    check_own_files(run)


@pytest.mark.parametrize("write", [write_text, write_json])
def test_what_is_written_takes_the_place_of_a_link(write, tmp_path, secret):
    place = tmp_path / "new.json"
    place.symlink_to(secret)
    write(place, "x" if write is write_text else {"a": 1})
    assert not place.is_symlink()
    assert secret.read_text() == SECRET
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_the_list_of_bad_samples_takes_the_place_of_a_link(tmp_path, secret):
    (tmp_path / "bad_samples.txt").symlink_to(secret)
    write_bad_samples(tmp_path, [])
    assert secret.read_text() == SECRET


def test_a_report_is_written_beside_what_a_link_points_to(run, secret):
    (run / "report.html").symlink_to(secret)
    build_report(run)
    assert secret.read_text() == SECRET
    assert (run / "report.html").read_text().startswith("<!")


@pytest.mark.parametrize("name", ["config.yaml", "results.json", "trainer_state.json"])
def test_a_report_shows_nothing_that_a_link_points_to(name, run, secret):
    """It is made to be passed on."""
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)
    with pytest.raises(ValueError, match=LINK):
        build_report(run)
    assert not (run / "report.html").exists()


def test_every_reader_of_a_run_folder_refuses_a_link(run, secret):
    for name in ("config.yaml", "trainer_state.json", "comparison_run.json", "results.json"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(secret)
    for read in (run_settings, written_settings, log_history, written_note, written_results):
        with pytest.raises(ValueError, match=LINK):
            read(run)


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path):
    """Reading a pipe that nobody writes to never ends, nor does /dev/zero."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="got a device or pipe"):
        read_regular(tmp_path / "pipe")
    with pytest.raises(ValueError, match="got a device or pipe"):
        read_json(Path("/dev/zero"))
    with pytest.raises(ValueError, match="got a device or pipe"):
        write_text(tmp_path / "pipe", "x")
    with pytest.raises(ValueError, match="got a folder"):
        write_text(tmp_path, "x")


def test_a_new_file_has_the_usual_rights(tmp_path):
    (tmp_path / "usual").touch()
    write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_file_is_read_up_to_a_bound(tmp_path):
    (tmp_path / "long.json").write_text(json.dumps("x" * 100))
    with pytest.raises(ValueError, match=r"^Expected at most"):
        read_regular(tmp_path / "long.json", most=50)
