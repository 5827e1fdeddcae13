"""No token in anything that a run writes, prints or sends as content."""

import base64
import json
import zlib
from pathlib import Path

import hub_server
import pytest
from hub_server import Handler, serving
from small_runs import train_flags, write_pairs

from kd_trainer.commands.train import run_train
from kd_trainer.config import parse
from kd_trainer.errors import run_script

CANARY = "hf_CanaryCanaryCanaryCanaryCanaryCana"
PUSH = ("--push_to_hub", "--hub_model_id", "me/student", "--hub_license", "mit")


def holds(content: bytes) -> bool:
    """Whether the token stands in there, plainly or as base64 at any offset."""
    secret = CANARY.encode()
    forms = [secret, *(base64.b64encode(b" " * i + secret)[4 * (i > 0) : -8] for i in range(3))]
    return any(form in content for form in forms)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A run that pushed at each save: its folder, what the Hub received, and what was printed."""
    root = tmp_path_factory.mktemp("secret")
    bodies: list[bytes] = []
    read = Handler._body

    def keep(self: Handler) -> bytes:
        bodies.append(read(self))
        return bodies[-1]

    with serving(root / "cache") as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "_body", keep)
        patch.setitem(hub_server.USERS, CANARY, ("me", "write"))
        patch.delitem(hub_server.USERS, hub_server.TOKEN)  # so it is the canary that was sent
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.setenv(name, CANARY)
        more = ("--hub_strategy", "every_save", "--hub_always_push", "true", "--panel_images", "1")
        flags = train_flags(
            write_pairs(root / "data", train=4, validation=2),
            root / "run",
            *(*PUSH, *more, "--report_to", "tensorboard", "--report", "true"),
        )
        run_train(parse(flags))
        yield root / "run", bodies, hub


def test_the_search_finds_a_token_in_each_form():
    """A search that finds nothing looks like a run that hides everything."""
    for content in (b"x" + CANARY.encode(), base64.b64encode(b"ab" + CANARY.encode() + b"c")):
        assert holds(content)
    assert not holds(b"hf_Canary" * 20)
    assert not holds(zlib.compress(CANARY.encode())), "so what is searched must not be packed"


def test_no_file_of_a_run_holds_the_token(pushed):
    """training_args.bin of the stock Trainer holds it in clear, and folders are passed around."""
    run, _, _ = pushed
    files = [path for path in run.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"training_args.bin", "config.yaml", "results.json", "report.html"} <= names
    assert any("tfevents" in name for name in names)
    assert [str(path) for path in files if holds(path.read_bytes())] == []


def test_the_hub_receives_the_token_in_no_content(pushed):
    """What is pushed is public; the token belongs into the head of a request alone."""
    _, bodies, hub = pushed
    commits = hub.repos["models", "me/student"].commits
    assert len(commits) >= 3
    contents = [content for _, _, files in commits for content in files.values()]
    assert len(bodies) > 5
    assert sum(map(len, bodies)) > 100_000
    assert not any(map(holds, [*bodies, *contents, *hub.objects.values()]))


@pytest.mark.parametrize("how", ["flag", "recipe"])
def test_a_token_that_is_given_is_refused_without_being_repeated(how, tmp_path: Path, capfd):
    """The line of the error ends up in logs, and in the question that somebody asks in public."""
    recipe = tmp_path / "own.yaml"
    recipe.write_text(json.dumps({"hub_token": CANARY}))
    given = ["--hub_token", CANARY] if how == "flag" else ["--config", str(recipe)]
    with pytest.raises(SystemExit):
        run_script(lambda: parse([*given, "--output_dir", str(tmp_path / "out")]))
    printed = capfd.readouterr()
    assert "error: Expected no --hub_token" in printed.err
    assert CANARY not in printed.err + printed.out
