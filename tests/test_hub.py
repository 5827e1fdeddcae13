"""What is pushed, and how the Hub's answers reach the user, against a Hub on loopback."""

import json
import re
import shutil
import socket
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from hub_server import TOKEN, Hub
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from kd_trainer.arguments import DataArguments
from kd_trainer.data import load_splits
from kd_trainer.hub import check_access, clear, copy_files, find_source, upload
from kd_trainer.hub.files import CARD, CODE, RESULTS, STUDENT

ID = "me/student"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two large files, two small ones, one of them in a folder."""
    root = tmp_path / "folder"
    (root / "runs" / "now").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("model.safetensors", "more.safetensors"):
        (root / name).write_bytes(random.bytes(200_000))
    (root / CARD).write_text("---\nlicense: mit\n---\n\n# Ä card\n", encoding="utf-8")
    (root / "runs" / "now" / "events.out.tfevents.1.0").write_bytes(bytes(range(256)))
    return root


@pytest.fixture
def made(hub: Hub) -> Hub:
    check_access(ID)
    return hub


def test_files_come_back_byte_for_byte(made: Hub, folder: Path):
    """A client that alters line ends or cuts a large file would publish another model."""
    pushed = upload(folder, ID, message="First")
    assert pushed.changed
    assert pushed.url == f"{made.url}/{ID}"
    back = Path(snapshot_download(ID))
    assert back.name == pushed.commit
    assert contents(back) == contents(folder) == made.files(ID)
    assert made.messages(ID) == ["First"]
    assert sum(r.startswith("PUT /lfs/") for r in made.requests) == 2


def test_datasets_come_back_byte_for_byte(hub: Hub, folder: Path):
    """The server stands for the Hub of data sets as well, under other addresses."""
    api = HfApi()
    api.create_repo("me/photos", repo_type="dataset")
    api.upload_folder(repo_id="me/photos", folder_path=folder, repo_type="dataset")
    assert contents(Path(snapshot_download("me/photos", repo_type="dataset"))) == contents(folder)
    assert hub.files("me/photos", "datasets") == contents(folder)


def test_training_data_is_read_from_the_hub(hub: Hub, pair_folder: Path, tmp_path: Path):
    """`--dataset OWNER/NAME` meets folders, revisions and caches that no local file has."""
    local = load_splits(DataArguments(dataset=str(pair_folder)))
    for split, rows in local.items():
        embedded = rows.map(
            lambda row: {
                name: {"bytes": Path(row[name]["path"]).read_bytes(), "path": None}
                for name in ("image", "mask")
            }
        )
        embedded.to_parquet(str(tmp_path / "up" / "data" / f"{split}-00000-of-00001.parquet"))
    api = HfApi()
    api.create_repo("me/photos", repo_type="dataset")
    api.upload_folder(repo_id="me/photos", folder_path=tmp_path / "up", repo_type="dataset")
    back = load_splits(DataArguments(dataset="me/photos"))
    assert back.keys() == local.keys()
    for split, rows in local.items():
        for mine, theirs in zip(rows, back[split], strict=True):
            for name in ("image", "mask"):
                assert Path(mine[name]["path"]).read_bytes() == theirs[name]["bytes"]


def test_a_part_of_a_file_can_be_asked_for(made: Hub, folder: Path):
    """Interrupted downloads go on where they stopped."""
    upload(folder, ID, message="First")
    wanted = Request(f"{made.url}/{ID}/resolve/main/model.safetensors")
    wanted.add_header("Range", "bytes=1000-1999")
    with urlopen(wanted) as answer:
        assert answer.status == 206
        assert answer.read() == (folder / "model.safetensors").read_bytes()[1000:2000]
        assert answer.headers["X-Repo-Commit"] == made.repos["models", ID].at("main")[0]


def test_the_same_content_makes_no_new_commit(made: Hub, folder: Path):
    """A history of empty commits hides the ones that changed something."""
    first = upload(folder, ID, message="First")
    again = upload(folder, ID, message="Again")
    assert not again.changed
    assert again.commit == first.commit
    (folder / CARD).write_text("---\nlicense: mit\n---\n\n# Better\n")
    assert upload(folder, ID, message="Better").changed
    assert made.messages(ID) == ["First", "Better"]
    assert sum(r.startswith("PUT /lfs/") for r in made.requests) == 2


def test_old_curves_go_and_files_of_others_stay(made: Hub, folder: Path):
    """Curves of two runs over each other are unreadable; an export added by hand is not ours."""
    upload(folder, ID, message="First")
    HfApi().upload_file(path_or_fileobj=b"net", path_in_repo="model.onnx", repo_id=ID)
    shutil.move(folder / "runs" / "now", folder / "runs" / "later")
    upload(folder, ID, message="Second")
    assert made.files(ID) == contents(folder) | {"model.onnx": b"net"}
    assert any(name.startswith("runs/later/") for name in made.files(ID))


def test_a_connection_that_breaks_once_is_tried_again(made: Hub, folder: Path):
    """A hiccup after hours of training must not cost the push."""
    made.drop_uploads(1)
    upload(folder, ID, message="First")
    assert made.files(ID) == contents(folder)


def test_an_interrupted_upload_is_one_line_and_can_be_repeated(made: Hub, folder: Path):
    """Half a model in the repository would be worse than none."""
    made.drop_uploads(1000)
    with pytest.raises(ConnectionError, match=r"^Expected the Hub to answer, got .*push again"):
        upload(folder, ID, message="First")
    assert made.files(ID) == {}
    made.drop_uploads(0)
    upload(folder, ID, message="First")
    assert contents(Path(snapshot_download(ID))) == contents(folder)
    assert made.messages(ID) == ["First"]


def test_what_had_arrived_is_not_sent_again(made: Hub, folder: Path):
    """On a slow line the second attempt would fail like the first."""
    made.fail("POST /api/models/.*/commit", 500)
    with pytest.raises(ConnectionError, match="HTTP 500"):
        upload(folder, ID, message="First")
    sent = sum(r.startswith("PUT") for r in made.requests)
    made.faults.clear()
    upload(folder, ID, message="First")
    assert sum(r.startswith("PUT") for r in made.requests) == sent == 2
    assert made.files(ID) == contents(folder)


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def refuse(case: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bring about one reason for a push to fail."""
    if case == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif case == "unknown token":
        monkeypatch.setenv("HF_TOKEN", "nobody")
    elif case == "token that may only read":
        monkeypatch.setenv("HF_TOKEN", "token-to-read")
    elif case == "repository of somebody else":
        monkeypatch.setenv("HF_TOKEN", "token-of-eve")
    elif case == "forbidden":
        hub.fail("preupload", 403, message="Storage is full")
        hub.fail("auth-check", 403, message="Storage is full")
    elif case == "gone":
        del hub.repos["models", ID]
        hub.fail("repos/create|auth-check", 404, "RepoNotFound", "Repository not found")
    elif case == "broken":
        hub.fail("api/models", 500, message="Out of order")
    elif case == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    elif case == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


