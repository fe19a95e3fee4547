"""A parser that refuses every unknown setting, including those whose value is an empty mapping, and suggests similar names.

jsonargparse suggests no names. Furthermore, it looks for unknown settings only among values that are not mappings, so it drops an
unknown setting such as `input: {}` without an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from musicgen_eval.cli.parser_messages import not_a_setting


class StrictParser(LightningArgumentParser):
    """Parser of `train_like_eval.py` that refuses unknown settings.

    jsonargparse creates the parsers of nested classes, such as metrics and metric entries, from the class of the main parser.
    Therefore, the arguments of these classes are checked, too.
    """

    def parse_object(self, obj: Namespace | dict[str, Any], *args: Any, **kwargs: Any) -> Namespace:
        """Parses settings that are given as an object."""
        self._refuse_unknown(obj)
        return super().parse_object(obj, *args, **kwargs)

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        """Parses the content of a configuration file."""
        try:
            settings = yaml.safe_load(content)
        except yaml.YAMLError:
            settings = None  # the call below raises the error
        self._refuse_unknown(settings)
        return super().parse_string(content, *args, **kwargs)

    def _refuse_unknown(self, settings: object) -> None:
        known = self.get_defaults(skip_validation=True)
        if "subcommand" in known:
            return  # the settings of each command have a parser of their own
        for setting, siblings in unknown_names(settings, known):
            self.error(not_a_setting(setting, siblings))


def unknown_names(settings: object, known: Namespace, group: str = "") -> Iterator[tuple[str, list[str]]]:
    """For each unknown setting, yields its name and the names of the known settings in its group.

    All names include the group. An unknown group of settings counts as one unknown setting.
    """
    for name, value in _items(settings):
        plain = name.removesuffix("+") if isinstance(name, str) else str(name)  # `callbacks+` appends to `callbacks`
        if plain.startswith("__"):
            continue  # jsonargparse adds such names, for example for the path of a configuration file
        if plain not in known:
            yield f"{group}{plain}", [f"{group}{other}" for other in vars(known)]
        elif isinstance(known[plain], Namespace):
            yield from unknown_names(value, known[plain], f"{group}{plain}.")


def _items(settings: object) -> list[tuple[str, Any]]:
    """Returns the items of a mapping. Returns no items for any other object."""
    mapping = settings.as_dict() if isinstance(settings, Namespace) else settings
    return list(mapping.items()) if isinstance(mapping, Mapping) else []
