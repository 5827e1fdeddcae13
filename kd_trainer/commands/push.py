"""Publish a trained student: write the folder with its card, and push it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_trainer.argument_checks import check_license, check_repo_id, missing_license
from kd_trainer.errors import printable
from kd_trainer.fields import help_field
from kd_trainer.files import MARKER
from kd_trainer.hub import (
    Publication,
    Pushed,
    Source,
    check_access,
    find_source,
    settings_of,
    upload,
    write_folder,
)
from kd_trainer.parsing import Parser
from kd_trainer.push_callback import HUB_FOLDER


@dataclass
class PushArguments:
    """Settings of scripts/push.py."""

    license: str = help_field(
        "",
        "Licence you give the student under, as the Hub writes it: apache-2.0, mit, cc-by-4.0, "
        "..., other (default: --hub_license of the run).",
    )
    public: bool = help_field(False, "Push to a public repository, not to a private one.")
    private: bool | None = help_field(None, "What is done without --public.")
    force: bool = help_field(
        False,
        "Push also into a repository whose other files change how the student loads, and over a "
        "model or a card that was not pushed from here.",
    )
    dry_run: bool = help_field(False, "Write the folder that would be pushed, and stop.")
    output_dir: str = help_field("", "Where that folder is written (default: FOLDER/hub).")
    dataset_name: str | None = help_field(
        None,
        "Name of the training data on the card (default: its id on the Hub, or the last part of "
        "its path).",
    )
    baseline: str | None = help_field(
        None, "results.json of the same student trained with --teacher none, to compare with."
    )
    pictures: bool = help_field(
        False,
        "Also publish the panel, which shows images of the evaluation data.",
    )
    commit_message: str = help_field("Push a student", "Message of the commit.")

    def __post_init__(self) -> None:
        if self.private is not None and self.private == self.public:
            got = "both" if self.public else "--private false alone"
            raise ValueError(
                f"Expected either --public or --private, got {got}. Without either the push is "
                "private."
            )
        if self.license:
            check_license(self.license, "license")
        if not self.commit_message.strip():
            raise ValueError("Expected a --commit_message, got an empty one. Leave the flag out.")


def push(args: PushArguments, folder: str, repo_id: str) -> Pushed | None:
    """Write what is pushed and push it.

    Returns:
        Where it went; None with `dry_run`.

    Raises:
        FileNotFoundError: if there is no student in the folder.
        PermissionError: if the token may not write there.
        ConnectionError: if the Hub cannot be reached.
        ValueError: if the licence is missing, or an argument is none.
    """
    check_repo_id(repo_id)
    source = find_source(folder)
    license_id = args.license or settings_of(source.run).get("hub_license")
    if not license_id:
        raise ValueError(missing_license("license"))
    baseline = Path(args.baseline) if args.baseline else None
    about = Publication(
        repo_id,
        license_id,
        dataset_name=args.dataset_name,
        baseline=baseline,
        pictures=args.pictures,
    )
    if not args.dry_run:
        check_access(repo_id, private=not args.public, force=args.force)
    destination = write_folder(source, _destination(args, source), about)
    print(_listing(destination))
    if args.dry_run:
        return None
    return upload(destination, repo_id, message=args.commit_message, force=args.force)


def _destination(args: PushArguments, source: Source) -> Path:
    """Beside the student, never inside it: what lies in its folder is loaded as a whole."""
    if args.output_dir:
        return Path(args.output_dir)
    return (source.run or source.student) / HUB_FOLDER


def _listing(folder: Path) -> str:
    """The files and their sizes, one a line."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return "\n".join(
        f"{file.stat().st_size / 2**10:10,.1f} KiB  {printable(file.relative_to(folder))}"
        for file in files
    )


def push_main(arguments: Sequence[str] | None = None) -> None:
    """Push, and say where."""
    parser = Parser(
        [PushArguments],
        "push.py",
        "Publish a trained student with its card: the student alone and its figures; "
        "never the teacher, optimizer, training arguments or a token. The token is that of "
        "`hf auth login`, or HF_TOKEN.",
        "Examples:\n  push.py runs/distilled me/student --license apache-2.0 --dry_run\n"
        "  push.py runs/distilled me/student --license apache-2.0 --public",
    )
    parser.add_argument("folder", help="Output folder of a run, or a saved student.")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="Where on the Hub.")
    flags = parser.given(arguments)
    folder, repo_id = flags.pop("folder"), flags.pop("repo_id")
    args = PushArguments(**flags)
    pushed = push(args, folder, repo_id)
    if pushed is None:
        written = _destination(args, find_source(folder))
        print(f"\nWritten to {written}; nothing was pushed.")
    else:
        print("" if pushed.changed else "\nThe repository holds exactly this already: no commit.")
        if pushed.others:
            print(f"Also there, and not of this push: {printable(', '.join(pushed.others))}")
        print(f"{pushed.url}")
