"""A frozen dataclass whose fields are a command's flags: one place for a setting's type, default, range and help."""

import inspect
import math
from collections.abc import Callable
from dataclasses import Field, field, fields
from typing import Annotated, Any

import typer


def setting(
    default: Any,
    doc: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    choices: tuple[str, ...] = (),
    **by_method: Any,
) -> Any:
    """Return a dataclass field.

    doc        also its flag's help
    least ...  what `check_settings` holds it to: least <= value, above < value, value <= most, value among choices
    by_method  its default where a method's recipe has another, such as grpo=1.2
    """
    valid = {"least": least, "above": above, "most": most, "choices": choices}
    return field(default=default, metadata={"doc": doc, "by_method": by_method, **valid})


def check_settings(config: Any) -> None:
    """Raise ValueError for the first setting that is not what its field allows, saying what is."""
    for f in fields(config):
        value, name = getattr(config, f.name), f.name.replace("_", "-")
        least, above, most, choices = (
            f.metadata[key] for key in ("least", "above", "most", "choices")
        )
        if choices and value not in choices:
            raise ValueError(
                f"unknown {f.name.replace('_', ' ')} {value!r}; valid: {', '.join(choices)}"
            )
        if isinstance(value, int | float) and not (least <= value <= most and value > above):
            bounds = {f"{least} or more": least, f"above {above}": above, f"up to {most}": -most}
            valid = [text for text, bound in bounds.items() if bound > -math.inf]
            raise ValueError(f"--{name} is {value}; valid: {', '.join(valid)}")


def flags_of(config: type) -> Callable[[Callable[[dict[str, Any]], None]], Callable[..., None]]:
    """Return a decorator that gives a command one flag per field of the dataclass `config`.

    The command receives the values of the flags that were typed, and no others, so that a recipe can fill the rest.
    """

    def _decorate(command: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
        def _wrapper(**flags: Any) -> None:
            command({name: value for name, value in flags.items() if value is not None})

        parameters = []
        for f in fields(config):
            option = typer.Option(help=help_text(f), show_default=False)
            annotation = Annotated[f.type | None, option]
            parameters.append(
                inspect.Parameter(
                    f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
                )
            )
        _wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        _wrapper.__doc__ = command.__doc__
        return _wrapper

    return _decorate


def help_text(setting: Field) -> str:
    """Return a flag's help: doc, choices, default, each method's where they differ; the doc says what None is."""
    choices, by_method = setting.metadata["choices"], setting.metadata["by_method"]
    text = setting.metadata["doc"] + (f": {', '.join(choices)}" if choices else "")
    defaults = [
        str(setting.default),
        *(f"{method}: {value}" for method, value in by_method.items()),
    ]
    return text if setting.default is None else f"{text} [{'; '.join(defaults)}]"