REASONS = {
    "no token": (PermissionError, "Expected a token for the Hub, got none. Log in with"),
    "unknown token": (PermissionError, "Expected a valid token for me/student, got HTTP 401"),
    "token that may only read": (PermissionError, "This token may only read"),
    "repository of somebody else": (PermissionError, "may write to me/student, got HTTP 403"),
    "forbidden": (PermissionError, "got HTTP 403 (Storage is full). Give the token write access"),
    "gone": (FileNotFoundError, "Expected the repository me/student on the Hub, got HTTP 404"),
    "broken": (ConnectionError, "Expected the Hub to accept me/student, got HTTP 500"),
    "no network": (ConnectionError, "Expected the Hub to answer, got ConnectError"),
    "offline": (ConnectionError, "got offline mode. Unset HF_HUB_OFFLINE"),
}


@pytest.mark.parametrize("case", REASONS)
def test_each_refusal_is_one_clear_line(case, made, folder, monkeypatch, capfd):
    """The library's own messages are five lines about a URL, and never say what to do."""
    kind, message = REASONS[case]
    refuse(case, made, monkeypatch)
    attempts = [lambda: check_access(ID), lambda: upload(folder, ID, message="First")]
    for attempt in attempts[:1] if case == "no token" else attempts:
        with pytest.raises(kind) as caught:
            attempt()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("Expected ")
    assert capfd.readouterr().err == ""


