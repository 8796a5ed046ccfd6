"""Shell completion: the scripts, and what they call for candidates. Quick: neither Hydra nor torch is imported."""

from __future__ import annotations

from vissl_like.config import components, reference
from vissl_like.config.recipes import Library
from vissl_like.errors import ConfigError
from vissl_like.launch.verbs import VERBS

_FLAGS = ("--help", "--version", "--multirun", "--config-dir", "--shell-completion")

_BASH = """\
# bash completion for vissl-like. To use it: eval "$(vissl-like --shell-completion bash)"
_vissl_like() {
    local line="${COMP_LINE:0:$COMP_POINT}" word="" candidates
    [[ "$line" == *[[:space:]] ]] || word="${line##*[[:space:]]}"
    mapfile -t candidates < <(vissl-like --complete ${COMP_WORDS[1]:+"${COMP_WORDS[1]}"} "$word" 2>/dev/null)
    # bash splits words at = and :, so only what follows the last of them is to be filled in.
    local cut="${word%"${word##*[=:]}"}"
    COMPREPLY=("${candidates[@]#"$cut"}")
    [[ "${COMPREPLY[0]}" == *[=./] ]] && compopt -o nospace
}
complete -o default -F _vissl_like vissl-like"""

_ZSH = """\
#compdef vissl-like
# zsh completion for vissl-like. To use it: eval "$(vissl-like --shell-completion zsh)"
_vissl_like() {
    local -a candidates
    candidates=("${(@f)$(vissl-like --complete "${words[2]}" "${words[CURRENT]}" 2>/dev/null)}")
    compadd -S '' -U -- "${candidates[@]}"
}
compdef _vissl_like vissl-like"""

_FISH = """\
# fish completion for vissl-like. To use it: vissl-like --shell-completion fish | source
function __vissl_like
    set -l words (commandline -opc)
    vissl-like --complete "$words[2]" (commandline -ct) 2>/dev/null
end
complete -c vissl-like -f -a '(__vissl_like)'"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def script(shell: str) -> str:
    """The completion script of a shell."""
    if shell not in _SCRIPTS:
        raise ConfigError(f"--shell-completion {shell}: known shells are {', '.join(_SCRIPTS)}.")
    return _SCRIPTS[shell]


def complete(words: list[str]) -> list[str]:
    """Candidates for the last word; the first one may be a verb."""
    word = words[-1] if words else ""
    verb = words[0] if len(words) > 1 else ""
    if verb == "list":
        found = list(components.LISTS)
    elif verb == "options":
        found = _keys(word, ends="")
    elif word.startswith("-"):
        found = list(_FLAGS)
    else:
        found = _overrides(word)
    return [candidate for candidate in dict.fromkeys(found) if candidate.startswith(word)]


def _overrides(word: str) -> list[str]:
    key, equals, value = word.partition("=")
    if not equals:
        groups = [f"+config/{group}=" for group in _preset_groups()] if word.startswith("+") else []
        return [*VERBS, "config=", "engine_name=", *groups, *_keys(word.lstrip("+~"), ends="=")]
    if key == "config":
        return [f"config={name}" for name in _next_level(list(Library().files), value, "/")]
    if key.startswith("+config/"):
        group = key.removeprefix("+config/") + "/"
        return [f"{key}={name.removeprefix(group)}" for name in Library().files if name.startswith(group)]
    return [f"{key}={choice}" for choice in _values(key)]


def _preset_groups() -> list[str]:
    return sorted({name.rpartition("/")[0] for name in Library().files if "/" in name})


def _next_level(names: list[str], typed: str, separator: str) -> list[str]:
    """Names up to the next separator after what is typed: a folder or section at a time."""
    start = typed.rfind(separator) + 1
    found = []
    for name in names:
        if name.startswith(typed) and name != typed:
            head, more, _ = name[start:].partition(separator)
            found.append(name[:start] + head + more)
    return list(dict.fromkeys(found))


def _keys(typed: str, *, ends: str) -> list[str]:
    """Keys one level at a time: sections end with a dot, options with `ends`."""
    names = [
        entry.key + ("." if entry.is_section else ends)
        for entry in reference.entries().values()
        if "*" not in entry.key
    ]
    return _next_level(names, typed, ".")


_COMPONENT_KEYS = {
    "engine_name": "engines",
    "config.LOSS.NAME": "losses",
    "config.MODEL.TRUNK.NAME": "trunks",
    "config.OPTIMIZER.NAME": "optimizers",
    "config.TASK.NAME": "tasks",
    "config.MODEL.WEIGHTS_INIT.PRESET": "weight_presets",
}


def _values(key: str) -> list[str]:
    if key in _COMPONENT_KEYS:
        return list(components.listing(_COMPONENT_KEYS[key]))
    if key.startswith("config.OPTIMIZER.PARAM_SCHEDULERS.") and key.endswith(".NAME"):
        return list(components.listing("schedules"))
    entry = reference.find(tuple(key.split(".")))
    if entry is None:
        return []
    choices = [str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in entry.choices]
    return [f"[{choice}]" for choice in choices] if entry.type.startswith("a list") else choices
