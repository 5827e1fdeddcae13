"""Class maps: which classes of a teacher are which class of the student, and their logits merged.

A network of the Hub knows the 150 classes of ADE20K, a student two or five. As text a map says
`person=person+rider; background=*`: left a class of the student, right classes of the teacher by
name or id, `*` for all that no other class takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kd_trainer.fields import closest, expanded
from kd_trainer.files import read_yaml

Groups = tuple[tuple[int, ...], ...]
"""The teacher's classes of each of the student's, by id."""

REST = "*"
_SUFFIXES = (".yaml", ".yml", ".json")
_SHOWN = 8
_NO_NAME = re.compile(r"(class|label)[ _-]?\d+", re.IGNORECASE)
_SIGNS = re.compile(r"[;=+\n]")


class Translation(NamedTuple):
    """What a map means for a teacher and a student.

    Attributes:
        groups: teacher's classes of each of the student's; None where the channels agree as
            they are.
        note: what was understood, for people; empty if there is nothing to say.
    """

    groups: Groups | None
    note: str


def merge_logits(logits: Tensor, groups: Groups) -> Tensor:
    """The logits of merged classes: the softmax of the result sums the probabilities of a group.

    log(sum of exp) is exact, as the normalisation of the softmax is common to all groups.

    Args:
        logits: (B, C, H, W); of one channel (a sigmoid), the background has logit 0.
        groups: the channels of each class, for K classes.

    Returns:
        (B, K, H, W).
    """
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    if all(len(ids) == 1 for ids in groups):
        return logits[:, [ids[0] for ids in groups]]
    return torch.stack([logits[:, list(ids)].logsumexp(1) for ids in groups], dim=1)


def class_map_text(given: str) -> str:
    """A map as text: that of a YAML or JSON file `CLASS: [NAME, ...]`, or what is given itself.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.
    """
    if not given.lower().endswith(_SUFFIXES):
        return given
    file = Path(expanded(given))
    if not file.is_file():
        raise FileNotFoundError(f"Expected a class map in {given}, got no such file.")
    content = read_yaml(file)
    if isinstance(content, str):
        return content
    wanted = f"Expected lines like `person: [person, rider]` in {given}, got"
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{wanted} {type(content).__name__}.")
    parts = []
    for name, classes in content.items():
        entries = [str(c) for c in (classes if isinstance(classes, list) else [classes])]
        for text in (str(name), *entries):
            if _SIGNS.search(text):
                raise ValueError(f"{wanted} {text!r}: give a class of such a name by its id.")
        parts.append(f"{name}={'+'.join(entries)}")
    return "; ".join(parts)


def translate(
    text: str | None, teacher: Mapping[int, str], student: Mapping[int, str], source: str = ""
) -> Translation:
    """What `text`, or else the names alone, say of a teacher for a student.

    Args:
        text: a class map; None understands one by itself: the same names in another order, or a
            teacher that knows all of the student's names (but the background's) and further ones.
        teacher: name of each class; one name alone stands for the foreground of a sigmoid.
        student: likewise, of at least two classes.
        source: of the teacher, for messages.

    Raises:
        ValueError: if a class is unknown or taken twice, a class of the student gets none, or
            one of the teacher goes nowhere.
    """
    if len(teacher) == 1 and (text is not None or len(student) == 2):
        if text is None:
            return Translation(None, "")
        teacher = {0: "background", 1: next(iter(teacher.values()))}
    if text is not None:
        return _complete(_parsed(text, teacher, student), teacher, student)
    if len(teacher) == len(student):
        order = class_order(teacher, student)
        return Translation(None if order is None else tuple((i,) for i in order), "")
    return _by_names(teacher, student, source)


def class_order(teacher: Mapping[int, str], student: Mapping[int, str]) -> list[int] | None:
    """The teacher's class for each of the student's, by name; None if they need no reordering.

    Other names say nothing: one side calls a class what the other calls LABEL_1.
    """
    theirs, ours = ([_plain(names[i]) for i in sorted(names)] for names in (teacher, student))
    if ours == theirs or sorted(ours) != sorted(theirs) or len(set(ours)) < len(ours):
        return None
    return [theirs.index(name) for name in ours]


def _by_names(teacher: Mapping[int, str], student: Mapping[int, str], source: str) -> Translation:
    """Of a teacher with another number of classes: the student's names, the rest is background."""
    background = _background(student)
    found = {i: _lookup(name, teacher) for i, name in student.items() if i != background}
    # `class_1` is what nobody has named: it says nothing of what it shows.
    unnamed = {i for i in found if _NO_NAME.fullmatch(student[i])}
    unknown = [student[i] for i, ids in found.items() if len(ids) != 1 or i in unnamed]
    if len(teacher) > len(student) and not unknown:
        return _complete({**found}, teacher, student, itself=True)
    got = f"got {len(teacher)} in {source!r} ({_listed(teacher.values(), 5)})"
    if len(teacher) < len(student):
        cure = "Choose a teacher of the student's classes, or say which of them are which of "
        cure += "the student's with --class_map"
    else:
        near = closest(unknown[0], (part for n in teacher.values() for part in (n, *_synonyms(n))))
        map_ = "; ".join(f"{student[i]}=NAME+NAME" for i in found)
        rest = "" if background is None else f"; {student[background]}=*"
        cure = f"None of them alone is called {unknown[0]}.{near} Say which of them are which of "
        cure += f'the student\'s, --class_map "{map_}{rest}", or choose another teacher'
    raise ValueError(f"Expected a teacher of {len(student)} classes, {got}. {cure}.")


