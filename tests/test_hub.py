"""What is pushed, and how the Hub's answers reach the user, against a Hub on loopback."""

import json
import math
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import HfApi, constants, snapshot_download
from torch.utils.tensorboard import SummaryWriter

from kd_trainer.data import load_splits
from kd_trainer.data_arguments import DataArguments
from kd_trainer.files import MARKER, check_replaceable, replacing_folder
from kd_trainer.hub import (
    CARD,
    CODE,
    RESULTS,
    STUDENT,
    check_access,
    check_no_links,
    copy_files,
    find_source,
    upload,
    without_paths,
)

ID = "me/student"


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that is published of a folder, and whatever else lies there."""
    files = [p for p in folder.rglob("*") if p.is_file() and p != folder / MARKER]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


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
    check_access(ID, private=False)
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
    # Slices, as `datasets` takes them.
    parts = {"train_split": "train[:75%]", "eval_split": "train[75%:]"}
    sliced = load_splits(DataArguments(dataset="me/photos", **parts))
    assert [len(rows) for rows in sliced.values()] == [6, 2]
    with pytest.raises(ValueError, match=r"^Expected the whole split train .* --streaming out\.$"):
        load_splits(DataArguments(dataset="me/photos", streaming=True, **parts))
    for split, rows in local.items():
        for mine, theirs in zip(rows, back[split], strict=True):
            for name in ("image", "mask"):
                assert Path(mine[name]["path"]).read_bytes() == theirs[name]["bytes"]


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
    attempts = [
        lambda: check_access(ID, private=False),
        lambda: upload(folder, ID, message="First"),
    ]
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


def test_a_push_is_private_unless_told_otherwise(hub: Hub):
    """Public by mistake cannot be taken back."""
    check_access("org/hidden")
    assert hub.repos["models", "org/hidden"].private
    check_access("org/hidden")
    check_access("org/shown", private=False)
    assert not hub.repos["models", "org/shown"].private


@pytest.mark.parametrize("private", [True, False])
def test_an_existing_repository_of_the_other_kind_is_refused(private: bool, hub: Hub):
    """The Hub accepts the wish for an existing repository and does not fulfil it."""
    check_access(ID, private=not private)
    wanted, found = ("private", "public")[:: 1 if private else -1]
    with pytest.raises(
        ValueError, match=rf"^Expected {ID} to be {wanted}, got a {found} .*--public"
    ):
        check_access(ID, private=private)


LOADED = (
    *("handler.py", "pytorch_model.bin", "requirements.txt", "adapter_config.json"),
    *("extra/code.py", "processor_config.json", "model-00001-of-00002.safetensors"),
)


def test_files_that_change_how_the_student_loads_are_refused_without_force(made: Hub, folder: Path):
    """An endpoint runs handler.py, and transformers takes an adapter or another processor."""
    repo = made.repos["models", ID]
    for name in LOADED:
        repo.commits[-1][2].clear()
        repo.commits[-1][2][name] = b"of somebody"
        for attempt in (check_access, upload):
            options = {"private": False} if attempt is check_access else {"message": "First"}
            given = (ID,) if attempt is check_access else (folder, ID)
            with pytest.raises(
                ValueError, match=rf"^Expected nothing in {ID} .* got {name}\. .*--force"
            ):
                attempt(*given, **options)
    assert made.messages(ID) == []
    check_access(ID, private=False, force=True)
    pushed = upload(folder, ID, message="First", force=True)
    assert pushed.others == (LOADED[-1],)
    assert made.files(ID) == contents(folder) | {LOADED[-1]: b"of somebody"}


CARDS = {
    "---\nlicense: mit\n---\n": True,
    "---\nlicense: mit\n---\n# Distilled with kd_trainer\n": True,
    "---\nlicense: mit\n---\n# My model\n": False,
}


@pytest.mark.parametrize("card", CARDS)
def test_a_model_of_another_origin_is_not_written_over(card: str, made: Hub):
    """A slip in the id would replace another model, and a card that somebody wrote."""
    files = made.repos["models", ID].commits[-1][2]
    files[CARD] = card.encode()
    if CARDS[card]:
        check_access(ID, private=False)
    files["config.json"] = b"{}"
    if "kd_trainer" not in card:
        with pytest.raises(ValueError, match=rf"^Expected {ID} to be new .*got another README"):
            check_access(ID, private=False)
    check_access(ID, private=False, force=True)


def test_harmless_files_of_others_stay_and_are_listed(made: Hub, folder: Path):
    """An export and an image beside the student change nothing."""
    others = dict.fromkeys(("model.onnx", "docs/a.png", "runs/notes.txt", "LICENSE"), b"x")
    made.repos["models", ID].commits[-1][2].update(others | {".gitattributes": b""})
    check_access(ID, private=False)
    pushed = upload(folder, ID, message="First")
    assert pushed.others == tuple(sorted(others))
    assert made.files(ID).items() >= others.items()


@pytest.mark.parametrize("card", ["# Distilled with kd_trainer", "# By hand"])
def test_a_panel_of_an_earlier_push_goes_with_it(card: str, made: Hub, folder: Path):
    """Whoever leaves the pictures out now would leave the earlier ones public."""
    earlier = {"panel.png": b"face", "results.json": b"{}", CARD: card.encode()}
    made.repos["models", ID].commits[-1][2].update(earlier)
    upload(folder, ID, message="Second")
    stays = {"panel.png", "results.json"} if card == "# By hand" else set()
    assert set(made.files(ID)) == {*contents(folder), *stays}


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
    figures = {"student_miou": 0.5, "student_iou_bag": math.nan, "teacher": str(root)}
    (root / "results.json").write_text(json.dumps(figures))
    for step in (8, 12):
        (root / "panels" / f"step_{step:06d}.png").write_bytes(b"panel %d" % step)
        state = {"best_global_step": 8, "best_model_checkpoint": str(root / "checkpoint-8")}
        (root / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    with SummaryWriter(root / "runs" / "Nov24_07-00-12_machine-of-jane") as writer:
        writer.add_text("args", f"output_dir: {root}")
    return root


def copied(run: Path, destination: Path, **options: bool) -> dict[str, bytes]:
    with replacing_folder(destination, "output_dir") as folder:
        copy_files(find_source(run), folder, **options)
    return contents(destination)


def test_nothing_but_the_named_files_is_copied(run: Path, tmp_path: Path):
    """training_args.bin names this machine and may hold a token; a teacher may not be ours."""
    files = copied(run, tmp_path / "out", pictures=True)
    assert set(files) == {*STUDENT, *CODE, "results.json", "trainer_state.json", "panel.png"}
    assert all(files[name] == b"student " + name.encode() for name in (*STUDENT, *CODE))
    assert not any(b"SECRET" in content for content in files.values())
    assert not any(b"machine-of-jane" in content for content in files.values())
    shown = {"student_miou": 0.5, "student_iou_bag": None, "teacher": "run"}
    assert json.loads(files["results.json"]) == shown
    assert files["panel.png"] == b"panel 8", "that of the best student"


def test_images_of_the_data_are_published_only_when_asked_for(run: Path, tmp_path: Path):
    """Panels show images of the evaluation data, and people on them."""
    assert "panel.png" not in copied(run, tmp_path / "out")


def test_results_of_an_earlier_run_are_not_those_of_a_student_in_training(run, tmp_path):
    """A resumed run still has the results.json of the student before."""
    files = copied(run, tmp_path / "out", finished=False, pictures=True)
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


def test_only_what_was_written_here_before_is_replaced(run: Path, tmp_path: Path, monkeypatch):
    """A folder named by mistake would be emptied: all runs, or the model of somebody else."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    (photographs / "anna.jpg").write_bytes(b"anna")
    other = shutil.copytree(run / "student", tmp_path / "other")
    (other / CARD).write_text("# A card, but not ours")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "forged").mkdir()
    (tmp_path / "forged" / MARKER).write_text('{"files": ["../photographs/anna.jpg"]}')
    shutil.copy(photographs / "anna.jpg", tmp_path / "forged" / "bert.jpg")
    workplace = tmp_path / "above" / "work"
    workplace.mkdir(parents=True)
    monkeypatch.chdir(workplace)
    before = contents(tmp_path)
    source = find_source(run)
    forbidden = [photographs, source.student, run, run.parent, other, photographs / "anna.jpg"]
    forbidden += [tmp_path / "link", tmp_path / "forged", Path(), Path("..")]
    for place in forbidden:
        with pytest.raises(ValueError, match=r"^Expected .*Name another --output_dir"):
            check_replaceable(place, "output_dir", sources=(source.student, run))
        with pytest.raises(ValueError, match="Expected"), replacing_folder(place, "output_dir"):
            pytest.fail("nothing may be written")
    assert contents(tmp_path) == before


