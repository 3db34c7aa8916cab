"""The `mimdet` command: its words become the arguments of a function of `mimdet.commands`.

`train` and `pretrain` start from a preset, and every field of its configuration is an option too.
"""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Union

import tyro
from tyro.conf import Suppress, subcommand

from mimdet import __version__
from mimdet.commands import COMMANDS
from mimdet.console import open_console, told
from mimdet.presets import PRESETS, PRETRAIN_PRESETS, STEPS_FOR

PRESETS_OF: dict[str, dict[str, Any]] = dict.fromkeys(("plan", "profile", "train"), PRESETS)
PRESETS_OF["pretrain"] = PRETRAIN_PRESETS
TRACEBACK = "--traceback"


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `mimdet` command."""
    if arguments is None:
        open_console()
    words = sys.argv[1:] if arguments is None else arguments
    name, *rest = [word for word in words if word != TRACEBACK] or ["--help"]
    with told(show=TRACEBACK in words):
        if name in ("-h", "--help", "help"):
            what = "a ViT detector that trains on a sample of an image's tokens"
            print(f"mimdet {__version__}: {what}\n")
            for command, function in COMMANDS.items():
                print(f"  {command:<11} {str(function.__doc__).splitlines()[0]}")
            print("\n`mimdet COMMAND --help` explains its arguments and options;")
            print(f"{TRACEBACK}, with any command, shows where an error came from.")
        elif name == "--version":
            print(__version__)
        elif name not in COMMANDS:
            raise ValueError(f"mimdet has no command {name!r}; it has {', '.join(COMMANDS)}")
        else:
            run_command(name, rest)


def run_command(name: str, words: list[str]) -> None:
    command = COMMANDS[name]
    options = from_presets(command, PRESETS_OF[name], words) if name in PRESETS_OF else command
    about = (inspect.getdoc(command) or "").partition("\n\nArgs:")[0]
    look: list[Any] = [tyro.conf.OmitArgPrefixes]
    look += [] if name in PRESETS_OF else [tyro.conf.FlagCreatePairsOff]
    tyro.cli(options, args=words, prog=f"mimdet {name}", description=about, config=look)


def from_presets(command: Any, presets: dict[str, Callable[[], Any]], words: list[str]) -> Any:
    """`PRESET RUN --field value`: a subcommand for each preset, whose values are the defaults.

    Epochs that are given put a preset's steps aside; both are a ValueError. tyro takes a tenth of a
    second to make the options of one preset, so none but a named one gets them.
    """
    named = {name: presets[name] for name in words[:1] if name in presets} or presets
    given = {word.partition("=")[0].strip("-").replace("-", "_") for word in words}
    choices = []
    for name, make in named.items():
        config = make()
        for epochs, steps in STEPS_FOR.items():
            if {epochs, steps} <= given:
                a, b = (f"--{field.replace('_', '-')}" for field in (epochs, steps))
                raise ValueError(f"{a} and {b} say the same in two units: give one of them")
            if epochs in given:
                setattr(config.training, steps, 0)
        start = partial(command, config=config)
        described = subcommand(name, constructor=start, description=inspect.getdoc(make))
        choices += [Annotated[Any, described]]
    return Union[(*choices, Annotated[None, Suppress])]
