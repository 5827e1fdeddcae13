"""Files of others are read without following a link, ours are written whole or not at all."""

import json
import math
import os
from pathlib import Path

import pytest
import yaml
from small_runs import save_network

from kd_trainer.commands.report import build_report
from kd_trainer.commands.train import train
from kd_trainer.compare.runs import written_note, written_results
from kd_trainer.config import parse
from kd_trainer.files import (
    FolderLock,
    read_json,
    read_regular,
    replacing_file,
    replacing_files,
    write_json,
    write_text,
)
from kd_trainer.run_folder import (
    check_no_links,
    log_history,
    run_settings,
    write_bad_samples,
    written_settings,
)

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
    check_no_links(run)


@pytest.mark.parametrize(
    "write",
    [
        lambda place: write_text(place, "x"),
        lambda place: write_json(place, {"a": 1}),
        lambda place: write_bad_samples(place.parent, []),
    ],
    ids=["text", "json", "bad samples"],
)
def test_what_is_written_takes_the_place_of_a_link(write, tmp_path, secret):
    place = tmp_path / "bad_samples.txt"
    place.symlink_to(secret)
    write(place)
    assert not place.is_symlink()
    assert secret.read_text() == SECRET
    assert [p.name for p in tmp_path.glob(".*")] == []


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


def test_files_are_replaced_as_a_whole(tmp_path: Path):
    """A reader, or a process that dies while it writes, left half a file under the name."""
    file = tmp_path / "results.json"
    write_text(file, "before")

    def die_halfway() -> None:
        with replacing_file(file) as partial:
            partial.write_text("half")
            assert file.read_text() == "before"
            raise KeyError

    with pytest.raises(KeyError):
        die_halfway()
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert file.read_text() == "before"
    with replacing_files(tmp_path / "student") as folder:
        (folder / "config.json").write_text("{}")
        assert not list((tmp_path / "student").iterdir())
    assert (tmp_path / "student" / "config.json").read_text() == "{}"


def test_figures_that_do_not_exist_become_null(tmp_path: Path):
    """Python writes NaN, which is no JSON: most other readers refuse the whole file."""
    path = tmp_path / "new" / "results.json"
    write_json(path, {"iou_bag": math.nan, "history": [{"loss": math.inf}], "miou": 0.5, "n": 3})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read == {"iou_bag": None, "history": [{"loss": None}], "miou": 0.5, "n": 3}