def _parsed(
    text: str, teacher: Mapping[int, str], student: Mapping[int, str]
) -> dict[int, tuple[int, ...] | None]:
    """The teacher's classes of each of the student's that the text names; None stands for `*`."""
    parts = [part.strip() for part in re.split(r"[;\n]", text) if part.strip()]
    background = _background(student)
    if len(parts) == 1 and "=" not in parts[0] and len(student) == 2 and background is not None:
        parts = [f"{1 - background}={parts[0]}"]  # what is the foreground of a binary student
    chosen: dict[int, tuple[int, ...] | None] = {}
    for part in parts:
        left, sign, right = part.partition("=")
        if not (left.strip() and sign and right.strip()):
            raise ValueError(
                f"Expected --class_map like 'person=person+rider; background=*', got {part!r}. "
                "Write CLASS=NAME+NAME, and `;` between two classes."
            )
        (ours,) = _one(left.strip(), student, "the student") or ()
        if ours in chosen:
            raise ValueError(f"Expected {student[ours]} once in --class_map, got it twice.")
        if right.strip() == REST:
            chosen[ours] = None
        else:
            names = [name.strip() for name in right.split("+")]
            chosen[ours] = tuple(i for name in names for i in _one(name, teacher, "the teacher"))
    _check_distinct(chosen, teacher, student)
    return chosen


