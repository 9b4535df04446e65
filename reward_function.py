"""Which function rewards a completion (--reward), and what is it handed?

`score` of rewards.py, or "path.py:function": one takes task, completion, answer and image_size, and
by name also sample, truncated and the options of --reward-options. It returns a number or a Score.
"""
import functools
import importlib.util
import inspect
import json
import math
import os
from collections.abc import Callable

import readers
from needs import check
from readers import think_order
from rewards import TABLE, Score, fits, score, values_of


def load(spec: str) -> Callable:
    """What scores a completion: `score`, or the function that "path.py:function" names.

    A function is handed what its signature takes: see `hand`.
    """
    if not spec:
        return score
    path, _, name = spec.rpartition(":")
    check(os.path.isfile(path), f"--reward {spec}: no file {path!r}; write path.py:function")
    file = importlib.util.spec_from_file_location("user_reward", path)
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    check(callable(getattr(module, name, None)), f"--reward {spec}: {path} has no such function")
    return functools.partial(hand, getattr(module, name))


def chosen(spec: str, options: str) -> Callable:
    """What --reward and --reward-options (JSON) choose, looked at before anything is trained.

    Errors: SystemExit naming the option that is wrong.
    """
    try:
        reward = load(spec)
        check_reward_options(json.loads(options), reward)
    except ValueError as error:
        raise SystemExit(f"--reward, --reward-options {options}: {error}") from None
    return reward


def hand(function, task, completion, answer, image_size=None, **further):
    """Call a function with what it takes of all this: by name, the first four else by place.

    further: truncated, sample (with its question, id, …), options. **arguments take all.
    """
    first = {"task": task, "completion": completion, "answer": answer, "image_size": image_size}
    known = first | further
    parameters = inspect.signature(function).parameters.values()
    kinds = [parameter.kind for parameter in parameters]
    places = places_of(parameters, known, further)
    for name in list(first)[:places]:
        del known[name]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        names = [parameter.name for parameter in parameters]
        known = {name: value for name, value in known.items() if name in names}
    return function(*list(first.values())[:places], **known)


def places_of(parameters, known, further):
    """How many of the first four arguments a function takes by place: 0 if it names them as we."""
    places, strange = 0, False
    for parameter in parameters:
        if parameter.kind == parameter.VAR_POSITIONAL:
            return 4
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD):
            break
        if parameter.name in further:
            break
        places += 1
        strange |= parameter.kind == parameter.POSITIONAL_ONLY
        strange |= parameter.name not in known and parameter.default is parameter.empty
    return min(places, 4) if strange else 0


def call_reward(
    function: Callable, sample, completion: str, *, truncated=False, options: dict | None = None
) -> Score:
    """The Score of a completion by `score` or any other function that returns a number or a Score.

    sample: has task, answer, image_size. An option goes to the samples whose task has it (with
    that value), and one that no task has to all: it is the function's own.
    """
    fitting = {}
    for name, value in (options or {}).items():
        tasks = [task for task, row in TABLE.items() if name in row.options]
        own = sample.task in tasks and fits(TABLE[sample.task], name, value)
        if own or not tasks:
            fitting[name] = value
    about = sample.task, completion, sample.answer, sample.image_size
    result = hand(function, *about, truncated=truncated, sample=sample, **fitting)
    try:
        total = float(getattr(result, "total", result))
    except (TypeError, ValueError):
        raise ValueError(f"a reward must be a number or a Score, not {result!r:.200}") from None
    check(math.isfinite(total), f"a reward must be finite, but that of {sample.task} is {total}")
    return Score(total, dict(getattr(result, "parts", {})))


def check_reward_options(options: dict, reward: Callable = score) -> None:
    """ValueError, before training, for an option that no task has or a value that none takes.

    reward: as `load` returned it; of a function of one's own, its signature says what it takes.
    """
    if reward is not score:
        function = reward.args[0] if isinstance(reward, functools.partial) else reward
        parameters = inspect.signature(function).parameters
        kinds = [parameter.kind for parameter in parameters.values()]
        for name in options:
            taken = inspect.Parameter.VAR_KEYWORD in kinds or name in parameters
            check(taken, f"the reward takes no option {name!r}; its own are {[*parameters]}")
        return
    names = {name for row in TABLE.values() for name in row.options}
    for name, value in options.items():
        if name == "think":
            think_order(value)
        elif name == "format_weight":
            number = value is None or readers.plain_numbers([value], 1)
            check(number, f"format_weight must be a number, not {value!r}")
        else:
            check(name in names, f"no task has an option {name!r}; there are {sorted(names)}")
            rows = [row for row in TABLE.values() if name in row.options]
            possible = any(fits(row, name, value) for row in rows)
            listed = ", ".join(values_of(row, name) for row in rows)
            check(possible, f"{name} can be {listed}, not {value!r}")