def break_off(folder: Path) -> None:
    with replacing_folder(folder, "output_dir") as new:
        (new / "half").write_bytes(b"half")
        raise OSError("full")


def test_an_earlier_folder_is_replaced_whole_or_not_at_all(run: Path, tmp_path: Path):
    """What a cut-off push leaves would otherwise be half of one student and half of another."""
    out = tmp_path / "out"
    first = copied(run, out, pictures=True)
    assert "panel.png" in first
    with pytest.raises(OSError, match="full"):
        break_off(out)
    assert contents(out) == first
    assert "panel.png" not in copied(run, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["machine-of-jane", "out"]
    (out / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"which holds mine\.txt"):
        copied(run, out)


LINKED = (
    *("student/modeling.py", "student/model.safetensors", "results.json", "panels/step_000012.png"),
    *("checkpoint-12", "export.json", "student"),
)


@pytest.mark.parametrize("name", LINKED)
def test_a_link_in_a_run_is_never_published(name: str, run: Path, tmp_path: Path):
    """A stranger's run whose modeling.py leads to a private file would make it public."""
    check_no_links(find_source(run))
    path = run / name
    moved = tmp_path / "private"
    if path.exists():
        path.rename(moved)
    path.symlink_to(moved)
    if not moved.exists():
        moved.write_text("private")
    with pytest.raises(
        ValueError, match=rf"^Expected regular files .*{path.name}, which is a link"
    ):
        check_no_links(find_source(run))


PATHS = {
    "runs/teacher/student": "teacher",
    "../jane/big.pth": "big.pth",
    "secret/big.pth": "big.pth",
    "runs/teacher": "teacher",
    "C:\\Users\\jane\\big": "big",
    "~/big/": "big",
    "/home/jane/big": "big",
    "owner/name": "owner/name",
    "cuda:0": "cuda:0",
}


def test_paths_leave_the_results_and_ids_stay():
    """A relative path names people and projects as an absolute one does."""
    found = without_paths({"teacher": list(PATHS), "best_model_checkpoint": "out/checkpoint-8"})
    assert found == {"teacher": list(PATHS.values()), "best_model_checkpoint": "checkpoint-8"}