def test_a_card_that_the_hub_refuses_is_one_line(made: Hub, folder: Path):
    """Only the Hub knows its list of licences, and answers with a page of it."""
    (folder / CARD).write_text("---\nlicense: nonsense\n---\n")
    with pytest.raises(ValueError, match=r"^Expected a card that the Hub accepts, got: .*license"):
        upload(folder, ID, message="First")
    assert made.messages(ID) == []


def test_bars_show_large_files_only_where_one_is_new(made: Hub, folder: Path, capfd):
    """Minutes of silence look like a crash, and a bar over nothing like a fault."""
    (folder / "more.safetensors").unlink()
    upload(folder, ID, message="First")
    assert "model.safetensors: 100%" in capfd.readouterr().err
    (folder / CARD).write_text("---\nlicense: mit\n---\n\n# Better\n")
    upload(folder, ID, message="Second")
    (folder / "model.safetensors").write_bytes(b"new")
    upload(folder, ID, message="Third", progress=False)
    assert capfd.readouterr().err == ""


def test_private_makes_a_private_repository(hub: Hub):
    """Public by mistake cannot be taken back."""
    check_access("org/hidden", private=True)
    assert hub.repos["models", "org/hidden"].private
    check_access("org/hidden", private=True)


def test_private_refuses_a_repository_that_is_public(made: Hub):
    """The Hub accepts the wish for an existing repository and does not fulfil it."""
    with pytest.raises(ValueError, match="Expected me/student to be private"):
        check_access(ID, private=True)


