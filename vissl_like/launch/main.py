"""The command line: composes, checks and starts a run, or answers a question. Free of torch until a run starts."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vissl_like import __version__
from vissl_like.config.spelling import nearest
from vissl_like.core import signals
from vissl_like.errors import EXIT_CONFIGURATION, EXIT_DEFECT, EXIT_DONE, ConfigError, Stopped, UserError, show_error

if TYPE_CHECKING:
    from vissl_like.config.check import Loaded

FLAGS = ("--help", "--version", "--multirun", "--config-dir", "--shell-completion")
_SHORT = {"-h": "--help", "-m": "--multirun", "-cd": "--config-dir"}
_WITH_VALUE = ("--config-dir", "--shell-completion")


@dataclass
class Arguments:
    """A command line, split: flags with their values, a verb, and words (overrides, or what the verb is about)."""

    flags: dict[str, list[str]] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)

    @property
    def config_dirs(self) -> list[str]:
        return self.flags.get("--config-dir", [])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 configuration, 3 data or weights, 75 stopped, 1 defect."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Threads that wait by spinning starve the loader processes where cores are few. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Its sockets warn of names without an address and of machines that have gone; what matters of that we say ourselves.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    signals.guard_interrupts()
    try:
        if arguments[:1] == ["--complete"]:
            return _complete(arguments[1:])
        if arguments[:1] == ["data"]:
            from vissl_like.data.tools import main as data

            return data(arguments[1:])
        if arguments[:1] == ["translate"]:
            from vissl_like.compat.main import main as translate

            return translate(arguments[1:])
        return _dispatch(_split(arguments))
    except (UserError, Stopped) as error:
        return show_error(error)
    except KeyboardInterrupt:
        from vissl_like.launch.endings import show_interrupt

        return show_interrupt()
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception as error:
        return show_error(error)


def _split(arguments: list[str]) -> Arguments:
    result = Arguments()
    rest = iter(arguments)
    for word in rest:
        name, equals, value = word.partition("=")
        name = _SHORT.get(name, name)
        if not word.startswith("-") or (word.startswith("-") and name not in FLAGS and _is_value(word)):
            result.words.append(word)
            continue
        if name not in FLAGS:
            near = nearest(name, FLAGS)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ConfigError(f"unknown option {word!r}{hint} `--help` shows all; settings are key=value.")
        if name in _WITH_VALUE and not equals:
            value = next(rest, "")
        if name in _WITH_VALUE and not value:
            raise ConfigError(
                f"{name} needs a value, for example {name} {'bash' if 'shell' in name else 'my_configs'}."
            )
        result.flags.setdefault(name, []).append(value)
    return result


def _is_value(word: str) -> bool:
    """Whether a word with a leading minus is no flag (a negative number)."""
    return word[1:2].isdigit()


def _dispatch(arguments: Arguments) -> int:
    from vissl_like.launch import verbs

    if "--help" in arguments.flags:
        print(verbs.help_text())
        return EXIT_DONE
    if "--version" in arguments.flags:
        print(f"vissl_like {__version__}")
        return EXIT_DONE
    if "--shell-completion" in arguments.flags:
        from vissl_like.launch.completion import script

        print(script(arguments.flags["--shell-completion"][-1]))
        return EXIT_DONE
    if not arguments.words:
        print(verbs.short_help(), file=sys.stderr)
        return EXIT_CONFIGURATION
    verb, *rest = arguments.words
    if verb in verbs.VERBS:
        print(verbs.answer(verb, rest, config_dirs=arguments.config_dirs))
        return EXIT_DONE
    verbs.check_words(arguments.words, config_dirs=arguments.config_dirs)
    if "--multirun" in arguments.flags:
        from vissl_like.launch.sweep import run_sweep

        return run_sweep(arguments.words, config_dirs=arguments.config_dirs)
    return _launch(arguments.words, config_dirs=arguments.config_dirs)


def _complete(words: list[str]) -> int:
    from vissl_like.launch.completion import complete

    for candidate in complete(words):
        print(candidate)
    return EXIT_DONE


# -------------------------------------------------------------------------------------------------------------- launch
def _launch(overrides: list[str], *, config_dirs: list[str]) -> int:
    from vissl_like.launch import allocation
    from vissl_like.launch.machine import started_by_torchrun

    allocation.join()
    if started_by_torchrun():
        return _launch_with_others(overrides, config_dirs=config_dirs)
    loaded = _load(overrides, config_dirs=config_dirs)
    job, notes = allocation.adopt(loaded.job)
    for note in notes:
        print(note, file=sys.stderr)
    from vissl_like.launch.start import start

    return start(dataclasses.replace(loaded, job=job), config_dirs=config_dirs)


def _load(overrides: list[str], *, config_dirs: list[str]) -> Loaded:
    from vissl_like.config.check import load_job

    loaded = load_job(overrides, config_dirs=config_dirs)
    for note in loaded.notes:
        print(f"warning: {note}", file=sys.stderr)
    return loaded


def _launch_with_others(overrides: list[str], *, config_dirs: list[str]) -> int:
    """As one of the processes that torchrun started: the first composes and tells the others what to run."""
    from vissl_like.launch import torchrun
    from vissl_like.launch.start import start

    if not torchrun.is_first():
        from vissl_like.launch.local import follow

        follow()
        return EXIT_DONE
    try:
        code = start(_load(overrides, config_dirs=config_dirs), config_dirs=config_dirs)
    except Exception as error:
        code = show_error(error)
    except BaseException:  # Ctrl-C, which reaches the others too: nobody is waited for
        if not torchrun.has_told():
            torchrun.dismiss(EXIT_DEFECT, wait=False)
        raise
    if not torchrun.has_told():
        torchrun.dismiss(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