def _one(text: str, names: Mapping[int, str], whose: str) -> tuple[int, ...]:
    """The class of a name or id.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    ids = _lookup(text, names)
    if not ids and text.isdecimal() and int(text) in names:
        ids = (int(text),)
    if not ids:
        parts = [part for name in names.values() for part in (name, *_synonyms(name))]
        hint = closest(text, parts)
        cure = hint or " Give its name or its id."
        if whose == "the student":
            cure += " --class_names says what its classes are called."
        raise ValueError(
            f"Expected a class of {whose} ({_listed(names.values())}) in --class_map, got {text!r}."
            f"{cure}"
        )
    if len(ids) > 1:
        raise ValueError(
            f"Expected one class of {whose} called {text!r} in --class_map, got the ids "
            f"{' and '.join(map(str, ids))}. Give the id of the one you mean, or ID+ID for both."
        )
    return ids


def _lookup(text: str, names: Mapping[int, str]) -> tuple[int, ...]:
    """Ids of the classes of a name; else of those one of whose synonyms it is (`road, route`)."""
    wanted = _plain(text)
    whole = tuple(i for i, name in names.items() if _plain(name) == wanted)
    return whole or tuple(i for i, name in names.items() if wanted in _synonyms(name))


def _synonyms(name: str) -> list[str]:
    parts = re.split(r"[,;]", name)
    return [_plain(part) for part in parts] if len(parts) > 1 else []


def _plain(name: str) -> str:
    return name.strip().casefold()


def _background(names: Mapping[int, str]) -> int | None:
    """The class called background, as some write it: `_background_`."""
    return next((i for i, name in names.items() if _plain(name).strip("_") == "background"), None)


def _check_distinct(
    chosen: Mapping[int, tuple[int, ...] | None],
    teacher: Mapping[int, str],
    student: Mapping[int, str],
) -> None:
    taken: dict[int, int] = {}
    for ours, theirs in _pairs(chosen):
        if theirs in taken:
            both = dict.fromkeys((student[taken[theirs]], student[ours]))
            raise ValueError(
                f"Expected each class of the teacher once in --class_map, got {teacher[theirs]} "
                f"twice, for {' and '.join(both)}. Leave one out."
            )
        taken[theirs] = ours
    rests = [student[ours] for ours, ids in chosen.items() if ids is None]
    if len(rests) > 1:
        raise ValueError(f"Expected one * in --class_map, got one for {_listed(rests)}.")


def _pairs(chosen: Mapping[int, tuple[int, ...] | None]) -> Iterator[tuple[int, int]]:
    for ours, ids in chosen.items():
        for theirs in ids or ():
            yield ours, theirs


def _complete(
    chosen: Mapping[int, tuple[int, ...] | None],
    teacher: Mapping[int, str],
    student: Mapping[int, str],
    *,
    itself: bool = False,
) -> Translation:
    """The groups of a map, in which what is not named is the student's background."""
    taken = {theirs for _, theirs in _pairs(chosen)}
    rest = tuple(i for i in sorted(teacher) if i not in taken)
    starred = next((ours for ours, ids in chosen.items() if ids is None), None)
    groups = {ours: ids or () for ours, ids in chosen.items()}
    goes_to = _background(student) if starred is None else starred
    if rest and goes_to is None:
        raise ValueError(
            f"Expected a class of the student for each of the teacher, got none for "
            f"{_listed([teacher[i] for i in rest])}. The student has no background: name them "
            "in --class_map, or give one of its classes all of them with CLASS=*."
        )
    if goes_to is not None:
        groups[goes_to] = (*groups.get(goes_to, ()), *rest)
    unfed = [name for i, name in student.items() if not groups.get(i)]
    if unfed:
        raise ValueError(
            f"Expected a class of the teacher for each of the student, got none for "
            f"{_listed(unfed)}: a teacher that cannot say a class teaches that it is nowhere. "
            "Name some of its classes in --class_map, or leave the class out of the data."
        )
    ordered = tuple(groups[i] for i in sorted(student))
    meaning = "; ".join(
        f"{student[i]} = {_named(groups[i], rest if i == goes_to else (), teacher)}"
        for i in sorted(student)
    )
    unnamed = rest and starred is None and not itself
    why = " (what --class_map does not name is background)" if unnamed else ""
    how = ". Overrule it with --class_map" if itself else ""
    return Translation(ordered, f"classes of the teacher: {meaning}{why}{how}.")


def _named(ids: tuple[int, ...], rest: tuple[int, ...], teacher: Mapping[int, str]) -> str:
    """`person + rider + 148 others`."""
    named = [teacher[i] for i in ids if i not in rest]
    if rest and (len(rest) > 3):
        others = [f"{'the ' if named else 'all '}{len(rest)} others"]
    else:
        others = [teacher[i] for i in rest]
    return " + ".join([*named, *others])


def _listed(names: Iterable[str], most: int = _SHOWN) -> str:
    shown = [str(name).strip() for name in names]
    more = ", ..." if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def check_several_labels(
    several: bool, wanted: bool | None, groups: Groups | None, source: str
) -> None:
    """Refuse a teacher whose logits mean something else than the student's.

    Args:
        several: whether a pixel may have several of its labels.
        wanted: what the student's are; None takes the teacher as it is.
        groups: of the classes that would be merged, as only those of a softmax can be.
        source: of the teacher.

    Raises:
        ValueError: if they differ.
    """
    merged = several and any(len(group) > 1 for group in groups or ())
    if wanted not in (None, several) or merged:
        kind = "several labels" if several else "one class"
        raise ValueError(
            f"Expected a teacher of {'several labels' if wanted else 'one class'} a pixel with the "
            f"student's classes, got {source} of {kind}{' in classes to merge' * merged}. Its "
            "logits mean something else: choose another teacher."
        )
