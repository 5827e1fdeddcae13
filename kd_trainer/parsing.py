"""Flags and YAML values of dataclass fields, by transformers' parser."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import textwrap
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, Union

from transformers import HfArgumentParser

from kd_trainer.fields import expanded
from kd_trainer.foreign_flags import flag_hint

CONSOLE = "kd-trainer"
_SHOWN = 200  # characters of a wrong value
_LARGEST = 2**63
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Each flag once, its short name first, switches without a value; no name is broken."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # Overridden as argparse repeats the value behind every spelling, `--a_b TEXT, --a-b TEXT`.
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(sorted(filter(_is_underscored, action.option_strings), key=len))
        return f"{names} {_value(action)}" if action.metavar else names

    def _split_lines(self, text: str, width: int) -> list[str]:
        # Overridden as argparse breaks names of flags and encoders at their hyphens.
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


class Parser(HfArgumentParser):
    """`transformers.HfArgumentParser`, as all commands use it.

    A flag that is not given sets nothing, so that a recipe's value or the dataclass's default
    stands; a value stays text until `given` makes it what the field wants. Complaints are errors
    like all the others instead of a page of usage.

    Args:
        classes: dataclasses whose fields are flags.
        script: how the parser calls itself, unless it is the console command that was typed.
        description: for the help, in paragraphs.
        epilog: likewise.
        without: fields that get no flag.
        hidden: fields whose flags have no line in the help.
        headings: heading in the help of each field, in the order of the help.
    """

    def __init__(
        self,
        classes: Sequence[Any],
        script: str,
        description: str,
        epilog: str = "",
        *,
        without: Collection[str] = (),
        hidden: Collection[str] = (),
        headings: Mapping[str, str] = types.MappingProxyType({}),
    ) -> None:
        self.hints = hints_of(classes)
        self.without, self.hidden, self.headings = without, hidden, headings
        self.sections: dict[str, list[argparse.Action]] = {"positional arguments": []}
        self.sections |= {heading: [] for heading in ("options", *headings.values())}
        super().__init__(
            classes,
            prog=sys.argv[0] if sys.argv[0].startswith(f"{CONSOLE} ") else script,
            description=_filled(description),
            epilog=_filled(epilog),
            allow_abbrev=False,
            formatter_class=_Help,
        )

    def add_argument(self, *names: str, **options: Any) -> Any:
        """A flag as argparse takes it; of a field, as transformers describes it.

        transformers gives a flag the default of its field, which would hide that it was not given,
        and a type that knows neither `null` nor one word or several (`--report_to`).
        """
        name = options.get("dest") or names[0].lstrip("-")
        is_flag = names[0].startswith("-")
        if is_flag and name in self.hints:
            if name in self.without:
                return None
            options = self._options_of(name, options)
        action = super().add_argument(*names, **options)
        heading = self.headings.get(action.dest, "options") if is_flag else "positional arguments"
        if action.help != argparse.SUPPRESS:
            self.sections[heading].append(action)
        return action

    def _options_of(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("action") == "store_false":  # the twin `--no_x` of a switch that is on
            return options | {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        kinds = _options(self.hints[name])
        made = {"nargs": "?", "const": True} if bool in kinds else {"metavar": _metavar(kinds[0])}
        if any(typing.get_origin(kind) is list for kind in kinds):
            made["nargs"] = "+"
        made |= {key: options[key] for key in ("nargs", "const", "metavar") if key in options}
        text = _help(name, options.get("help"), options.get("default"))
        text = argparse.SUPPRESS if name in self.hidden else text
        return made | {"dest": name, "default": argparse.SUPPRESS, "help": text}

    def format_help(self) -> str:
        """Usage, description, flags under their headings, epilog."""
        words = map(_value, self.sections["positional arguments"])
        formatter = self.formatter_class(prog=self.prog)
        formatter.add_usage(" ".join(["%(prog)s", "[--flag value ...]", *words]), [], [])
        formatter.add_text(self.description)
        order = {name: place for place, name in enumerate(self.headings)}
        for heading, flags in self.sections.items():
            formatter.start_section(heading)
            formatter.add_arguments(sorted(flags, key=lambda flag: order.get(flag.dest, -1)))
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"Expected a command line as --help shows it, got a fault: {message}.")

    def _spelled(self, word: str) -> str:
        """A flag with hyphens, or with some of them, as its field is called."""
        name, equals, value = word.partition("=")
        underscored = f"--{name[2:].replace('-', '_')}"
        known = name.startswith("--") and underscored in self._option_string_actions
        return f"{underscored}{equals}{value}" if known else word

    def given(self, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """What a command line says, and nothing else: words and flags, as their fields want them.

        Raises:
            ValueError: on an unknown flag (names the nearest), a word that belongs to none, or a
                value that is not of the field's type.
        """
        typed = sys.argv[1:] if arguments is None else arguments
        namespace, unknown = self.parse_known_args([self._spelled(word) for word in typed])
        flag = next((u.split("=")[0] for u in unknown if u.startswith("-")), None)
        if flag is not None:
            known = list(filter(_is_underscored, self._option_string_actions))
            raise ValueError(f"Expected known flags, got {flag}.{flag_hint(flag, known)}")
        if unknown:
            raise ValueError(
                f"Expected each value behind its flag, got {unknown[0]!r} behind none. Write "
                "--name value; quote a value with spaces."
            )
        return {
            name: convert(name, value, self.hints[name]) if name in self.hints else expanded(value)
            for name, value in vars(namespace).items()
        }


def _value(action: argparse.Action) -> str:
    form = {"+": "{} ...", "?": "[{}]"}.get(str(action.nargs), "{}")
    return form.format(action.metavar or action.dest)


def _is_underscored(option: str) -> bool:
    return "-" not in option.lstrip("-")


def _filled(text: str) -> str:
    """Paragraphs in lines of a terminal; those with an indented line, of commands, are kept."""
    parts = text.split("\n\n")
    return "\n\n".join(part if "\n " in part else textwrap.fill(part, 78) for part in parts)


def hints_of(classes: Sequence[type]) -> dict[str, Any]:
    """Resolved type of every field of these dataclasses; the first class that has a name wins."""
    hints: dict[str, Any] = {}
    for cls in reversed(classes):
        resolved = typing.get_type_hints(cls)
        hints |= {f.name: resolved[f.name] for f in dataclasses.fields(cls) if f.init}
    return hints


def settings_of(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that are fields of a dataclass."""
    names = {field.name for field in dataclasses.fields(cls) if field.init}
    return {name: value for name, value in settings.items() if name in names}