def test_no_token_is_sent_anywhere_but_in_its_header(made: Hub, folder: Path):
    """A token in an address ends up in logs."""
    upload(folder, ID, message="First")
    assert not any(TOKEN in request for request in made.requests)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder full of what must stay at home."""
    root = tmp_path / "machine-of-jane" / "run"
    for name in ("student", "checkpoint-8", "checkpoint-12", "panels", "teacher"):
        (root / name).mkdir(parents=True)
    for name in (*STUDENT, *CODE):
        (root / "student" / name).write_bytes(b"student " + name.encode())
    secrets = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "token")
    for place in (root, root / "student", root / "checkpoint-12"):
        for name in (*secrets, "notes.py", ".env"):
            (place / name).write_bytes(b"SECRET")
    (root / "teacher" / "model.safetensors").write_bytes(b"SECRET")
    (root / "config.yaml").write_text("seed: 1\n")
    (root / "results.json").write_text(json.dumps({"student_miou": 0.5, "teacher": str(root)}))
    for step in (8, 12):
        (root / "panels" / f"step_{step:06d}.png").write_bytes(b"panel %d" % step)
        state = {"best_global_step": 8, "best_model_checkpoint": str(root / "checkpoint-8")}
        (root / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    with SummaryWriter(root / "runs" / "Nov24_07-00-12_machine-of-jane") as writer:
        writer.add_text("args", f"output_dir: {root}")
        for step in range(3):
            writer.add_scalar("train/loss", 1 / (step + 1), step)
        writer.add_image("panel", torch.zeros(3, 8, 8), 1)
    return root


def copied(run: Path, destination: Path, **options: bool) -> dict[str, bytes]:
    source = find_source(run)
    clear(destination, source)
    copy_files(source, destination, **options)
    return contents(destination)


def test_nothing_but_the_named_files_is_copied(run: Path, tmp_path: Path):
    """training_args.bin names this machine and may hold a token; a teacher may not be ours."""
    files = copied(run, tmp_path / "out")
    boards = {name for name in files if name.startswith("runs/")}
    named = {*STUDENT, *CODE, "results.json", "trainer_state.json", "panel.png"}
    assert set(files) - boards == named
    assert all(files[name] == b"student " + name.encode() for name in (*STUDENT, *CODE))
    assert not any(b"SECRET" in content for content in files.values())
    assert not any(b"machine-of-jane" in content for content in files.values())
    assert all(re.fullmatch(r"runs/[\w-]{14}/events\.out\.tfevents\.\d+\.0", n) for n in boards)
    assert json.loads(files["results.json"]) == {"student_miou": 0.5, "teacher": "run"}
    assert files["panel.png"] == b"panel 8", "that of the best student"


def test_curves_survive_and_settings_do_not(run: Path, tmp_path: Path):
    """A board that lost its curves looks like a run that logged nothing."""
    copied(run, tmp_path / "out")
    board = EventAccumulator(str(next((tmp_path / "out" / "runs").iterdir())))
    board.Reload()
    found = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert found == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert board.Tags()["images"] == ["panel"]
    assert board.Tags()["tensors"] == []


def test_pictures_can_be_left_out_of_panel_and_curves(run: Path, tmp_path: Path):
    """Panels show photographs of the evaluation data, and people on them."""
    files = copied(run, tmp_path / "out", pictures=False)
    assert "panel.png" not in files
    board = EventAccumulator(str(next((tmp_path / "out" / "runs").iterdir())))
    board.Reload()
    assert board.Tags()["images"] == []
    assert board.Tags()["scalars"] == ["train/loss"]


def test_results_of_an_earlier_run_are_not_those_of_a_student_in_training(run, tmp_path):
    """A resumed run still has the results.json of the student before."""
    files = copied(run, tmp_path / "out", finished=False)
    assert not {"results.json"} & set(files)
    assert files["panel.png"] == b"panel 12"
    assert set(RESULTS) & set(files) == {"trainer_state.json"}


def test_a_student_folder_alone_is_enough(run: Path, tmp_path: Path):
    """Students are moved and copied; the run around them is not needed."""
    moved = shutil.copytree(run / "student", tmp_path / "moved")
    assert find_source(moved).run is None
    assert set(copied(moved, tmp_path / "out")) == {*STUDENT, *CODE}
    assert find_source(run / "student").run == run


def test_an_incomplete_student_is_refused(run: Path):
    """Without its processor nobody can use it, and the Hub's widget fails."""
    (run / "student" / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"without preprocessor_config\.json\. A training"):
        find_source(run)


def test_only_an_earlier_publication_is_replaced(run: Path, tmp_path: Path):
    """A folder named by mistake would be emptied."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    (photographs / "anna.jpg").write_bytes(b"anna")
    other = shutil.copytree(run / "student", tmp_path / "other")
    source = find_source(run)
    for place in (photographs, run / "student", run, other, photographs / "anna.jpg"):
        with pytest.raises(ValueError, match=r"Expected .*Name another --output_dir"):
            clear(place, source)
    assert (photographs / "anna.jpg").read_bytes() == b"anna"
    copied(run, tmp_path / "out")
    (tmp_path / "out" / CARD).write_text("card")
    copied(run, tmp_path / "out")
    assert not (tmp_path / "out" / CARD).exists()


def test_downloading_needs_no_token_for_a_public_repository(made, folder, monkeypatch):
    """Strangers are the ones a public student is for."""
    upload(folder, ID, message="First")
    monkeypatch.delenv("HF_TOKEN")
    assert Path(hf_hub_download(ID, CARD)).read_bytes() == (folder / CARD).read_bytes()
