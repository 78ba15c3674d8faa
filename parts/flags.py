"""A frozen dataclass whose fields are a command's flags: one place for a setting's name, type, default and help."""

import inspect
from collections.abc import Callable
from dataclasses import Field, field, fields
from typing import Annotated, Any

import typer


def setting(default: Any, doc: str, **by_method: Any) -> Any:
    """Return a dataclass field: its doc is its flag's help, and grpo=... its default where GRPO's recipe differs."""
    return field(default=default, metadata={"doc": doc, **by_method})


def flags_of(config: type) -> Callable[[Callable[[dict[str, Any]], None]], Callable[..., None]]:
    """Return a decorator that gives a command one flag per field of the dataclass `config`.

    The command receives the values of the flags that were typed, and no others, so that a recipe can fill the rest.
    """

    def decorate(command: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
        def wrapper(**flags: Any) -> None:
            command({name: value for name, value in flags.items() if value is not None})

        parameters = []
        for f in fields(config):
            option = typer.Option(help=f"{f.metadata['doc']}{shown_default(f)}", show_default=False)
            annotation = Annotated[f.type | None, option]
            parameters.append(
                inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            )
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__doc__ = command.__doc__
        return wrapper

    return decorate


def shown_default(setting: Field) -> str:
    """Return " [default]" for a flag's help, with each method's that differs; "" for None: the help text says it."""
    others = "".join(f"; {name}: {value}" for name, value in setting.metadata.items() if name != "doc")
    return "" if setting.default is None else f" [{setting.default}{others}]"