def convert(name: str, value: Any, hint: Any) -> Any:
    """`value` (text from a flag, or what YAML made of it) as the type of the field.

    Raises:
        ValueError: if it cannot be one; names the field and the wanted type.
    """
    options = _options(hint)
    if value == "" and str in options and type(None) not in options:
        return ""  # as good as not given, and what a configuration written without it says
    if value == ["null"] and type(None) in options:
        return None  # the one way to take back a list that a recipe gives
    if value is None or (isinstance(value, str) and value.lower() in ("null", "")):
        if type(None) in options:
            return None
        raise ValueError(f"Expected a value for --{name}, got none.")
    if isinstance(value, str) and options == (list[str], str):
        return expanded(value)  # one word, as a path may hold a space; several come as a list
    for option in options:
        try:
            return expanded(_convert_to(value, option))
        except (TypeError, ValueError, KeyError, OverflowError, RecursionError):
            continue
    wanted = " or ".join(_type_name(o) for o in options if o is not type(None))
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."
    raise ValueError(f"Expected --{name} to be {wanted}, got {shown}.")


def _options(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    # Text accepts everything, so it comes last; None has been dealt with.
    return tuple(sorted(options, key=lambda o: (o is str, o is type(None))))


def _type_name(option: Any) -> str:
    if typing.get_origin(option) is list:
        return f"a list, each {_type_name(typing.get_args(option)[0])}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    return words.get(option, getattr(option, "__name__", str(option)))


def _convert_to(value: Any, option: Any) -> Any:
    origin = typing.get_origin(option) or option
    if origin is list:
        (item_type,) = typing.get_args(option)
        if isinstance(value, list) and issubclass(item_type, str):
            return [str(item) for item in value]  # as they are: a name may hold a space
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        return [_convert_to(item, item_type) for item in text.replace(",", " ").split()]
    if origin is dict:
        return json.loads(value) if isinstance(value, str) else dict(value)
    if isinstance(value, list):
        raise TypeError
    if option is bool:
        return value if isinstance(value, bool) else _WORDS[str(value).lower()]
    if isinstance(value, bool) and option in (int, float):
        raise TypeError
    if option is int:
        if float(value) != int(float(value)) or abs(float(value)) >= _LARGEST:
            raise ValueError
        return int(float(value))
    if option is str and value is False:
        return "no"  # what YAML makes of a bare `no`
    if option is float and not math.isfinite(float(value)):
        raise ValueError
    if option in (float, str) and not isinstance(value, dict | set | bytes):
        return option(value)
    raise TypeError


def _help(name: str, text: object, default: Any) -> str:
    """First paragraph of a field's help, and its default where that says something."""
    about = " ".join(str(text or "").split("\n\n")[0].split()).replace("%", "%%")
    if default is True:
        return f"{about} (on; --no_{name} turns it off)"
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    silent = shown is None or shown is False or shown == ""
    return about if silent else f"{about} (default: {shown})"


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is list:
        return _metavar(typing.get_args(kind)[0])
    return {int: "N", float: "X"}.get(kind, "TEXT")
